"""What lies at a path: a dataset, a cache or a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from cache_pipeline.errors import DatasetError


class Summary(Protocol):
    """What ``inspect`` prints."""

    def to_json(self) -> dict[str, Any]: ...

    def lines(self) -> list[str]: ...


def inspect_path(path: Path) -> Summary:
    """Summarises the dataset, cache or run at ``path``.

    Raises:
        DatasetError: nothing is there, or it is none of the three.
    """
    if path.is_dir():
        if any((path / name).exists() for name in ("run.json", "checkpoint.json")):
            from cache_pipeline.training.checkpoint import inspect_run

            return inspect_run(path)
        if any((path / name).exists() for name in ("manifest.json", "ledger", "zarr.json")):
            from cache_pipeline.cache.summary import inspect_cache

            return inspect_cache(path)
        raise DatasetError(
            f"{path}: neither a cache nor a run; give a robomimic .hdf5 file, a cache folder or a run folder"
        )
    from cache_pipeline.demos.summary import inspect_dataset

    return inspect_dataset((path,))
