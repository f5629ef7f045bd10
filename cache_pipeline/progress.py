"""Progress reports on stderr: a bar with rate and ETA on a terminal, otherwise a log line every 30 s."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from cache_pipeline.text import printable, shortened

LOG_EVERY_S = 30.0

logger = logging.getLogger("cache_pipeline")


class Progress:
    """Counts work of ``total`` items named ``unit`` under ``label``; use as a context manager.

    Args:
        label: name of the work, such as ``encode``.
        total: number of items.
        unit: plural noun of an item, such as ``images``.
        done: items finished by an earlier process.
        stream: output stream; default: stderr.
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0, stream: TextIO | None = None) -> None:
        self._label, self._unit, self._total = printable(shortened(label)), unit, total
        self._stream = stream if stream is not None else sys.stderr
        self._done = self._initial = done
        self._started = self._logged = time.monotonic()
        self._notes: dict[str, Any] = {}
        self._bar: Any = None
        if self._stream is not None and self._stream.isatty():
            self._bar = tqdm(
                total=total,
                initial=done,
                desc=self._label,
                unit=f" {unit}",
                file=self._stream,
                dynamic_ncols=True,
                leave=True,
            )

    def advance(self, count: int = 1, **notes: object) -> None:
        """Adds ``count`` finished items; ``notes`` (such as ``loss="0.12"``) are shown beside the rate."""
        self._done += count
        self._notes.update(notes)
        if self._bar is not None:
            if notes:
                self._bar.set_postfix(self._notes, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._logged >= LOG_EVERY_S:
            self._logged = time.monotonic()
            logger.info("%s", self._line())

    def _line(self) -> str:
        rate = (self._done - self._initial) / max(time.monotonic() - self._started, 1e-9)
        left = (self._total - self._done) / rate if rate > 0 else float("inf")
        notes = "".join(f", {name} {value}" for name, value in self._notes.items())
        return f"{self._label}: {self._done}/{self._total} {self._unit}, {rate:.3g}/s, {left:.0f} s left{notes}"

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
