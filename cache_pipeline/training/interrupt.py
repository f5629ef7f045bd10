"""Handles SIGINT and SIGTERM: training stops after the current step."""

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
    """Records stop signals of this process; training stops once the processes of the run have exchanged them.

    A process may receive the signal twice, from the terminal and from its launcher, so the second signal has no effect.
    In a process that trains alone, the third signal aborts the current step. Once saving has begun, signals have no
    effect.

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
    """Handles the signals within a ``with`` block; does nothing outside the main thread."""
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
