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


class StopWish:
    """Whether somebody wants the run to stop: asked of this process, and heeded by all that train together."""

    def __init__(self) -> None:
        self.requested = self.heeded = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        logger.info("%s: stopping after this step and saving; once more stops at once", signal.Signals(number).name)


@contextmanager
def stop_wish() -> Iterator[StopWish]:
    """Listens for the signals within a ``with`` block; does nothing outside the main thread."""
    wish = StopWish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before = {number: signal.signal(number, wish._receive) for number in SIGNALS}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
