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


class StopRequest:
    """The stop signals of this process; training stops once the processes of the run have exchanged them.

    A process may receive the signal twice, from the terminal and from its launcher, so the second signal has no effect.
    In a process that trains alone, the third signal aborts the current step. Once saving has begun, signals have no
    effect.

    Args:
        alone: whether this process trains alone.

    Attributes:
        signals: number of signals that this process has received.
        agreed: whether the processes have agreed to stop; saving then begins.
    """

    def __init__(self, *, alone: bool) -> None:
        self.signals, self.agreed, self._alone = 0, False, alone

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signals += 1
        if self.signals == 1:
            again = "; a third signal stops at once" if self._alone else ""
            logger.info("%s: stopping after this step and saving%s", signal.Signals(number).name, again)
        elif self.signals >= AT_ONCE and self._alone and not self.agreed:
            raise KeyboardInterrupt


@contextmanager
def stop_request(*, alone: bool) -> Iterator[StopRequest]:
    """Handles the signals within a ``with`` block; does nothing outside the main thread."""
    request = StopRequest(alone=alone)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request._receive) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
