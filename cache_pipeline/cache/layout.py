"""Row layout of a cache: a pure function of the kept demos, the new demos and the shard size.

Demos are laid one after another. A run that adds demos starts at the next shard boundary, so that a finished shard is
never written again. Rows of removed demos stay dead until the cache is compacted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

TARGET_SHARD_BYTES = 32 << 20
TARGET_CHUNK_BYTES = 256 << 10
MAX_SHARD_ROWS = 1024
MIN_SHARD_ROWS = 64
MIN_CHUNK_ROWS = 4


class Unit(NamedTuple):
    """One shard of one array, or of actions, rewards and dones together. It is written whole, then recorded.

    Each low-dim key is a unit of its own, so that a cache that gets another key keeps every finished shard.

    Attributes:
        kind: ``features``, ``frames`` (the frame digests of a camera), ``steps`` (actions, rewards and dones),
            ``low_dim``, or ``rows`` (steps and all low-dim keys in one: only in caches of earlier versions).
        key: rgb obs key or low-dim key, empty for ``steps`` and ``rows``.
        view: number of the fixed augmentation; always 0 unless kind is ``features``.
        block: rows ``[block * shard_rows, (block + 1) * shard_rows)``.
    """

    kind: str
    key: str
    view: int
    block: int

    @property
    def name(self) -> str:
        """The name in the ledger and in messages, such as ``features/agentview_image/0/12``."""
        parts = [self.key] if self.key else []
        if self.kind == "features":
            parts.append(str(self.view))
        return "/".join((self.kind, *parts, str(self.block)))

    @classmethod
    def parse(cls, name: str) -> Unit:
        """Parses a :attr:`name`; raises ValueError for any other text."""
        kind, *parts = name.split("/")
        if kind in ("steps", "rows") and len(parts) == 1:
            return cls(kind, "", 0, int(parts[0]))
        if kind in ("frames", "low_dim") and len(parts) >= 2:
            return cls(kind, "/".join(parts[:-1]), 0, int(parts[-1]))
        if kind == "features" and len(parts) >= 3:
            return cls(kind, "/".join(parts[:-2]), int(parts[-2]), int(parts[-1]))
        raise ValueError(f"{name!r} is not the name of a unit")


class Segment(NamedTuple):
    """Consecutive frames of one demo inside one block.

    Attributes:
        demo: index into the demo table.
        start, stop: rows of the cache.
        offset: index within the demo of the frame at ``start``.
    """

    demo: int
    start: int
    stop: int
    offset: int


class Placement(NamedTuple):
    """First row of each demo, and the number of rows of every array."""

    rows: tuple[int, ...]
    n_rows: int


def align_up(row: int, shard_rows: int) -> int:
    """Returns the first shard boundary at or after ``row``."""
    return -(-row // shard_rows) * shard_rows


def place_demos(lengths: Sequence[int], kept: Sequence[int | None], end: int, shard_rows: int) -> Placement:
    """Assigns rows to each demo.

    Args:
        lengths: frames of each demo, in table order.
        kept: the row at which a demo already lies, or None for a demo to be appended.
        end: rows of the arrays so far, dead ones included.
        shard_rows: rows of a shard.
    """
    cursor, rows = align_up(end, shard_rows), []
    n_rows = end
    for length, row in zip(lengths, kept, strict=True):
        if row is None:
            row, cursor = cursor, cursor + length
            n_rows = cursor
        rows.append(row)
    return Placement(tuple(rows), n_rows)


def block_segments(rows: Sequence[int], lengths: Sequence[int], shard_rows: int) -> dict[int, tuple[Segment, ...]]:
    """Returns the live segments of each block that has live rows, in ascending order of rows."""
    blocks: dict[int, list[Segment]] = {}
    for demo in sorted(range(len(rows)), key=rows.__getitem__):
        first, last = rows[demo], rows[demo] + lengths[demo]
        for block in range(first // shard_rows, -(-last // shard_rows)):
            start = max(first, block * shard_rows)
            stop = min(last, (block + 1) * shard_rows)
            blocks.setdefault(block, []).append(Segment(demo, start, stop, start - first))
    return {block: tuple(blocks[block]) for block in sorted(blocks)}


def choose_shard_rows(row_bytes: int) -> int:
    """Returns the rows of a shard, a power of two: about 32 MB, at most 1024 rows so that a kill loses little work.

    Args:
        row_bytes: stored bytes of one row of the widest camera.
    """
    rows = MAX_SHARD_ROWS
    while rows > MIN_SHARD_ROWS and rows * row_bytes > TARGET_SHARD_BYTES:
        rows //= 2
    return rows


def choose_chunk_rows(row_bytes: int, shard_rows: int) -> int:
    """Returns the rows of a chunk, a divisor of ``shard_rows``: about 256 kB, the least that one read transfers.

    Args:
        row_bytes: stored bytes of one row of this array.
        shard_rows: rows of its shard.
    """
    rows = shard_rows
    while rows > MIN_CHUNK_ROWS and rows % 2 == 0 and rows * row_bytes > TARGET_CHUNK_BYTES:
        rows //= 2
    return rows
