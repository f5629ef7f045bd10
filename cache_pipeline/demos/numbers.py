"""Reads actions, rewards, dones and low-dim obs, checks that they are finite, and computes their statistics.

Arrays are read in the child process of :mod:`cache_pipeline.isolation`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.demos.layouts.protocol import SourceFile
from cache_pipeline.demos.layouts.registry import layout_named
from cache_pipeline.errors import DatasetError
from cache_pipeline.hdf5 import READ_ERRORS, damage_as_error
from cache_pipeline.isolation import isolated, progress

BLOCK_BYTES = 4 << 20
"""Arrays of many demos are checked together, about this many bytes at once."""
LARGEST = 1e15
"""Largest value of an action or low-dim obs; sums of squares of larger values overflow in float32."""
UNIT_SLACK, OPPOSITE = 1e-2, -0.5
LOST_STEPS = 4
"""Variation is lost if float32 has fewer than this many steps within one standard deviation."""


class Finding(NamedTuple):
    """A problem of one array of one demo, as a sentence."""

    demo: str
    path: str
    sentence: str


class Statistics(NamedTuple):
    """Statistics of one array over all steps of all demos, without steps that are not finite; computed in float64.

    ``min``, ``max``, ``std`` are (D,), one value per dimension; ``beyond_one`` counts steps with a value beyond ±1.
    """

    min: NDArray[np.float64]
    max: NDArray[np.float64]
    std: NDArray[np.float64]
    beyond_one: int

    @property
    def lost_dims(self) -> list[int]:
        """Dimensions that vary less than float32 can hold at their size, such as 1e6 ± 1e-3."""
        largest = np.maximum(np.abs(self.min), np.abs(self.max)).astype(np.float32)
        return np.flatnonzero((self.std > 0) & (self.std < LOST_STEPS * np.spacing(largest))).tolist()


class NumbersReport(NamedTuple):
    """Findings of all arrays in the order of the demos, and path → statistics."""

    findings: tuple[Finding, ...]
    statistics: dict[str, Statistics]
    sign_flips: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Paths of quaternions, each with the demos in which they change their sign from one step to the next."""


def check_numbers(source: SourceFile, arrays: Sequence[tuple[str, Sequence[str]]]) -> NumbersReport:
    """Reads arrays of a dataset in the child process.

    Args:
        source: the dataset.
        arrays: (demo, paths such as ``actions`` or ``obs/<key>``), for arrays of numbers with an axis of steps.

    Raises:
        DatasetError: the file cannot be opened, or crashes HDF5.
    """
    with damage_as_error(source.path, "its actions and low-dim obs"):
        return isolated(_check_numbers, source, arrays)


def lost_variation(statistics: Mapping[str, Statistics]) -> Iterator[str]:
    """Yields one sentence per array whose variation is lost in float32, in which everything is trained."""
    for path, found in statistics.items():
        if lost := found.lost_dims:
            dim = lost[0]
            size, std = max(abs(found.min[dim]), abs(found.max[dim])), found.std[dim]
            yield (
                f"{path} varies by only {std:.2g} (standard deviation) at values up to {size:.6g} in dims "
                f"{', '.join(map(str, lost))}; float32 cannot hold this variation: subtract the offset in the dataset"
            )


def changes_sign(values: NDArray) -> bool:
    """Whether rows are unit quaternions (T, 4) of which one is almost the negative of the row before it.

    Both mean the same rotation, but to a policy they are far apart.
    """
    if values.dtype.kind != "f" or values.shape[1:] != (4,) or len(values) < 2:
        return False
    rows = values.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        unit = np.abs(np.linalg.norm(rows, axis=1) - 1) < UNIT_SLACK
        return bool(unit.all() and ((rows[1:] * rows[:-1]).sum(1) < OPPOSITE).any())


