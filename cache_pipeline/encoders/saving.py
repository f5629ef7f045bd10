"""Saves encoders to disk and loads them without the original weights file or download.

The file holds data only: weights, and the spec as metadata. Nothing in it is executed. A custom encoder is built by a
factory that the user names, if the factory's source and structure equal the saved ones. The saved weights replace those
that the factory loads.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cache_pipeline.encoders.factory import Factories, choose_factory, named_factories
from cache_pipeline.encoders.image_encoder import EncoderSpec, ImageEncoder, build_encoder, load_saved
from cache_pipeline.encoders.resnet import get_resnet
from cache_pipeline.errors import EncoderError
from cache_pipeline.files import atomic_path


def save_encoder(encoder: ImageEncoder, path: str | Path) -> None:
    """Writes all weights of an encoder as safetensors, atomically.

    The metadata hold its spec, and for a custom module the digest of its structure.
    """
    state = {name: value.detach().contiguous() for name, value in encoder.state_dict().items()}
    saved = {"spec": None if encoder.spec is None else encoder.spec.to_json(), "source": encoder.source}
    structure = encoder.structure()
    if structure is not None:
        saved["structure"] = structure
    # One metadata key, because safetensors writes several in random order and equal encoders must give equal bytes.
    with atomic_path(path) as partial:
        save_tensors(state, partial, {"encoder": json.dumps(saved)})


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes tensors as safetensors; raises OSError if writing fails, as on a full disk."""
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise OSError(f"{path}: {error}") from error
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def saved_spec(path: str | Path) -> EncoderSpec | None:
    """Returns the spec in a file of ``save_encoder``, or ``None`` for a module without factory. Executes nothing.

    Raises:
        EncoderError: the file is missing or damaged.
    """
    return _spec_of(_read_metadata(path), path)


def load_encoder(
    spec: EncoderSpec | Mapping[str, Any] | None,
    path: str | Path,
    encoder: Factories = None,
    structure: str | None = None,
) -> ImageEncoder:
    """Loads an encoder from a file of ``save_encoder``.

    Args:
        spec: the caller's own spec or its JSON; its factory runs. ``None``: the spec in the file; its factory does not
            run.
        path: the file.
        encoder: the factories that the user names; one of them builds a saved custom encoder.
        structure: expected digest of the structure, for files without one.

    Raises:
        EncoderError: the file is missing, damaged or does not fit; a factory is needed and not named; or the named
            factory differs from the saved one.
    """
    saved = _read_metadata(path)
    if spec is None:
        stored = _spec_of(saved, path)
        if stored is None or stored.factory is not None:
            factory = choose_factory(None if stored is None else stored.factory, encoder, path)
            spec = EncoderSpec(factory=factory)
        else:
            spec = stored
    made = _structure(spec if isinstance(spec, EncoderSpec) else EncoderSpec.from_json(spec))
    _check_structure(made, saved.get("structure") or structure, path)
    made.source = saved.get("source", made.source)
    load_saved(made, path)
    return made.eval()


def load_encoders(
    files: Mapping[str, Path], encoder: Factories = None, structures: Mapping[str, str] | None = None
) -> dict[str, ImageEncoder]:
    """Loads camera → encoder; cameras with the same file share one module.

    Args:
        files: camera → file of ``save_encoder``.
        encoder: as in ``load_encoder``.
        structures: camera → expected digest of the structure, for files without one.

    Raises:
        EncoderError: as ``load_encoder``; or factories are named but no encoder is a custom one.
    """
    loaded: dict[Path, ImageEncoder] = {}
    for camera, file in files.items():
        if file not in loaded:
            loaded[file] = load_encoder(None, file, encoder, (structures or {}).get(camera))
    named = named_factories(encoder)
    if named and all(made.is_resnet for made in loaded.values()):
        file, made = next(iter(loaded.items()))
        raise EncoderError(f"--encoder {named[0]} has no effect: {file} holds a {made.architecture}; leave it out")
    return {camera: loaded[file] for camera, file in files.items()}


def _read_metadata(path: str | Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            value = json.loads((file.metadata() or {}).get("encoder", "{}"))
    except (OSError, ValueError, SafetensorError, RecursionError) as error:
        raise EncoderError(f"cannot read the encoder's weights from {path} ({error})") from error
    if not isinstance(value, dict):
        raise EncoderError(f"cannot read the encoder's weights from {path} (its metadata are not a JSON object)")
    return value


def _spec_of(saved: Mapping[str, Any], path: str | Path) -> EncoderSpec | None:
    value = saved.get("spec")
    try:
        spec = None if value is None else EncoderSpec.from_json(value)
    except (TypeError, AttributeError) as error:
        raise EncoderError(f"{path} names an encoder that this version does not support ({error})") from error
    if spec is not None and spec.factory is not None and not isinstance(spec.factory, str):
        raise EncoderError(f"{path} names an encoder that this version does not support ({spec.factory!r})")
    return spec


def _check_structure(made: ImageEncoder, recorded: str | None, path: str | Path) -> None:
    now = made.structure()
    if recorded is not None and now is not None and recorded != now:
        raise EncoderError(
            f"{made.source} is not the encoder that {path} was saved from: its source or structure has changed (digest "
            f"{recorded[:12]} then, {now[:12]} now); restore the factory's file, or extract and train "
            f"again with this one"
        )


def _structure(spec: EncoderSpec) -> ImageEncoder:
    if spec.factory is not None:
        return build_encoder(spec)
    with torch.random.fork_rng(devices=[]):
        net = get_resnet(spec.rgb_model_name, use_group_norm=spec.use_group_norm)
    return ImageEncoder(net, spec.cut, source=spec.source, spec=spec)
