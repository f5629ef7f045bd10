"""Finds the files that hold an HDF5 dataset's bytes: external links, virtual datasets and external storage.

HDF5 silently reads zeros from a virtual dataset whose source is missing; this module reports it.
"""

from __future__ import annotations

import importlib
import math
import os
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np

# Filter numbers registered with the HDF Group, for files that do not store the name of a filter.
FILTER_NAMES = {
    307: "bzip2",
    32000: "lzf",
    32001: "blosc",
    32004: "lz4",
    32008: "bitshuffle",
    32013: "zfp",
    32015: "zstd",
    32017: "sz",
    32024: "sz3",
    32026: "blosc2",
}
PLUGINS = "hdf5plugin"


def other_filters(plist: h5py.h5p.PropDCID) -> dict[int, str]:
    """Returns number → name of a dataset's filters, without the filters built into HDF5."""
    names = {}
    for code, _, _, name in map(plist.get_filter, range(plist.get_nfilters())):
        if code >= h5py.h5z.FILTER_RESERVED:
            names[code] = FILTER_NAMES.get(code) or name.decode(errors="replace").split(";")[0] or f"number {code}"
    return names


def missing_filter(plist: h5py.h5p.PropDCID) -> str | None:
    """Returns the name of the first filter of a dataset that neither HDF5 nor the package hdf5plugin provides.

    Imports hdf5plugin if a filter is missing; the import registers its filters in this process.
    """
    for code, name in other_filters(plist).items():
        if not h5py.h5z.filter_avail(code):
            with suppress(ImportError):
                importlib.import_module(PLUGINS)
            if not h5py.h5z.filter_avail(code):
                return name
    return None


def is_written(item: h5py.h5d.DatasetID, plist: h5py.h5p.PropDCID, shape: tuple[int, ...]) -> bool:
    """Whether the file holds all bytes of a dataset; always true for a virtual dataset, whose bytes are elsewhere."""
    layout = plist.get_layout()
    if layout == h5py.h5d.VIRTUAL or plist.get_external_count():
        return True
    if layout != h5py.h5d.CHUNKED:
        return bool(item.get_storage_size() == math.prod(shape) * item.get_type().get_size())
    return bool(item.get_num_chunks() == math.prod(-(-n // c) for n, c in zip(shape, plist.get_chunk(), strict=True)))


def broken_link(group: h5py.Group, name: str) -> str | None:
    """Describes the broken link of an item that could not be opened; ``None`` if it is not a link."""
    if not group.id.links.exists(name.encode()):
        return None
    kind, value = group.id.links.get_info(name.encode()).type, group.id.links.get_val(name.encode())
    if kind == h5py.h5l.TYPE_SOFT:
        folder, _, key = value.decode().rpartition("/")
        parent = group.get(folder or "/") if "/" in value.decode() else group
        further = broken_link(parent, key) if isinstance(parent, h5py.Group) else None
        return further or f"is a link to {value.decode()}, which does not exist"
    if kind != h5py.h5l.TYPE_EXTERNAL:
        return None
    file, path = _beside(_file_of(group.id), os.fsdecode(value[0])), value[1].decode()
    if not file.is_file():
        return f"is a link into {file}, which is missing: put the file back, or copy the data into one file"
    return f"is a link to {path} in {file}, which cannot be opened there"


class SourceFiles:
    """Collects the files that hold the data of a file's items.

    Attributes:
        found: all files, including the file itself.
    """

    def __init__(self) -> None:
        self.found: dict[Path, None] = {}
        self._holders: dict[bytes, Path] = {}
        self._looked: dict[tuple[Path, str], str | None] = {}

    def add(self, item: h5py.h5g.GroupID | h5py.h5d.DatasetID) -> Path:
        """Adds the file that holds an item, and returns it."""
        name = h5py.h5f.get_name(item)
        if name not in self._holders:
            self._holders[name] = _file_of(item)
            self.found[self._holders[name]] = None
        return self._holders[name]

    def add_dataset(self, item: h5py.h5d.DatasetID, plist: h5py.h5p.PropDCID) -> str:
        """Adds the files of a dataset; returns why it cannot be read, or an empty string."""
        holder = self.add(item)
        missing = missing_filter(plist) if plist.get_nfilters() else None
        if missing is not None:
            return f"is compressed with {missing}, an HDF5 filter that is not installed here: pip install {PLUGINS}"
        for name, *_ in map(plist.get_external, range(plist.get_external_count())):
            raw = Path(os.fsdecode(name))
            raw = raw if raw.is_file() else holder.parent / raw
            if not raw.is_file():
                return f"is stored in {raw}, which is missing: put the file back"
            self.found[raw.absolute()] = None
        return self._add_virtual(h5py.Dataset(item), holder) if plist.get_layout() == h5py.h5d.VIRTUAL else ""

    def _add_virtual(self, item: h5py.Dataset, holder: Path) -> str:
        covered = 0
        for source in item.virtual_sources():
            for file in _named_files(holder, source.file_name):
                key = (file, source.dset_name)
                if key not in self._looked:
                    self._looked[key] = self._look(*key)
                if self._looked[key]:
                    return f"is a virtual dataset: its source {self._looked[key]}"
            covered += source.vspace.get_select_npoints()
        total = int(np.prod(item.shape, dtype=object))
        if covered < total and None not in item.maxshape:
            return f"is a virtual dataset whose sources hold {covered} of its {total} numbers: write it again"
        return ""

    def _look(self, file: Path, name: str) -> str | None:
        """Returns the problem of one source of a virtual dataset, or ``None``."""
        if not file.is_file():
            return f"{file} is missing: put the file back, or copy the data into one file"
        try:
            with h5py.File(file, "r") as opened:
                item = opened.get(name)
                if not isinstance(item, h5py.Dataset):
                    return f"{file} has no dataset {name}"
                plist = item.id.get_create_plist()
                trouble = self.add_dataset(item.id, plist)
                if not trouble and not is_written(item.id, plist, item.shape or ()):
                    trouble = "is incomplete"
                return f"{file}: {name} {trouble}" if trouble else None
        except OSError as error:
            return f"{file} cannot be opened ({' '.join(str(error).split())})"


def _file_of(item: h5py.h5g.GroupID | h5py.h5d.DatasetID) -> Path:
    name = h5py.h5f.get_name(item)
    return Path(os.fsdecode(name)).absolute()


def _beside(holder: Path, name: str) -> Path:
    """Resolves a file name stored in ``holder``: first in its folder, as HDF5 does, then in the working folder."""
    beside = holder.parent / name
    return beside if beside.is_file() or not Path(name).is_file() else Path(name).absolute()


def _named_files(holder: Path, name: str) -> list[Path]:
    """Returns the files of a source of a virtual dataset; ``%b`` in a name stands for a number."""
    if name == ".":
        return [holder]
    if "%b" in name:
        return sorted(holder.parent.glob(name.replace("%b", "*")))
    return [_beside(holder, name)]
