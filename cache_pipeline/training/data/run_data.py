"""Data of a run: a cache or HDF5 files, and the demos of each split."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cache_pipeline.cache.manifest import SourceRecord
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.cache.stillness import still_cameras
from cache_pipeline.demos.choice import Choice, choose_from
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.demos.remote import recorded_path
from cache_pipeline.demos.split import Split, keep_together
from cache_pipeline.demos.windows import WindowSpec
from cache_pipeline.errors import ConfigError
from cache_pipeline.files import Location, absolute, json_digest
from cache_pipeline.runs.contents import Contents, Known, split_of_run
from cache_pipeline.runs.record import DataRecord, DemoRecord, Digests
from cache_pipeline.text import few, listed
from cache_pipeline.training.data.rows import RunRows, choose_keys, chosen_split, rows_of_cache, rows_of_dataset
from cache_pipeline.training.data.source import SplitRows, Splits

logger = logging.getLogger("cache_pipeline")

MOST_EXACT_FIRST = ("fp32", "tf32", "fp16", "bf16")


class DataShapes(NamedTuple):
    """Camera → (H, W, 3), low-dim key → shape of one row, and the width of an action."""

    cameras: dict[str, tuple[int, int, int]]
    low_dim: dict[str, tuple[int, ...]]
    action_dim: int


class DemoChoice(NamedTuple):
    """Selects demos: by filter keys, or the demos of an earlier run.

    Attributes:
        recorded: data record of that run.
        where: name of that run, for messages.
        fits: raises if the shapes of the data differ from that run's; called before its demos are looked up.
        known: (file, demo) → digests that an earlier run recorded, for files that have not changed.
    """

    filter_key: str | None = None
    valid_key: str | None = None
    seed: int = 0
    recorded: DataRecord | None = None
    where: str = ""
    fits: Callable[[DataShapes], None] | None = None
    known: Known | None = None


class RunData(NamedTuple):
    """Opened data of a run.

    Attributes:
        cameras: camera → (H, W, 3). low_dim: key → shape of one row.
        split: numbers of the chosen demos in ``cache`` or ``dataset``.
        digests: digests of each chosen demo, in the order of ``rows``.
        sources: the files with size and time when these digests were computed.
        cache, dataset: sources of features and frames; one of them may be None.
    """

    cameras: dict[str, tuple[int, int, int]]
    low_dim: dict[str, tuple[int, ...]]
    split: Split
    rows: RunRows
    digests: tuple[Digests, ...]
    sources: tuple[SourceRecord, ...]
    cache: FeatureCache | None
    dataset: Dataset | None

    @property
    def record(self) -> DataRecord:
        """The data record for run.json."""
        origin: Any = self.dataset if self.dataset is not None else self.cache
        demos = [
            DemoRecord(file=file, name=name, contents=digests)
            for (file, name), digests in zip(self.rows.demos, self.digests, strict=True)
        ]
        return DataRecord(
            cache=None if self.cache is None else absolute(self.cache.path),
            fingerprint=None if self.cache is None else self.cache.fingerprint,
            datasets=tuple(map(recorded_path, self.files)),
            files=self.sources,
            train=tuple(demos[: self.rows.n_train]),
            valid=tuple(demos[self.rows.n_train :]),
            env_args=origin.env_args,
            render_flags=origin.render_flags,
            action_keys=self.action_keys,
        )

    @property
    def action_keys(self) -> tuple[str, ...]:
        """The arrays of the dataset that are the actions."""
        if self.dataset is not None:
            return self.dataset.action_keys
        assert self.cache is not None
        return self.cache.manifest.action_keys

    @property
    def files(self) -> list[Path]:
        if self.dataset is not None:
            return [Path(file.path) for file in self.dataset.files]
        assert self.cache is not None
        return [Path(source.path) for source in self.cache.manifest.files]

    @property
    def choice(self) -> Choice:
        """Lines that list the keys of the data that are used and not used."""
        if self.cache is None:
            assert self.dataset is not None
            return self.dataset.choice
        left = (
            choose_from(self.cache.cameras, tuple(self.cameras)),
            choose_from(self.cache.low_dim, tuple(self.low_dim)),
        )
        return Choice(tuple(self.cameras), tuple(self.low_dim), *left, actions=self.action_keys)

    @property
    def mean_action(self) -> NDArray[np.float32]:
        """Mean action (A,) of the train split."""
        mean: NDArray[np.float32] = self.rows.actions[: self.rows.train_rows].mean(0, dtype=np.float64)
        return mean.astype(np.float32)

    def splits(self, spec: WindowSpec, device: torch.device) -> Splits:
        """Returns the windows of the train and the held-out split, on the device."""
        train, valid = self.rows.windows(spec), self.rows.windows(spec, valid=True)
        assert train is not None
        return (
            SplitRows(train, self.rows, device),
            None if valid is None else SplitRows(valid, self.rows, device),
        )


def tell_choice(data: RunData) -> None:
    """Logs the cameras, low-dim keys and action key that a run uses and does not use, and warns of cameras that are
    black or frozen through whole demos."""
    for line in data.choice.lines():
        logger.info("%s", line)
    still = still_cameras(data.cache.store, data.cache.manifest) if data.cache is not None else ()
    for sentence in few(still, "camera", more="inspect --json lists all"):
        logger.warning("%s", sentence)


def open_cache_data(
    path: Location,
    cameras: Sequence[str] | None,
    low_dim_keys: Sequence[str] | None,
    split: DemoChoice,
    action_key: tuple[str, ...] | None = None,
) -> RunData:
    """Opens a cache; raises CacheError, or ConfigError or DatasetError for unknown names or other actions.

    It does not compare the cache with its source files; ``check_sources`` does.
    """
    cache = FeatureCache(path)
    if action_key is not None and action_key != cache.manifest.action_keys:
        held, asked = listed(cache.manifest.action_keys), ",".join(action_key)
        raise ConfigError(
            f"{path} holds the actions of the action key {held}, not {asked}; extract another cache with "
            f"--action-key {asked}"
        )
    chosen = choose_keys(cameras, tuple(cache.cameras), "camera")
    keys = choose_keys(low_dim_keys, tuple(cache.low_dim), "low-dim key")
    shapes = {camera: cache.cameras[camera].image_shape for camera in chosen}
    low_dim = {key: cache.low_dim[key] for key in keys}
    contents = Contents(cache, chosen, keys)
    demos, digests = _split(cache, split, contents, DataShapes(shapes, low_dim, cache.action_dim))
    return RunData(shapes, low_dim, demos, rows_of_cache(cache, demos, keys), digests, contents.files, cache, None)


def open_dataset_data(
    paths: Sequence[Path],
    cameras: Sequence[str] | None,
    low_dim_keys: Sequence[str] | None,
    split: DemoChoice,
    action_key: tuple[str, ...] | None = None,
) -> RunData:
    """Opens HDF5 files; raises DatasetError, also for unknown filter keys."""
    dataset = Dataset.open(paths, cameras=cameras, low_dim_keys=low_dim_keys, action_key=action_key)
    contents = Contents(dataset, tuple(dataset.cameras), tuple(dataset.low_dim), split.known)
    shapes = DataShapes(dict(dataset.cameras), dict(dataset.low_dim), dataset.action_dim)
    demos, digests = _split(dataset, split, contents, shapes)
    rows = rows_of_dataset(dataset, demos, tuple(dataset.low_dim))
    return RunData(*shapes[:2], demos, rows, digests, contents.files, None, dataset)


def features_precision(data: RunData) -> str:
    """Returns the precision of the features in the run's cache; the most exact one if cameras differ."""
    assert data.cache is not None
    found = {data.cache.cameras[camera].identity["precision"]["compute"] for camera in data.cameras}
    return min(found, key=MOST_EXACT_FIRST.index)


def _split(data: Any, names: DemoChoice, contents: Contents, shapes: DataShapes) -> tuple[Split, tuple[Digests, ...]]:
    """Returns the chosen demos and their digests."""
    if names.fits is not None:
        names.fits(shapes)
    if names.recorded is not None:
        split = split_of_run(data, contents, names.recorded, names.where)
    else:
        split = chosen_split(data, names.filter_key, names.valid_key, names.seed)
        demos = (*split.train, *split.valid)
        keys = {demo: json_digest(found) for demo, found in zip(demos, contents.digests(demos), strict=True)}
        split = keep_together(split, keys, [demo.name for demo in data.demos])
    logger.info("%s", split.rule)
    for warning in split.warnings:
        logger.warning("%s", warning)
    return split, contents.digests((*split.train, *split.valid))
