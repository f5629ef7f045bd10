"""The demo table of a cache, as rows or as columns.

A cache with many demos keeps its table in columns, in an ``.npz`` file beside the manifest: it opens in a tenth of the
time and memory of as much JSON. Both forms are sequences of :class:`DemoRows`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.files import DIGEST_BYTES


class DemoRows(NamedTuple):
    """One row of the demo table.

    Attributes:
        file: index into ``Manifest.files``.
        name: its name in that file.
        length: frames.
        row: first row in every array of the cache.
        digests: camera → digest of its frames, and ``rows`` → digest of its low-dim obs and actions.
        view_key: seed of its view parameters: its first name, kept when it is renamed.
        task: its task in words, if the dataset says it.
    """

    file: int
    name: str
    length: int
    row: int
    digests: dict[str, str]
    view_key: str
    task: str | None = None


class DemoTable(Sequence[DemoRows]):
    """A demo table in columns.

    Args:
        columns: ``files``, ``length`` and ``row``, one integer per demo; ``names`` and ``view_keys``, the UTF-8 bytes
            of all demos, with ``names_ends`` and ``view_keys_ends``, where each demo's end; the same of ``tasks`` if a
            demo has one; ``digests/KEY``, (E, 16) bytes, zeros for a demo without it.

    Raises:
        ValueError: a column is missing or has another length or type.
    """

    def __init__(self, columns: Mapping[str, NDArray[Any]]) -> None:
        self.columns = dict(columns)
        count = len(self.columns.get("files", ()))
        texts = ("names", "view_keys", *(("tasks",) if "tasks" in self.columns else ()))
        for name in ("files", "length", "row", *(f"{name}_ends" for name in texts)):
            column = self.columns.get(name)
            if column is None or column.shape != (count,) or column.dtype.kind != "i":
                raise ValueError(f"the demo table has no column {name} of {count} numbers")
        for name in texts:
            text, ends = self.columns.get(name), self.columns[f"{name}_ends"]
            if text is None or text.dtype != np.uint8 or (np.diff(ends, prepend=0) < 0).any():
                raise ValueError(f"the demo table has no text column {name}")
            if count and int(ends[-1]) != len(text):
                raise ValueError(f"the text of the column {name} has another length than its ends say")
        for name, column in self.columns.items():
            if name.startswith("digests/") and (column.shape != (count, DIGEST_BYTES) or column.dtype != np.uint8):
                raise ValueError(f"the column {name} of the demo table is not (demos, {DIGEST_BYTES}) bytes")

    @classmethod
    def of(cls, demos: Sequence[DemoRows]) -> DemoTable:
        """Returns the columns of a demo table."""
        if isinstance(demos, DemoTable):
            return demos
        columns: dict[str, NDArray[Any]] = {
            name: np.array([demo[place] for demo in demos], np.int64)
            for name, place in (("files", 0), ("length", 2), ("row", 3))
        }
        tasks = [("tasks", 6)] if any(demo.task is not None for demo in demos) else []
        for name, place in (("names", 1), ("view_keys", 5), *tasks):
            texts = [str(demo[place] or "").encode("utf-8", "surrogatepass") for demo in demos]
            columns[name] = np.frombuffer(b"".join(texts), np.uint8)
            columns[f"{name}_ends"] = np.cumsum([len(text) for text in texts], dtype=np.int64)
        none = "00" * DIGEST_BYTES
        for key in dict.fromkeys(key for demo in demos for key in demo.digests):
            joined = "".join(demo.digests.get(key, none) for demo in demos)
            columns[f"digests/{key}"] = np.frombuffer(bytes.fromhex(joined), np.uint8).reshape(-1, DIGEST_BYTES)
        return cls(columns)

    @classmethod
    def from_bytes(cls, data: bytes) -> DemoTable:
        """Reads the value of :meth:`to_bytes`; raises ValueError for any other bytes."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                return cls({name: archive[name] for name in archive.files})
        except (OSError, EOFError, KeyError, NotImplementedError, ImportError) as error:
            raise ValueError(f"it is not an .npz file of columns ({error})") from error

    def to_bytes(self) -> bytes:
        """Returns the columns as an ``.npz`` file; equal tables give equal bytes."""
        out = io.BytesIO()
        np.savez(out, **self.columns)
        return out.getvalue()

    @cached_property
    def names(self) -> list[str]:
        """The name of each demo."""
        return self._texts("names")

    @cached_property
    def _view_keys(self) -> list[str]:
        return self._texts("view_keys")

    @cached_property
    def tasks(self) -> list[str | None]:
        """The task of each demo in words, or None."""
        return [text or None for text in self._texts("tasks")] if "tasks" in self.columns else [None] * len(self)

    @cached_property
    def _digests(self) -> dict[str, NDArray[np.uint8]]:
        start = len("digests/")
        return {name[start:]: column for name, column in self.columns.items() if name.startswith("digests/")}

    def _texts(self, name: str) -> list[str]:
        whole, ends = self.columns[name].tobytes(), self.columns[f"{name}_ends"].tolist()
        return [whole[a:b].decode("utf-8", "surrogatepass") for a, b in pairwise([0, *ends])]

    def __len__(self) -> int:
        return len(self.columns["files"])

    @overload
    def __getitem__(self, number: int) -> DemoRows: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[DemoRows]: ...

    def __getitem__(self, number: int | slice) -> DemoRows | Sequence[DemoRows]:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        file, length, row = (int(self.columns[name][number]) for name in ("files", "length", "row"))
        digests = {key: column[number].tobytes().hex() for key, column in self._digests.items()}
        digests = {key: value for key, value in digests.items() if value.strip("0")}
        return DemoRows(file, self.names[number], length, row, digests, self._view_keys[number], self.tasks[number])

    def __iter__(self) -> Iterator[DemoRows]:
        plain = [self.columns[name].tolist() for name in ("files", "length", "row")]
        hexes = {key: column.tobytes().hex() for key, column in self._digests.items()}
        size = 2 * DIGEST_BYTES
        for n, (file, name, length, row, view_key, task) in enumerate(
            zip(plain[0], self.names, plain[1], plain[2], self._view_keys, self.tasks, strict=True)
        ):
            digests = {key: text[n * size : (n + 1) * size] for key, text in hexes.items()}
            digests = {key: value for key, value in digests.items() if value.strip("0")}
            yield DemoRows(file, name, length, row, digests, view_key, task)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, DemoTable) and self.columns.keys() == other.columns.keys():
            return all(np.array_equal(column, other.columns[name]) for name, column in self.columns.items())
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


