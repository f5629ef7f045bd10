"""Reads ``env_args`` from a JSON file or a robomimic dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from cache_pipeline.errors import CachePipelineError, ConfigError
from cache_pipeline.files import read_json
from cache_pipeline.hdf5 import group_attributes, holds_hdf5


class EnvArgs(NamedTuple):
    """robomimic's ``env_args``, and the render flags of the dataset, if recorded."""

    env_args: dict[str, Any]
    render_flags: dict[str, bool] | None


def read_env_args(path: Path) -> EnvArgs:
    """Reads a JSON object as in ``data.attrs["env_args"]``, or an HDF5 file with that attribute.

    Raises:
        ConfigError: ``path`` is neither of these.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path} to read env_args from")
    try:
        if holds_hdf5(path):
            attributes = group_attributes(path) or {}
            if "env_args" not in attributes:
                raise ConfigError(f"{path} has no env_args; give a JSON file, or a dataset whose data group has them")
            env_args, flags = json.loads(attributes["env_args"]), attributes.get("render_flags")
            render_flags = None if flags is None else json.loads(flags)
        else:
            env_args, render_flags = read_json(path), None
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, CachePipelineError):
            raise
        raise ConfigError(f"{path} has no readable env_args: {error}") from error
    if not isinstance(env_args, dict) or "env_name" not in env_args:
        raise ConfigError(f'{path} has no env_args: a JSON object with "env_name", "type" and "env_kwargs" is needed')
    return EnvArgs(env_args, render_flags)
