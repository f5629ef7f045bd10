"""Opening what a run trains on: a cache or HDF5 files, the demos of each split, and the source of features."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_pipeline.cache.manifest import SourceRecord
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.cache.stillness import still_cameras
from cache_pipeline.demos.choice import Choice, choose_from
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.demos.split import Split
from cache_pipeline.demos.windows import WindowSpec
from cache_pipeline.encoders.frozen import FrozenEncoder
from cache_pipeline.encoders.image_encoder import ImageEncoder
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.errors import ConfigError
from cache_pipeline.runs.contents import Contents, Digests, Known, split_of_run
from cache_pipeline.training.config import Order, SourceName
from cache_pipeline.training.data.live import DemoFrames, Encode, LiveSource
from cache_pipeline.training.data.memory import fits, host_budget, memory_budget
from cache_pipeline.training.data.resident import ResidentSource
from cache_pipeline.training.data.rows import (
    RunRows,
    cache_row_numbers,
    choose_keys,
    chosen_split,
    rows_of_cache,
    rows_of_dataset,
)
from cache_pipeline.training.data.sampler import BlockOrder
from cache_pipeline.training.data.source import Source, SplitRows
from cache_pipeline.training.data.streamed import StreamedSource, block_order, pool_rows
from cache_pipeline.training.update.distributed import current_ranks

logger = logging.getLogger("cache_pipeline")

DEFAULT_POOL_BYTES = 1 << 30
MOST_EXACT_FIRST = ("fp32", "tf32", "fp16", "bf16")
FULL_ORDER_POOLS = 64  # at most so many times is a chunk read in an epoch


class DataShapes(NamedTuple):
    """Camera → (H, W, 3), low-dim key → shape of one row, and the width of an action."""

    cameras: dict[str, tuple[int, int, int]]
    low_dim: dict[str, tuple[int, ...]]
    action_dim: int


class SplitNames(NamedTuple):
    """How to choose the demos: by filter keys, or those of an earlier run.

    Attributes:
        run_data: what run.json of that run says of its data.
        where: that run, for messages.
        fits: raises if the data are of other shapes than that run's; asked before its demos are looked for.
        known: (file, demo) → digests of the content that an earlier run recorded, for files that have not changed.
    """

    filter_key: str | None = None
    valid_key: str | None = None
    seed: int = 0
    run_data: Mapping[str, Any] | None = None
    where: str = ""
    fits: Callable[[DataShapes], None] | None = None
    known: Known | None = None


class RunData(NamedTuple):
    """What a run trains on.

    Attributes:
        cameras: camera → (H, W, 3). low_dim: key → shape of one row.
        split: numbers of the chosen demos in ``cache`` or ``dataset``.
        digests: of what each chosen demo holds, in the order of ``rows``.
        sources: the files, as they were when these digests were taken.
        cache, dataset: where features and frames come from; one of them may be None.
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
    def identity(self) -> dict[str, Any]:
        """What run.json says of the data."""
        origin: Any = self.dataset if self.dataset is not None else self.cache
        demos = [list(demo) for demo in self.rows.demos]
        return {
            "cache": None if self.cache is None else str(self.cache.path.resolve()),
            "fingerprint": None if self.cache is None else self.cache.fingerprint,
            "datasets": [str(path.resolve()) for path in self.files],
            "files": [source.to_json() for source in self.sources],
            "train": demos[: self.rows.n_train],
            "valid": demos[self.rows.n_train :],
            "contents": list(self.digests),
            "env_args": origin.env_args,
            "render_flags": origin.render_flags,
        }

    @property
    def files(self) -> list[Path]:
        if self.dataset is not None:
            return [Path(file.path) for file in self.dataset.files]
        assert self.cache is not None
        return [Path(source.path) for source in self.cache.manifest.files]

    @property
    def choice(self) -> Choice:
        """What is taken of the cache or the files, and what is left out."""
        if self.cache is None:
            assert self.dataset is not None
            return self.dataset.choice
        left = (
            choose_from(self.cache.cameras, tuple(self.cameras)),
            choose_from(self.cache.low_dim, tuple(self.low_dim)),
        )
        return Choice(tuple(self.cameras), tuple(self.low_dim), *left)

    @property
    def mean_action(self) -> NDArray[np.float32]:
        """(A,) over the train split."""
        mean: NDArray[np.float32] = self.rows.actions[: self.rows.train_rows].mean(0, dtype=np.float64)
        return mean.astype(np.float32)

    def splits(self, spec: WindowSpec, device: torch.device) -> tuple[SplitRows, SplitRows | None]:
        """Windows of the train and of the held-out split, on the device."""
        train, valid = self.rows.windows(spec), self.rows.windows(spec, valid=True)
        assert train is not None
        return (
            SplitRows(train, self.rows, device),
            None if valid is None else SplitRows(valid, self.rows, device),
        )


