"""The side of the worker in processes that simulate: does jobs until the pipe to the parent is closed."""

from __future__ import annotations

import logging
import os
import pickle
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from cache_pipeline.extract.lifeline import parent_connection
from cache_pipeline.isolation import end_child
from cache_pipeline.sim.opengl import never_import_torch

logger = logging.getLogger("cache_pipeline")


class RemoteTraceback(Exception):
    """The traceback of an exception in a worker, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def serve_jobs(opened: Callable[[Any], AbstractContextManager[Callable[[Any], Any]]]) -> NoReturn:
    """Receives (setup, log level), then jobs, and sends (kind, value) pairs.

    Kinds: ``done`` with the result of a job; ``said`` with the arguments of ``logger.log``; ``broken`` with an
    exception and the text of its traceback, after which the process ends.

    Args:
        opened: opens a simulator for ``setup``; yields the function that does a job.
    """
    connection = parent_connection()
    try:
        never_import_torch()
        setup, level = connection.recv()
        logger.handlers[:], logger.propagate = [_Log(connection)], False
        logger.setLevel(level)
        with opened(setup) as do:
            while True:
                connection.send(("done", do(connection.recv())))
    except (EOFError, ConnectionError):
        pass
    except Exception as error:
        with suppress(OSError):
            connection.send(("broken", (_sendable(error), traceback.format_exc())))
    end_child()
    os._exit(0)


class _Log(logging.Handler):
    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        self._connection.send(("said", (record.levelno, "%s", record.getMessage())))


def _sendable(error: Exception) -> Exception:
    """Returns the error, or one with the same text if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
