"""Ends a worker process when its parent has ended; imports nothing heavy, so that it works while the worker starts."""

from __future__ import annotations

import os
import select
import threading

CLOSED = select.POLLHUP | getattr(select, "POLLRDHUP", 0)


def end_with_parent(descriptor: int) -> None:
    """Starts a thread that ends this process at once when the other end of a socket is closed.

    Args:
        descriptor: the socket whose other end the parent holds.
    """

    def watch() -> None:
        poll = select.poll()
        poll.register(descriptor, CLOSED)
        poll.poll()
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