def first_rows(demos: Sequence[DemoRows]) -> NDArray[np.int64]:
    """Returns (E,) the first row of each demo."""
    return demos.columns["row"] if isinstance(demos, DemoTable) else np.array([demo.row for demo in demos], np.int64)


def lengths(demos: Sequence[DemoRows]) -> NDArray[np.int64]:
    """Returns (E,) the frames of each demo."""
    if isinstance(demos, DemoTable):
        return demos.columns["length"]
    return np.array([demo.length for demo in demos], np.int64)


def demo_files(demos: Sequence[DemoRows]) -> NDArray[np.int64]:
    """Returns (E,) the number of each demo's file."""
    return demos.columns["files"] if isinstance(demos, DemoTable) else np.array([demo.file for demo in demos], np.int64)


def names(demos: Sequence[DemoRows]) -> list[str]:
    """Returns the name of each demo."""
    return demos.names if isinstance(demos, DemoTable) else [demo.name for demo in demos]


def tasks(demos: Sequence[DemoRows]) -> list[str | None]:
    """Returns the task of each demo in words, or None."""
    return demos.tasks if isinstance(demos, DemoTable) else [demo.task for demo in demos]


def joined_spans(demos: Sequence[DemoRows]) -> list[tuple[int, int]]:
    """Returns the rows of all demos in table order as (start, stop), adjacent ones joined."""
    starts, counts = first_rows(demos), lengths(demos)
    starts, stops = starts[counts > 0], (starts + counts)[counts > 0]
    if not len(starts):
        return []
    breaks = np.flatnonzero(starts[1:] != stops[:-1])
    firsts, lasts = starts[np.r_[0, breaks + 1]], stops[np.r_[breaks, len(stops) - 1]]
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))
