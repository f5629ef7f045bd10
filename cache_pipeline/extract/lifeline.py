"""Starts worker processes that end when their parent has ended.

Imports nothing heavy, so that a worker notices the end of its parent while it starts.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection

CLOSED = select.POLLHUP | getattr(select, "POLLRDHUP", 0)
ENDING_S = 5.0
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from cache_pipeline.extract.lifeline import end_with_parent; end_with_parent(int(sys.argv[1])); "
    "from {module} import serve; serve()"
)


class WorkerProcess:
    """A process that runs ``serve()`` of a module, and the pipe to it. It ends itself as soon as the pipe is closed.

    Args:
        module: module whose ``serve`` calls ``parent_connection`` first.
        variables: environment variables beside those of this process.
        descriptors: files of this process that stay open in the worker.
    """

    def __init__(self, module: str, variables: Mapping[str, str], descriptors: Sequence[int] = ()) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [str(theirs.fileno()), json.dumps([path or os.curdir for path in sys.path])]
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START.format(module=module), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=[theirs.fileno(), *descriptors],
                env={**os.environ, **variables},
            )
        self.connection = Connection(ours.detach())

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self) -> int:
        """Ends the process, which follows from the closed pipe, and returns its exit code."""
        self.connection.close()
        try:
            return self._process.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def parent_connection() -> Connection:
    """Returns the pipe to the parent, in a worker. Signals are for the parent, which closes the pipe when it ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    return Connection(int(sys.argv[1]))


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
