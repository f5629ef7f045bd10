"""Reads the tensors of weights files. Nothing that a file names is imported or executed.

A file may hold a state dict, a training checkpoint with networks, optimiser and configs, or a whole pickled module.
"""

from __future__ import annotations

import builtins
import pickle
import struct
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cache_pipeline.errors import EncoderError, first_line
from cache_pipeline.text import listed

# Names that wrappers of a network, and a pickled module, add between those of its layers.
WRAPPERS = {"_modules", "_parameters", "_buffers", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
UNREADABLE = (
    *(OSError, EOFError, RuntimeError, MemoryError, AssertionError, pickle.UnpicklingError, SafetensorError),
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, struct.error),  # of damaged pickles
)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads all tensors of a safetensors file, or of a torch file with ``weights_only``, by their dotted names.

    The content decides about the format. An object of a class that torch does not read is replaced by a mapping of its
    items and attributes.

    Raises:
        EncoderError: the file is missing, has another format, has no tensors, or asks to run a function of Python.
    """
    path = Path(path)
    if not path.is_file():
        what = f"{path} is a folder" if path.is_dir() else f"there is no weights file {path}"
        raise EncoderError(f"{what}; give a .pth or .safetensors file with --weights FILE")
    try:
        with path.open("rb") as file:
            is_safetensors = file.read(9)[8:] == b"{"
        value = load_file(path) if is_safetensors else _read_torch(path)
    except UNREADABLE as error:
        raise EncoderError(
            f"cannot read weights from {path} ({first_line(error)}); "
            f"give a plain state dict saved with torch.save or as .safetensors"
        ) from error
    tensors = _tensors(value)
    if not tensors:
        keys = (listed(value, limit=8) or "nothing") if isinstance(value, Mapping) else f"a {type(value).__name__}"
        raise EncoderError(f"{path} holds no state dict but {keys}; save model.state_dict() and give that file")
    return tensors


class _Record:
    """Replaces a class that torch does not read: its objects become mappings."""

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict()


class _Ignored:
    """Replaces the classes and functions of NumPy: their results stay empty."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _read_torch(path: Path) -> Any:
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # the format before torch 1.6, or TorchScript
        unknown = []
    refused = sorted(name for name in unknown if _runs_code(name))
    if refused:
        raise pickle.UnpicklingError(f"it asks to run {listed(refused)}, and nothing in a file is executed")
    stand_ins: list[Any] = [(_Ignored if name.startswith("numpy.") else _Record, name) for name in unknown]
    with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings(action="ignore"):
        return torch.load(path, map_location="cpu", weights_only=True)


def _runs_code(name: str) -> bool:
    """Whether a name is a function of Python or of the operating system, which only code that does harm asks for."""
    module, _, function = name.partition(".")
    return module in ("os", "posix", "nt", "sys") or (
        module == "builtins" and not isinstance(getattr(builtins, function, int), type)
    )


def _tensors(value: Any) -> dict[str, Tensor]:
    """Returns every tensor in nested mappings, lists and attributes by its dotted name, in their order."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("", value)]
    while stack:
        name, item = stack.pop()
        if isinstance(item, Tensor):
            if item.layout is torch.strided and not item.is_meta:
                found.setdefault(name, item.detach().dequantize() if item.is_quantized else item.detach())
        elif isinstance(item, Mapping | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            inner = [*(item.items() if isinstance(item, Mapping) else enumerate(item)), *_attributes(item)]
            stack += [(dotted(name, key), part) for key, part in reversed(inner)]
    return found


def _attributes(value: Any) -> list[tuple[str, Any]]:
    return list(vars(value).items()) if type(value) is OrderedDict else []


def dotted(*names: object) -> str:
    """Joins names by dots, without those of ``WRAPPERS``."""
    return ".".join(part for name in names for part in str(name).split(".") if part and part not in WRAPPERS)
