"""Builds a policy from its spec and encoders."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from cache_pipeline.encoders.image_encoder import ImageEncoder
from cache_pipeline.encoders.obs_encoder import MultiImageObsEncoder
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.errors import ConfigError, available
from cache_pipeline.policies.rotations import RotationSlices
from cache_pipeline.policies.spec import POLICIES, PolicySpec
from cache_pipeline.policies.visuomotor import VisuomotorPolicy


def build_policy(spec: PolicySpec, encoders: Mapping[str, ImageEncoder], seed: int = 0) -> VisuomotorPolicy:
    """Builds the policy with frozen encoders. Its weights depend only on ``seed``; torch's generator is not used.

    Args:
        encoders: camera → encoder, cut at ``spec.cut``.

    Raises:
        ConfigError: unknown option or wrong value.
        EncoderError: encoders do not fit the cameras.
    """
    if spec.name not in POLICIES:
        raise ConfigError(f"{spec.name} cannot be exported or fine-tuned here; {available(POLICIES)}")
    policy_class, config = _head(spec.name)[0], policy_config(spec.name, spec.options)
    shapes: dict[str, Any] = {camera: {"shape": shape, "type": "rgb"} for camera, shape in spec.cameras.items()}
    shapes |= {key: {"shape": shape, "type": "low_dim"} for key, shape in spec.low_dim.items()}
    shared = spec.share_rgb_model and len({id(encoder) for encoder in encoders.values()}) == 1
    with torch.random.fork_rng(devices=[]):
        obs_encoder = MultiImageObsEncoder(
            {"obs": shapes},
            next(iter(encoders.values())) if shared else _copies(encoders),
            spec.emb_dim,
            freeze_rgb_encoder=True,
            share_rgb_model=shared,
            cut=spec.cut,
            pooling=spec.pooling,  # type: ignore[arg-type]
            preprocess={camera: Preprocess.from_json(value) for camera, value in spec.preprocess.items()},
            verbose=False,
        )
        torch.manual_seed(seed)
        _draw(obs_encoder.projection)
        _draw(obs_encoder.pooling)
        width = RotationSlices(spec.rotation_6d, spec.action_dim).encoded_width
        policy = policy_class(spec.obs_horizon * spec.emb_dim, spec.action_horizon, width, config)
    shape = (spec.obs_horizon, spec.action_horizon, spec.action_dim)
    return VisuomotorPolicy(obs_encoder, policy, shape, clip_actions=spec.clip_actions, rotations=spec.rotation_6d)


def _head(name: str) -> tuple[Any, Any]:
    """Returns the class and the config class of an action head: ``HEAD`` of the module of this name."""
    head: tuple[Any, Any] = importlib.import_module(f"cache_pipeline.policies.{name}").HEAD
    return head


def policy_config(name: str, options: Mapping[str, Any]) -> Any:
    """Returns the config of policy ``name``; raises ConfigError for unknown options."""
    config = _head(name)[1]
    known = [item.name for item in fields(config)]
    for key in options:
        if key not in known:
            raise ConfigError(f"policy {name} has no option {key!r}; {available(known, key)}")
    try:
        return config(**{key: tuple(value) if isinstance(value, list) else value for key, value in options.items()})
    except TypeError as error:
        raise ConfigError(f"policy {name}: {error}") from error


def _draw(module: nn.Module) -> None:
    """Redraws the weights of all linear and convolutional layers."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.reset_parameters()


def _copies(encoders: Mapping[str, ImageEncoder]) -> dict[str, ImageEncoder]:
    """Copies shared encoders, so that each camera has its own."""
    seen: set[int] = set()
    own = {}
    for camera, encoder in encoders.items():
        own[camera] = copy.deepcopy(encoder) if id(encoder) in seen else encoder
        seen.add(id(encoder))
    return own
