"""run.json: the config of a run, its data and the specification of its policy."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cache_pipeline import __version__
from cache_pipeline.cache.manifest import ACTIONS, SourceRecord
from cache_pipeline.errors import CheckpointError
from cache_pipeline.files import check_numbers, read_json, typed, write_json
from cache_pipeline.policies.spec import PolicySpec

FORMAT = 1
RUN_JSON = "run.json"


Digests = dict[str, str | None]
"""Camera, ``actions``, ``low_dim/<key>``, … → digest; ``None`` if the data do not have it."""


@dataclass(frozen=True, kw_only=True)
class DemoRecord:
    """One demo of a run: the number of its file, its name there, and the digests of its contents.

    ``contents`` is ``None`` in runs of early versions.
    """

    file: int
    name: str
    contents: Digests | None


@dataclass(frozen=True, kw_only=True)
class DataRecord:
    """The demos that a run was trained on, and their files at that time."""

    cache: str | None = None
    """Path of the feature cache, if the run read one."""
    fingerprint: str | None = None
    """The fingerprint of that cache."""
    datasets: tuple[str, ...] = ()
    files: tuple[SourceRecord, ...] = ()
    """The dataset files with size and time."""
    train: tuple[DemoRecord, ...] = ()
    valid: tuple[DemoRecord, ...] = ()
    env_args: dict[str, Any] | None = None
    render_flags: dict[str, Any] | None = None
    action_keys: tuple[str, ...] = ACTIONS
    """The arrays of the dataset that are the actions, side by side."""

    @property
    def demos(self) -> tuple[DemoRecord, ...]:
        """The demos trained on, then the held-out ones."""
        return (*self.train, *self.valid)

    def to_json(self) -> dict[str, Any]:
        value = {
            "cache": self.cache,
            "fingerprint": self.fingerprint,
            "datasets": list(self.datasets),
            "files": [source.to_json() for source in self.files],
            "train": [[demo.file, demo.name] for demo in self.train],
            "valid": [[demo.file, demo.name] for demo in self.valid],
            "env_args": self.env_args,
            "render_flags": self.render_flags,
            **({"action_keys": list(self.action_keys)} if self.action_keys != ACTIONS else {}),
        }
        contents = [demo.contents for demo in self.demos]
        return value if None in contents else {**value, "contents": contents}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DataRecord:
        """Reads the value of ``to_json``; raises KeyError, TypeError or ValueError for any other value."""
        named = typed([*value["train"], *value["valid"]], list[tuple[int, str]])
        contents = typed(value.get("contents", [None] * len(named)), list[Digests | None])
        if len(contents) != len(named):
            raise ValueError(f"it lists {len(named)} demos but the digests of {len(contents)}")
        files = tuple(SourceRecord.from_json(source) for source in value.get("files", ()))
        for (file, _), digests in zip(named, contents, strict=True):
            if file < 0 or (digests is not None and file >= len(files)):
                raise ValueError(f"a demo in it is of file {file}, but it lists {len(files)}")
        demos = [
            DemoRecord(file=file, name=name, contents=digests)
            for (file, name), digests in zip(named, contents, strict=True)
        ]
        count = len(value["train"])
        return cls(
            cache=typed(value.get("cache"), str | None),
            fingerprint=typed(value.get("fingerprint"), str | None),
            datasets=typed(value["datasets"], tuple[str, ...]),
            files=files,
            train=tuple(demos[:count]),
            valid=tuple(demos[count:]),
            env_args=typed(value.get("env_args"), dict[str, Any] | None),
            render_flags=typed(value.get("render_flags"), dict[str, Any] | None),
            action_keys=typed(value.get("action_keys", ACTIONS), tuple[str, ...]),
        )


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Contents of run.json. Only ``write_record`` and ``read_record`` handle the file's format."""

    kind: Literal["train", "finetune"]
    config: dict[str, Any]
    """The ``TrainConfig`` or ``FinetuneConfig`` as JSON."""
    policy: PolicySpec
    data: DataRecord
    order: dict[str, Any]
    """``views``, and ``blocks``: the sizes of the block order, or None."""
    precision: str | None = None
    """Precision of the run's features; None in runs of early versions."""
    start: str | None = None
    """The checkpoint from which a fine-tuning run started."""
    versions: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Length of the run in optimiser steps, finished or not."""
        return int(self.config.get("steps", 0))

    def with_steps(self, steps: int) -> RunRecord:
        """Returns a copy of the record with another number of steps."""
        return replace(self, config={**self.config, "steps": steps})

    def to_json(self) -> dict[str, Any]:
        value = {
            "format": FORMAT,
            "kind": self.kind,
            "config": self.config,
            "policy": self.policy.to_json(),
            "data": self.data.to_json(),
            "order": self.order,
            "precision": self.precision,
            "versions": self.versions,
            "command": list(self.command),
        }
        return value if self.start is None else {**value, "from": self.start}


def this_process() -> dict[str, Any]:
    """Returns the fields ``versions`` and ``command`` for this process."""
    import numpy
    import torch

    versions = {
        "cache_pipeline": __version__,
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }
    return {"versions": versions, "command": tuple(sys.argv)}


def write_record(record: RunRecord, folder: Path) -> None:
    """Writes ``run.json`` atomically; raises OSError."""
    write_json(folder / RUN_JSON, record.to_json())


def read_record(run: Path) -> RunRecord:
    """Reads ``run.json``; raises CheckpointError if it is missing, damaged or from another version."""
    path = run / RUN_JSON
    value = read_object(path)
    if value.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a run of format {FORMAT}")
    try:
        return RunRecord(
            kind=typed(value["kind"], Literal["train", "finetune"]),
            config=_config(value["config"]),
            policy=PolicySpec.from_json(value.get("policy")),
            data=DataRecord.from_json(value["data"]),
            order=typed(value.get("order", {"views": 1, "blocks": None}), dict[str, Any]),
            precision=typed(value.get("precision"), str | None),
            start=typed(value.get("from"), str | None),
            versions=typed(value.get("versions", {}), dict[str, str]),
            command=typed(value.get("command", ()), tuple[str, ...]),
        )
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _config(value: Any) -> dict[str, Any]:
    config: dict[str, Any] = typed(value, dict[str, Any])
    typed(config.get("steps", 0), int)
    return config


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object of a run; raises CheckpointError if it is missing or damaged."""
    try:
        value = read_json(path)
        check_numbers(value)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it is not a JSON object")
    return value
