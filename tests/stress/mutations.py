"""Random changes of files and values, for the tests of this folder."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

ODD: list[Any] = [None, "x", "", -1, 0, 1.5, 1e308, math.nan, math.inf, [], {}, [[]], [None], True, "\0", "é😀", 10**30]
ODD += [{"a": 1}, ["x"], -(10**20), "..", "/etc", 1 + 2j, b"\xff"]


def change_bytes(path: Path, rng: random.Random) -> str:
    """Flips, removes or inserts a few bytes, most often near the start, where HDF5 keeps its structure."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 3, 10, 30])):
        at = rng.randrange(min(len(data), 4096) if rng.random() < 0.5 else len(data))
        kind = rng.choice("fffrdi")
        if kind == "f":
            data[at] = rng.choice([0, 1, 255, rng.randrange(256)])
        elif kind == "r":
            size = rng.choice([2, 8, 64])
            data[at : at + size] = rng.randbytes(len(data[at : at + size]))
        elif kind == "d":
            del data[at : at + rng.choice([1, 20, 500])]
        else:
            data[at:at] = rng.randbytes(rng.choice([1, 8]))
        data = data or bytearray(b"x")
    path.write_bytes(bytes(data))
    return "bytes"


def change_json(path: Path, rng: random.Random) -> str:
    """Replaces or removes one value of a JSON file."""
    value = json.loads(path.read_text())
    place = rng.choice([place for place in _places(value) if place])
    holder = value
    for key in place[:-1]:
        holder = holder[key]
    if rng.random() < 0.25 and isinstance(holder, dict):
        del holder[place[-1]]
        said = f"without {place}"
    else:
        odd = rng.choice([item for item in ODD if not isinstance(item, complex | bytes)])
        holder[place[-1]] = odd
        said = f"{place} = {odd!r}"
    path.write_text(json.dumps(value))
    return said


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value[:6]) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*place, key))


def change_structure(path: Path, rng: random.Random) -> str:
    """Removes, renames or replaces one object of an HDF5 file, or changes an attribute."""
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        name = rng.choice(names)
        kind = rng.choice(["remove", "rename", "replace", "replace", "attribute", "link", "group"])
        if kind == "attribute":
            holder = rng.choice([file["data"], *(file[f"data/{demo}"] for demo in file["data"])])
            key, odd = rng.choice(["num_samples", "total", "env_args", "render_flags", "odd"]), rng.choice(ODD)
            try:
                holder.attrs[key] = odd if not isinstance(odd, dict | list) else json.dumps(odd)
            except (TypeError, ValueError, OSError):
                holder.attrs[key] = json.dumps({"a": math.nan})
            return f"{holder.name}.{key} = {odd!r}"
        if kind == "rename":  # HDF5 takes ".." as a name like any other
            file.move(name, rng.choice([f"{name}.odd", "zarr.json", "data/..", f"{name}é", "x" * 300]))
            return f"rename {name}"
        del file[name]
        if kind == "link":
            file[name] = rng.choice(
                [h5py.SoftLink("/nowhere"), h5py.ExternalLink("gone.hdf5", "/x"), h5py.SoftLink(f"/{name}")]
            )
        elif kind == "group":
            file.create_group(name)
        elif kind == "replace":
            file[name] = _odd_array(rng)
        return f"{kind} {name}"


def _odd_array(rng: random.Random) -> Any:
    shape = tuple(rng.choice([0, 1, 3, 6, 7]) for _ in range(rng.choice([0, 1, 2, 2, 3, 4, 5])))
    kind = rng.choice(["f8", "f4", "f2", "u1", "i8", "b1", "c16", "S3", "text", "struct"])
    values = np.random.default_rng(rng.randrange(2**32)).normal(size=shape) * 10.0 ** rng.choice([-300, 0, 0, 20, 300])
    if kind == "text":
        return rng.choice(["text", np.array([b"x"] * 3), h5py.Empty("f4")])
    if kind == "struct":
        return np.zeros(shape, [("a", "f4"), ("b", "i2")])
    if rng.random() < 0.2 and values.size:
        values.flat[0] = rng.choice([math.nan, math.inf])
    with np.errstate(all="ignore"):
        return values.astype(kind)
