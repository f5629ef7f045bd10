"""Threads that read before and write after the encoder, with bounded queues; errors reach the calling thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")

WAIT_S = 0.1


class ReadAhead(Generic[In, Out]):
    """Applies ``read`` to each item in a thread; holds at most ``ahead`` results that are not yet consumed.

    Iterating raises the error of ``read``. ``seconds`` is the time spent reading.
    """

    def __init__(self, read: Callable[[In], Out], items: Iterable[In], ahead: int = 2) -> None:
        self.seconds = 0.0
        self._read, self._items = read, items
        self._results: queue.Queue[Out | BaseException | None] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="read", daemon=True)

    def __enter__(self) -> Iterator[Out]:
        self._thread.start()
        return self._iterate()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _iterate(self) -> Iterator[Out]:
        while (result := self._results.get()) is not None:
            if isinstance(result, BaseException):
                raise result
            yield result

    def _run(self) -> None:
        try:
            for item in self._items:
                started = time.perf_counter()
                result = self._read(item)
                self.seconds += time.perf_counter() - started
                if not self._put(result):
                    return
            self._put(None)
        except BaseException as error:  # raised in the consuming thread
            self._put(error)

    def _put(self, result: Out | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._results.put(result, timeout=WAIT_S)
                return True
            except queue.Full:
                continue
        return False


class WriteBehind(Generic[In]):
    """Applies ``write`` to each item in threads; at most ``behind`` items wait. ``seconds`` is the time spent writing.

    The next :meth:`put` or the end raises the error of a thread; waiting items are then dropped.
    """

    def __init__(self, write: Callable[[In], None], threads: int = 2, behind: int = 2) -> None:
        self.seconds = 0.0
        self._write = write
        self._items: queue.Queue[In | None] = queue.Queue(behind)
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, name="write", daemon=True) for _ in range(threads)]

    def put(self, item: In) -> None:
        """Queues one item; blocks while the queue is full."""
        while True:
            if self._error is not None:
                raise self._error
            try:
                return self._items.put(item, timeout=WAIT_S)
            except queue.Full:
                continue

    def __enter__(self) -> WriteBehind[In]:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and self._error is None:
            self._error = error
        for _ in self._threads:
            self._items.put(None)
        for thread in self._threads:
            thread.join()
        if self._error is not None and error is None:
            raise self._error

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            if self._error is not None:
                continue
            started = time.perf_counter()
            try:
                self._write(item)
            except BaseException as error:  # raised in the thread that calls put
                self._error = error
            with self._lock:
                self.seconds += time.perf_counter() - started
