"""Whether a checkpoint fits the data that it is to be used with, and whether live and cached losses agree."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cache_pipeline.errors import CheckpointError, StaleCacheError
from cache_pipeline.policies.batch import Batch
from cache_pipeline.policies.spec import PolicySpec
from cache_pipeline.policies.visuomotor import VisuomotorPolicy
from cache_pipeline.training.data import RunData

logger = logging.getLogger("cache_pipeline")

# Largest relative difference of two losses on one batch, by what lies between them.
TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "low precision": 5e-2}


def check_fits(spec: PolicySpec, data: RunData, checkpoint: Path) -> None:
    """Raises CheckpointError naming the first difference between what the policy takes and what the data hold."""
    pairs: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = [
        ("images of camera", spec.cameras, data.cameras),
        ("rows of low-dim key", spec.low_dim, data.low_dim),
    ]
    for what, wanted, there in pairs:
        for name, shape in wanted.items():
            if name not in there or tuple(there[name]) != tuple(shape):
                found = tuple(there[name]) if name in there else "none"
                raise CheckpointError(
                    f"{checkpoint} does not fit the data: it takes {what} {name} of shape {tuple(shape)}, they have "
                    f"{found}; give the dataset that it was trained on, or train anew"
                )
    if spec.action_dim != data.rows.actions.shape[1]:
        raise CheckpointError(
            f"{checkpoint} does not fit the data: it predicts {spec.action_dim} action dimensions, the data have "
            f"{data.rows.actions.shape[1]}; give the dataset that it was trained on, or train anew"
        )


def check_frontier(policy: VisuomotorPolicy, data: RunData) -> None:
    """Raises StaleCacheError unless the cache was made by the policy's encoders with its preprocessing."""
    assert data.cache is not None
    for camera in data.cameras:
        identity = data.cache.cameras[camera].identity
        encoder, preprocess = policy.obs_encoder.key_model_map[camera], policy.obs_encoder.preprocessing[camera]
        pairs = [
            ("encoder.weights", identity["weights"]["digest"], encoder.trunk_digest(identity["cut"])),
            ("preprocess", identity["preprocess"], preprocess.to_json()),
        ]
        for field, cached, wanted in pairs:
            if cached != wanted:
                raise StaleCacheError(
                    f"{camera}: {field}",
                    cached,
                    wanted,
                    "its features are not those that the run's policy was trained on",
                    "extract them again with --encoder-from RUN and the same --cut",
                )


@torch.no_grad()
def loss_on(policy: VisuomotorPolicy, batch: Batch, seed: int) -> float:
    """The loss on a batch in eval mode, a function of ``seed``."""
    policy.eval()
    loss = float(policy.loss(batch, torch.Generator(policy.device).manual_seed(seed)))
    policy.train()
    return loss


def check_first_loss(losses: tuple[float, float], *, tolerance: float, what: str) -> None:
    """Raises CheckpointError unless the loss on a batch equals that on the same windows from another source."""
    difference = abs(losses[0] - losses[1]) / max(abs(losses[1]), 1e-12)
    if not difference <= tolerance:
        raise CheckpointError(
            f"the first loss is {losses[0]:.6g}, but {losses[1]:.6g} on the same batch from {what} ({difference:.1e} "
            f"relative, {tolerance:.0e} is allowed): frames or encoder are not those that the run was trained on"
        )
    logger.info("first loss %.6g, %.6g on the same batch from %s", *losses, what)
