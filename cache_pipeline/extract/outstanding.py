"""Jobs to hand out to workers, and those that failed: a job is tried three times, then set aside."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from cache_pipeline.errors import LIMITS, NOT_ALLOWED, CachePipelineError, ChangedError, UnitsFailedError, described
from cache_pipeline.extract.units import Job

ATTEMPTS = 3


class Outstanding:
    """The jobs that no worker has.

    Jobs that failed before come last. A worker gets such a job alone, so that the job of which workers die is found.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._fresh = deque(jobs)
        self._suspects: deque[Job] = deque()
        self._attempts: dict[tuple[str, int], int] = {}
        self._causes: dict[str, Exception] = {}

    def __bool__(self) -> bool:
        return bool(self._fresh or self._suspects)

    def __len__(self) -> int:
        return len(self._fresh) + len(self._suspects)

    def take(self, *, alone: bool) -> Job | None:
        """Returns the next job for a worker, or None.

        Args:
            alone: whether the worker has no other job.
        """
        if self._fresh:
            return self._fresh.popleft()
        return self._suspects.popleft() if self._suspects and alone else None

    def is_suspect(self, job: Job) -> bool:
        """Whether a job failed before, or was with a worker that died."""
        return _key(job) in self._attempts

    def failed(self, job: Job, error: Exception) -> None:
        """Takes back a job that failed; sets it aside after ``ATTEMPTS`` times.

        Raises:
            OSError, ChangedError: the error concerns other jobs too: a full disk, or another writer of the cache.
        """
        if isinstance(error, ChangedError) or (isinstance(error, OSError) and error.errno in (*LIMITS, *NOT_ALLOWED)):
            raise error
        self._attempts[_key(job)] = self._attempts.get(_key(job), 0) + 1
        if self._attempts[_key(job)] < ATTEMPTS:
            self._suspects.append(job)
        else:
            self._causes[job.name] = error

    def check(self) -> None:
        """Raises UnitsFailedError if jobs were set aside."""
        if not self._causes:
            return
        name, cause = next(iter(self._causes.items()))
        others = list(self._causes)[1:]
        more = f"; nor could {len(others)} more, such as {others[0]}" if others else ""
        ours = isinstance(cause, CachePipelineError | OSError)
        what = described(cause) if ours else f"{type(cause).__name__}: {cause}"
        raise UnitsFailedError(
            f"{name} could not be made in {ATTEMPTS} attempts: {what}{more}; all other units are done and kept; once "
            "the cause is gone, the same command makes what is missing"
        ) from cause


def _key(job: Job) -> tuple[str, int]:
    return job.camera, job.block
