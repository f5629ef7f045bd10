"""Held-out action error, in the units of the dataset."""

from __future__ import annotations

from typing import Any, NamedTuple


class ActionError(NamedTuple):
    """Mean squared action errors over held-out windows; padded action steps do not count.

    Attributes:
        mse: over all dimensions.
        mse_per_dim: (A,).
        mean_action_mse: of always predicting the mean action of the train split, over the same windows.
        mean_action_mse_per_dim: (A,).
        windows: number of windows measured.
    """

    mse: float
    mse_per_dim: tuple[float, ...]
    mean_action_mse: float
    mean_action_mse_per_dim: tuple[float, ...]
    windows: int

    def to_json(self) -> dict[str, Any]:
        return self._asdict()
