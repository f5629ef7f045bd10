"""SIGINT and SIGTERM as a wish to stop after the step at hand."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger("cache_pipeline")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AT_ONCE = 3


class StopWish:
    """Whether somebody wants the run to stop: asked of this process, and heeded by all that train together.

    Saving takes a while, and a process may get the same wish twice: from the terminal and from what started it. So one
    more signal changes nothing. Only in a process that trains alone a third one ends the step at hand; a save is never
    cut off.

    Args:
        alone: whether this process trains alone.
    """

    def __init__(self, *, alone: bool) -> None:
        self.heeded = False
        self._alone, self._received = alone, 0

    @property
    def requested(self) -> bool:
        """Whether this process has received a signal."""
        return self._received > 0

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received += 1
        if self._received == 1:
            again = "; a third signal stops at once" if self._alone else ""
            logger.info("%s: stopping after this step and saving%s", signal.Signals(number).name, again)
        elif self._received >= AT_ONCE and self._alone and not self.heeded:
            raise KeyboardInterrupt


@contextmanager
def stop_wish(*, alone: bool) -> Iterator[StopWish]:
    """Listens for the signals within a ``with`` block; does nothing outside the main thread."""
    wish = StopWish(alone=alone)
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before = {number: signal.signal(number, wish._receive) for number in SIGNALS}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
