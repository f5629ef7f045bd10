"""The spec of a policy, saved as JSON in the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

from cache_pipeline.errors import CheckpointError
from cache_pipeline.files import typed

POLICIES = ("flow", "mlp", "gmm")
"""Action heads, each in the module of its name in this package."""
LARGEST_SIZE = 2**24


@dataclass(frozen=True, kw_only=True)
class PolicySpec:
    """Everything needed to build a policy, except encoders and weights."""

    name: str = "flow"
    options: dict[str, Any] = field(default_factory=dict)
    emb_dim: int = 256
    obs_horizon: int = 2
    action_horizon: int = 8
    action_dim: int
    cameras: dict[str, tuple[int, int, int]]
    """Camera → (H, W, 3) of its frames."""
    low_dim: dict[str, tuple[int, ...]]
    """Low-dim key → shape of one row."""
    preprocess: dict[str, dict[str, Any]]
    """Camera → its preprocessing as JSON."""
    encoder_files: dict[str, str]
    """Camera → file of its encoder's initial weights in the run folder."""
    cut: str = "avgpool"
    """Layer where cached features enter."""
    share_rgb_model: bool = True
    """Whether all cameras share one encoder module."""
    clip_actions: bool = True
    """Whether normalised actions are clipped to [-1, 1] when acting; for min-max normalisation."""
    pooling: str = "avg"
    """Pooling of feature maps: ``avg``, or ``spatial_softmax``, which is trained with the policy."""
    rotation_6d: tuple[tuple[int, int], ...] = ()
    """Slices of the action that are axis-angle rotations; the policy predicts six numbers for each."""

    def to_json(self) -> dict[str, Any]:
        rotations = [list(pair) for pair in self.rotation_6d]
        shapes = {"cameras": _lists(self.cameras), "low_dim": _lists(self.low_dim)}
        return {**asdict(self), **shapes, "rotation_6d": rotations}

    @classmethod
    def from_json(cls, value: Any) -> PolicySpec:
        """Inverts ``to_json``; raises CheckpointError for anything else."""
        if isinstance(value, dict) and (unknown := sorted(value.keys() - {item.name for item in fields(cls)})):
            raise CheckpointError(f"the run's policy has {unknown[0]!r}, unsupported by this version")
        try:
            spec: PolicySpec = typed(value, cls)
            sizes = [spec.emb_dim, spec.obs_horizon, spec.action_horizon, spec.action_dim]
            shapes = [*spec.cameras.values(), *spec.low_dim.values()]
            if not all(1 <= size <= LARGEST_SIZE for size in chain(sizes, *shapes)):
                raise ValueError(f"a size in it is not between 1 and {LARGEST_SIZE}")
            if not spec.cameras.keys() == spec.preprocess.keys() == spec.encoder_files.keys():
                raise ValueError("its cameras, preprocessing and encoders have different names")
            if any(Path(file).name != file for file in spec.encoder_files.values()):
                raise ValueError("an encoder's file is outside the run folder")
        except ValueError as error:
            raise CheckpointError(f"the run's policy cannot be read: {error}") from error
        return spec


def _lists(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[int]]:
    return {name: list(shape) for name, shape in shapes.items()}
