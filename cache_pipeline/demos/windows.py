"""Windows over demos and their order, with the semantics of robomimic's ``SequenceDataset``.

Reference: robomimic 0.3.0, ``utils/dataset.py``. Obs horizon is ``frame_stack``, action horizon is ``seq_length``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cache_pipeline.errors import ConfigError


@dataclass(frozen=True)
class WindowSpec:
    """The rows of one sample."""

    obs_horizon: int = 2
    """To: obs of the steps t-To+1 … t (robomimic ``frame_stack``)."""
    action_horizon: int = 8
    """Ta: actions of the steps t … t+Ta-1 (robomimic ``seq_length``)."""
    pad_start: bool = True
    """Repeat the first obs in windows that start before the demo (``pad_frame_stack``); if false, omit them."""
    pad_end: bool = True
    """Repeat the last action in windows that end after the demo (``pad_seq_length``); if false, omit them."""

    def __post_init__(self) -> None:
        for name in ("obs_horizon", "action_horizon"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")


class Windows(NamedTuple):
    """W windows, ordered by demo and step."""

    obs_rows: np.ndarray
    """(W, To) int64; the last column is the row of step t."""
    action_rows: np.ndarray
    """(W, Ta) int64; the first column is the row of step t."""
    action_mask: np.ndarray
    """(W, Ta) bool; false where the last action is repeated."""
    demo: np.ndarray
    """(W,) int64; index into ``starts``."""


def make_windows(starts: Sequence[int] | np.ndarray, lengths: Sequence[int] | np.ndarray, spec: WindowSpec) -> Windows:
    """Makes one window per step t; fewer without padding.

    Args:
        starts: (E,) first row of each demo, in any row space.
        lengths: (E,) number of steps of each demo.

    Raises:
        ConfigError: without padding, a demo is shorter than one window.
    """
    starts, lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
    assert starts.shape == lengths.shape
    assert starts.ndim == 1
    skip = 0 if spec.pad_start else spec.obs_horizon - 1
    cut = 0 if spec.pad_end else spec.action_horizon - 1
    counts = lengths - skip - cut
    if (counts < 1).any():
        number = int(np.argmax(counts < 1))
        raise ConfigError(
            f"demo number {number} has {lengths[number]} steps, fewer than the {skip + cut + 1} of one whole window "
            f"(obs horizon {spec.obs_horizon}, action horizon {spec.action_horizon}); shorten the horizons or pad"
        )
    demo = np.repeat(np.arange(len(starts), dtype=np.int64), counts)
    first_window = np.cumsum(counts) - counts
    step = np.arange(len(demo), dtype=np.int64) - first_window[demo] + skip
    obs_step = step[:, None] + np.arange(1 - spec.obs_horizon, 1)
    action_step = step[:, None] + np.arange(spec.action_horizon)
    start, last = starts[demo, None], lengths[demo, None] - 1
    return Windows(start + np.maximum(obs_step, 0), start + np.minimum(action_step, last), action_step <= last, demo)


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Returns a permutation of 0 … n-1, (n,) int64, which depends only on (n, seed, epoch)."""
    return _generator(seed, epoch).permutation(n)


def _generator(seed: int, epoch: int) -> np.random.Generator:
    """Returns a Philox generator keyed by (seed, epoch); epochs have independent streams."""
    if seed < 0 or epoch < 0:
        raise ConfigError(f"seed {seed} and epoch {epoch} must be 0 or more")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
