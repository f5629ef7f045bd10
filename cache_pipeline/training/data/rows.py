"""The rows that a run trains on and measures: demos, splits, low-dim obs and actions, from a cache or from HDF5 files.

Rows are packed: the chosen demos follow one another in the order of the files, without gaps. So rows, windows and their
order are the same for a cache and for its source files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.cache.table import demo_files, names
from cache_pipeline.demos.split import Split, split_demos
from cache_pipeline.demos.windows import Windows, WindowSpec, make_windows
from cache_pipeline.errors import ConfigError, available

if TYPE_CHECKING:
    from cache_pipeline.demos.dataset import Dataset


class RunRows(NamedTuple):
    """All data of the chosen demos except camera frames and features.

    Attributes:
        demos: (file, name) of each chosen demo: training demos, then held-out demos.
        lengths: (E,) steps of each demo.
        n_train: number of training demos.
        low_dim: key → (N, …) float32.
        actions: (N, A) float32.
        rewards, dones: (N,) float32.
    """

    demos: tuple[tuple[int, str], ...]
    lengths: NDArray[np.int64]
    n_train: int
    low_dim: dict[str, NDArray[np.float32]]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float32]
    dones: NDArray[np.float32]

    @property
    def train_rows(self) -> int:
        """Rows of the train split; they come first."""
        return int(self.lengths[: self.n_train].sum())

    def windows(self, spec: WindowSpec, *, valid: bool = False) -> Windows | None:
        """Returns the windows of one split; None if it has no demos."""
        chosen = slice(self.n_train, None) if valid else slice(0, self.n_train)
        starts = np.cumsum(self.lengths) - self.lengths
        return make_windows(starts[chosen], self.lengths[chosen], spec) if len(starts[chosen]) else None


def chosen_split(data: FeatureCache | Dataset, filter_key: str | None, valid_key: str | None, seed: int) -> Split:
    """Splits the demos of a cache or dataset; raises DatasetError as ``split_demos`` does."""
    several = len({demo.file for demo in data.demos}) > 1
    names = [f"{demo.name} of file {demo.file}" if several else demo.name for demo in data.demos]
    masks = {
        key: [*(names[number] for number in data.masks.get(key, ())), *data.absent.get(key, ())]
        for key in dict.fromkeys((*data.masks, *data.absent))
    }
    return split_demos(names, masks, seed=seed, filter_key=filter_key, valid_key=valid_key)


def choose_keys(asked: Sequence[str] | None, there: Sequence[str], what: str) -> tuple[str, ...]:
    """Returns the requested names in their order; all available names by default.

    Raises:
        ConfigError: a name is not in the data.
    """
    if asked is None:
        return tuple(there)
    for name in asked:
        if name not in there:
            raise ConfigError(f"the data have no {what} {name!r}; {available(there, name)}")
    return tuple(dict.fromkeys(asked))


def cache_row_numbers(cache: FeatureCache, split: Split) -> NDArray[np.int64]:
    """Returns (N,) the cache row of every packed row."""
    chosen = np.array([*split.train, *split.valid], np.int64)
    starts, counts = cache.starts[chosen], cache.lengths[chosen]
    return np.arange(counts.sum()) + np.repeat(starts - (np.cumsum(counts) - counts), counts)


def rows_of_cache(cache: FeatureCache, split: Split, low_dim_keys: Sequence[str]) -> RunRows:
    """Reads the rows of a cache."""
    chosen = [*split.train, *split.valid]
    numbers = cache_row_numbers(cache, split)
    files, called = demo_files(cache.demos).tolist(), names(cache.demos)
    return RunRows(
        demos=tuple((files[number], called[number]) for number in chosen),
        lengths=cache.lengths[chosen],
        n_train=len(split.train),
        low_dim={key: cache.array(f"low_dim/{key}", numbers) for key in low_dim_keys},
        actions=cache.array("actions", numbers),
        rewards=cache.array("rewards", numbers),
        dones=cache.array("dones", numbers),
    )


def rows_of_dataset(dataset: Dataset, split: Split, low_dim_keys: Sequence[str]) -> RunRows:
    """Reads the rows of a dataset."""
    numbers = (*split.train, *split.valid)
    read = [dataset.rows(number) for number in numbers]

    def joined(name: str) -> NDArray[np.float32]:
        return np.concatenate([rows[name] for rows in read])

    return RunRows(
        demos=tuple((dataset.demos[number].file, dataset.demos[number].name) for number in numbers),
        lengths=np.array([dataset.demos[number].length for number in numbers], np.int64),
        n_train=len(split.train),
        low_dim={key: joined(f"low_dim/{key}") for key in low_dim_keys},
        actions=joined("actions"),
        rewards=joined("rewards"),
        dones=joined("dones"),
    )