def tell_choice(data: RunData) -> None:
    """Logs the cameras, low-dim keys and action key that a run takes and leaves out, and warns of cameras that show
    nothing through whole demos."""
    for line in data.choice.lines():
        logger.info("%s", line)
    for sentence in still_cameras(data.cache.path, data.cache.manifest) if data.cache is not None else ():
        logger.warning("%s", sentence)


def open_cache_data(
    path: Path, cameras: Sequence[str] | None, low_dim_keys: Sequence[str] | None, split: SplitNames
) -> RunData:
    """Opens a cache; raises CacheError, or ConfigError or DatasetError for names that it does not have.

    Whether it still holds what its files hold is for ``check_sources`` to say.
    """
    cache = FeatureCache(path)
    chosen = choose_keys(cameras, tuple(cache.cameras), "camera")
    keys = choose_keys(low_dim_keys, tuple(cache.low_dim), "low-dim key")
    shapes = {camera: cache.cameras[camera].image_shape for camera in chosen}
    low_dim = {key: cache.low_dim[key] for key in keys}
    contents = Contents(cache, chosen, keys)
    demos, digests = _split(cache, split, contents, DataShapes(shapes, low_dim, cache.action_dim))
    return RunData(shapes, low_dim, demos, rows_of_cache(cache, demos, keys), digests, contents.files, cache, None)


def open_dataset_data(
    paths: Sequence[Path], cameras: Sequence[str] | None, low_dim_keys: Sequence[str] | None, split: SplitNames
) -> RunData:
    """Opens HDF5 files; raises DatasetError, for filter keys that they do not have too."""
    dataset = Dataset.open(paths, cameras=cameras, low_dim_keys=low_dim_keys)
    contents = Contents(dataset, tuple(dataset.cameras), tuple(dataset.low_dim), split.known)
    shapes = DataShapes(dict(dataset.cameras), dict(dataset.low_dim), dataset.action_dim)
    demos, digests = _split(dataset, split, contents, shapes)
    rows = rows_of_dataset(dataset, demos, tuple(dataset.low_dim))
    return RunData(*shapes[:2], demos, rows, digests, contents.files, None, dataset)


def features_precision(cache: FeatureCache, cameras: Sequence[str]) -> str:
    """What the features of a cache were computed in; the most exact where cameras differ."""
    found = {cache.cameras[camera].identity["precision"]["compute"] for camera in cameras}
    return min(found, key=MOST_EXACT_FIRST.index)


def _split(data: Any, names: SplitNames, contents: Contents, shapes: DataShapes) -> tuple[Split, tuple[Digests, ...]]:
    """The chosen demos, and digests of what they hold."""
    if names.fits is not None:
        names.fits(shapes)
    if names.run_data is not None:
        split = split_of_run(data, contents, names.run_data, names.where)
    else:
        split = chosen_split(data, names.filter_key, names.valid_key, names.seed)
    logger.info("%s", split.rule)
    for warning in split.warnings:
        logger.warning("%s", warning)
    return split, contents.digests((*split.train, *split.valid))


class SourcePlan(NamedTuple):
    """Which source, how many views, and in which order: decided once and kept with the run."""

    source: SourceName
    views: int
    blocks: BlockOrder | None

    @property
    def order(self) -> dict[str, Any]:
        """What run.json says of the order of samples."""
        return {"views": self.views, "blocks": None if self.blocks is None else asdict(self.blocks)}

    def in_order_of(self, run: Mapping[str, Any]) -> SourcePlan:
        """The same source in the order of a run to go on with, however much memory is free now."""
        blocks = run["order"]["blocks"]
        return SourcePlan(self.source, run["order"]["views"], None if blocks is None else BlockOrder(**blocks))