def as_float32(values: NDArray) -> NDArray[np.float32]:
    """Converts to float32; values beyond its range become infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float32)


def _check_numbers(source: SourceFile, arrays: Sequence[tuple[str, Sequence[str]]]) -> NumbersReport:
    checks: dict[str, _Check] = {}
    flips: dict[str, list[str]] = {}
    unreadable: list[Finding] = []
    layout = layout_named(source.layout)
    try:
        for demo, paths in arrays:
            progress()
            for name in paths:
                try:
                    values = layout.numbers(source, demo, name)
                except DatasetError:
                    raise
                except READ_ERRORS as error:
                    reason = " ".join(str(error).split())
                    unreadable.append(Finding(demo, name, f"{name} cannot be read, the file is damaged ({reason})"))
                    continue
                if values is not None:
                    if changes_sign(values):
                        flips.setdefault(name, []).append(demo)
                    checks.setdefault(name, _Check(name)).add(demo, values)
    finally:
        layout.close([source])
    findings = [*unreadable, *(finding for check in checks.values() for finding in check.finish())]
    order = {demo: number for number, (demo, _) in enumerate(arrays)}
    findings.sort(key=lambda finding: order[finding.demo])
    statistics = {name: found for name, check in checks.items() if (found := check.statistics()) is not None}
    return NumbersReport(tuple(findings), statistics, tuple((name, tuple(demos)) for name, demos in flips.items()))


class _Check:
    """Checks the arrays of one path, in blocks of many demos, and adds up their statistics."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._waiting: list[tuple[str, NDArray]] = []
        self._bytes = 0
        self._findings: list[Finding] = []
        self._moments: _Moments | None = None

    def add(self, demo: str, values: NDArray) -> None:
        if self._waiting and values.shape[1:] != self._waiting[0][1].shape[1:]:
            self._check_waiting()
        self._waiting.append((demo, values))
        self._bytes += values.nbytes
        if self._bytes >= BLOCK_BYTES:
            self._check_waiting()

    def finish(self) -> Iterable[Finding]:
        self._check_waiting()
        return self._findings

    def statistics(self) -> Statistics | None:
        return self._moments.statistics() if self._moments is not None and self._moments.count else None

    def _check_waiting(self) -> None:
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        if not waiting:
            return
        rows = np.concatenate([values.reshape(len(values), -1) for _, values in waiting])
        finite = (np.abs(as_float32(rows)) <= LARGEST).all(axis=1)
        if not finite.all():
            self._findings += [finding for demo, values in waiting for finding in self._unusable(demo, values)]
        if self._moments is None:
            self._moments = _Moments(rows.shape[1])
        if rows.shape[1] == self._moments.dim:
            self._moments.add(rows[finite].astype(np.float64))

    def _unusable(self, demo: str, values: NDArray) -> Iterator[Finding]:
        values = as_float32(values)
        bad = np.argwhere(~(np.abs(values) <= LARGEST))
        if len(bad):
            what = "not finite" if not np.isfinite(values[tuple(bad[0])]) else f"beyond ±{LARGEST:.0e}; rescale them"
            count = f"{len(np.unique(bad[:, 0]))} of {len(values)} frames are {what}"
            sentence = f"{self._path} is {values[tuple(bad[0])]} at frame {bad[0][0]} ({count})"
            yield Finding(demo, self._path, sentence)


class _Moments:
    """Running minimum, maximum and variance of rows (n, dim), added up around the first row to keep small ones."""

    def __init__(self, dim: int) -> None:
        self.dim, self.count = dim, 0
        self._low, self._high = np.full(dim, np.inf), np.full(dim, -np.inf)
        self._origin = np.zeros(dim)
        self._sum, self._squares = np.zeros(dim), np.zeros(dim)
        self._beyond_one = 0

    def add(self, rows: NDArray[np.float64]) -> None:
        if not len(rows) or not self.dim:
            return
        if not self.count:
            self._origin = rows[0].copy()
        self.count += len(rows)
        self._low, self._high = np.minimum(self._low, rows.min(axis=0)), np.maximum(self._high, rows.max(axis=0))
        offsets = rows - self._origin
        self._sum += offsets.sum(axis=0)
        self._squares += (offsets**2).sum(axis=0)
        self._beyond_one += int((np.abs(rows) > 1).any(axis=1).sum())

    def statistics(self) -> Statistics:
        variance = np.maximum(self._squares / self.count - (self._sum / self.count) ** 2, 0)
        return Statistics(self._low, self._high, np.sqrt(variance), self._beyond_one)
