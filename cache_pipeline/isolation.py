"""Runs functions in a child process, so that a crash or an endless loop in a C library becomes an error.

HDF5 can do both on a damaged file, and neither can be caught in the process where it happens.

    frames = isolated(read_frames, source, segments)

The child is started by the first call and answers all later ones. It imports only what its functions need. Arguments
and results are pickled; the bytes of arrays are sent beside the pickle, without a copy.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

import numpy as np

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

CPU_SECONDS = 10.0
"""CPU time after which a call that does not report progress is ended. Waiting for a slow disk costs no CPU time."""
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); import cache_pipeline.isolation as i; i._serve()"
_ENDINGS = {
    signal.SIGPROF: f"did not finish within {CPU_SECONDS:.0f} s of CPU time",
    signal.SIGKILL: "was killed, perhaps for lack of memory",
}


class _EndedError(Exception):
    pass


class IsolatedCrashError(RuntimeError):
    """The function ended its process, or was ended because it made no progress."""


def isolated(function: Callable[Parameters, Result], *args: Parameters.args, **options: Parameters.kwargs) -> Result:
    """Calls a function of a module in the child process and returns its result.

    Raises:
        IsolatedCrashError: the call crashed the child, or used ``CPU_SECONDS`` without progress.
        Exception: whatever the function raises.
    """
    while not _in_child:
        with suppress(_EndedError):  # another thread's call ended the child while this one waited
            return _child().call(function, args, options)
    return function(*args, **options)


def isolated_when_free(function: Callable[..., object], *args: object) -> None:
    """Calls a function in the child process, now or before the next call; without a child, does nothing.

    Safe in a finaliser, which may interrupt a running call.
    """
    if (child := _running) is not None and child.parent == os.getpid():
        child.call_when_free(function, args)


def progress() -> None:
    """Tells that the running call makes progress: its CPU time is counted anew. Has no effect outside the child."""
    if _in_child:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)


class _Child:
    """One child process and the socket to it."""

    def __init__(self) -> None:
        self.parent = os.getpid()
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Callable[..., object], Any]] = deque()
        self._socket, theirs = socket.socketpair()
        with theirs:
            arguments = [str(theirs.fileno()), json.dumps([path or os.curdir for path in sys.path])]
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, *arguments], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )

    def call(self, function: Callable[..., Any], args: Any, options: Any) -> Any:
        with self._lock:
            self._call_waiting()
            if self._process.returncode is not None:
                raise _EndedError
            return self._call(function, args, options)

    def call_when_free(self, function: Callable[..., object], args: Any) -> None:
        self._waiting.append((function, args))
        if self._lock.acquire(blocking=False):  # else the next call does it
            try:
                self._call_waiting()
            finally:
                self._lock.release()

    def _call_waiting(self) -> None:
        while self._waiting and self._process.returncode is None:
            self._call(*self._waiting.popleft(), {})

    def _call(self, function: Callable[..., Any], args: Any, options: Any) -> Any:
        try:
            _send(self._socket, (_working_folder(), function, args, options))
            done, value = _receive(self._socket)
        except (EOFError, ConnectionError, BrokenPipeError) as error:
            code = self.end()
            raise IsolatedCrashError(f"HDF5 {how_it_ended(code)}") from error
        except BaseException:  # such as an interrupt: the reply that is still to come belongs to no call
            self.end()
            raise
        if done:
            return value
        raise value

    def leave_to_parent(self) -> None:
        """Forgets the child in a fork of the process that started it."""
        self._socket.close()
        self._process.returncode = 0  # else Popen warns that it still runs

    def end(self) -> int:
        """Ends the child and returns its exit code; the next call starts another."""
        global _running
        if _running is self:
            _running = None
        self._socket.close()
        try:
            return self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


_running: _Child | None = None
_starting = threading.Lock()
_in_child = False


def _child() -> _Child:
    global _running
    with _starting:
        if _running is not None and _running.parent != os.getpid():
            _running.leave_to_parent()
            _running = None
        if _running is None:
            _running = _Child()
        return _running


@atexit.register
def end_child() -> None:
    """Ends the child of this process, if any; the next call starts another."""
    if _running is not None and _running.parent == os.getpid():
        _running.end()


def how_it_ended(code: int) -> str:
    """Returns how a process ended, from its exit code as ``subprocess`` gives it, such as ``crashed (SIGSEGV)``."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        number = signal.Signals(-code)
    except ValueError:
        return f"crashed (signal {-code})"
    return _ENDINGS.get(number, f"crashed ({number.name})")


def _working_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


def _serve() -> None:
    """The child: answers calls until the parent closes the socket. The kernel ends it where a call hangs."""
    global _in_child
    _in_child = True
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they concern the parent, which may finish its work before it ends
    with socket.socket(fileno=int(sys.argv[1])) as parent:
        while True:
            try:
                folder, function, args, options = _receive(parent)
                if folder != _working_folder():
                    with suppress(OSError):
                        os.chdir(folder)
                progress()
                reply = _outcome(function, args, options)
                signal.setitimer(signal.ITIMER_PROF, 0)
                _send(parent, reply)
            except (EOFError, ConnectionError, BrokenPipeError):
                return


def _outcome(function: Callable[..., Any], args: Any, options: Any) -> tuple[bool, Any]:
    try:
        return True, function(*args, **options)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return False, RuntimeError(f"{type(error).__name__}: {error}")
        return False, error


def _send(to: socket.socket, value: Any) -> None:
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(head), *(buffer.raw() for buffer in buffers)]
    to.sendall(struct.pack(f"<{len(parts) + 1}Q", len(parts), *(part.nbytes for part in parts)))
    for part in parts:
        to.sendall(part)


def _receive(source: socket.socket) -> Any:
    (count,) = struct.unpack("<Q", _read(source, 8))
    sizes = struct.unpack(f"<{count}Q", _read(source, 8 * count))
    head, *buffers = [_read(source, size) for size in sizes]
    return pickle.loads(head, buffers=buffers)


def _read(source: socket.socket, size: int) -> memoryview:
    data = memoryview(np.empty(size, np.uint8))  # type: ignore[arg-type]
    filled = 0
    while filled < size:
        received = source.recv_into(data[filled:])
        if received == 0:
            raise EOFError("the other process has ended")
        filled += received
    return data