def plan_source(
    data: RunData,
    windows: int,
    *,
    source: SourceName,
    order: Order,
    views: int,
    max_memory: int | None,
    device: torch.device,
) -> SourcePlan:
    """Chooses the source by size, and the order that suits it.

    Streaming shuffles fully too while an epoch takes few pools: its samples are then those of the other sources. With
    many pools it would read most of the cache once for each of them, and a pool of blocks mixes enough demos by then.
    """
    if data.cache is None or source == "live":
        return SourcePlan("live", views, None)
    row_bytes = _feature_bytes(data.cache, tuple(data.cameras))
    # Free memory differs between processes, and all of them are to see the same samples.
    ranks, needed = current_ranks(), len(data.rows.actions) * row_bytes * views
    too_large = ranks.any(not fits(needed, memory_budget(device, max_memory)))
    chosen: SourceName = source if source != "auto" else ("streamed" if too_large else "resident")
    rows = ranks.number_of_first(pool_rows(_pool_budget(device, max_memory), row_bytes))
    full = chosen != "streamed" or windows <= FULL_ORDER_POOLS * rows
    if order == "full" or (order == "auto" and full):
        return SourcePlan(chosen, views, None)
    return SourcePlan(chosen, views, block_order(rows, windows))


def _pool_budget(device: torch.device, max_memory: int | None) -> int:
    """Bytes of all pools in memory; pools are read into the host's memory whatever the device is."""
    budget = max_memory if max_memory is not None else min(DEFAULT_POOL_BYTES, memory_budget(device, None))
    return budget if device.type == "cpu" else min(budget, host_budget())


def _feature_bytes(cache: FeatureCache, cameras: Sequence[str]) -> int:
    itemsize = np.dtype(cache.manifest.dtype).itemsize
    return sum(int(np.prod(cache.cameras[camera].feature_shape)) for camera in cameras) * itemsize


def open_cached(
    data: RunData,
    plan: SourcePlan,
    splits: tuple[SplitRows, SplitRows | None],
    *,
    max_memory: int | None,
    device: torch.device,
) -> Source:
    """The resident or the streamed source."""
    assert data.cache is not None
    numbers = cache_row_numbers(data.cache, data.split)
    cameras, (train, valid) = tuple(data.cameras), splits
    if plan.source == "resident":
        return ResidentSource(data.cache, cameras, numbers, views=plan.views, train=train, valid=valid, device=device)
    rows = pool_rows(_pool_budget(device, max_memory), _feature_bytes(data.cache, cameras))
    order = "all windows" if plan.blocks is None else f"blocks of {plan.blocks.block} windows"
    logger.info("streaming: %s shuffled, read ahead in pools of at most %d rows", order, rows)
    return StreamedSource(
        data.cache, cameras, numbers, views=plan.views, train=train, valid=valid, pool_rows=rows, device=device
    )


def open_live(
    data: RunData,
    splits: tuple[SplitRows, SplitRows | None],
    encode: Encode,
    *,
    hand_on_frames: bool,
    max_memory: int | None,
    device: torch.device,
) -> LiveSource:
    """The live source."""
    assert data.dataset is not None
    demos = (*data.split.train, *data.split.valid)
    frames = DemoFrames(data.dataset, demos, np.cumsum(data.rows.lengths) - data.rows.lengths)
    return LiveSource(
        frames,
        tuple(data.cameras),
        encode=encode,
        hand_on_frames=hand_on_frames,
        train=splits[0],
        valid=splits[1],
        budget=memory_budget(device, max_memory),
        device=device,
    )


def frozen_encode(
    encoders: Mapping[str, ImageEncoder],
    preprocess: Mapping[str, Preprocess],
    device: torch.device,
    precision: str,
) -> Encode:
    """The fast path of each camera's encoder as a function."""
    by_camera = frozen_encoders(encoders, preprocess, device, precision)

    def encode(camera: str, frames: Tensor) -> Tensor:
        # What inference mode makes cannot take part in a backward pass; its copy can.
        return by_camera[camera](frames).clone()

    return encode


def frozen_encoders(
    encoders: Mapping[str, ImageEncoder],
    preprocess: Mapping[str, Preprocess],
    device: torch.device,
    precision: str,
) -> dict[str, FrozenEncoder]:
    """The fast path of each camera's encoder; cameras with one encoder and preprocessing share it."""
    made: dict[tuple[int, Preprocess], FrozenEncoder] = {}
    by_camera: dict[str, FrozenEncoder] = {}
    for camera, encoder in encoders.items():
        key = (id(encoder), preprocess[camera])
        if key not in made:
            made[key] = FrozenEncoder(encoder, preprocess[camera], device, precision)
        by_camera[camera] = made[key]
    return by_camera


def check_cameras(cameras: Mapping[str, Any]) -> None:
    """Raises ConfigError without cameras: there would be nothing to encode."""
    if not cameras:
        raise ConfigError("no cameras are left; name at least one with --cameras")
