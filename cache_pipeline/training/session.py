"""A training run opened: data, encoders, policy, source and optimiser, checked, with nothing written yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.demos.windows import WindowSpec
from cache_pipeline.encoders.device import resolve_device
from cache_pipeline.encoders.image_encoder import EncoderSpec, ImageEncoder, build_encoder, make_preprocess
from cache_pipeline.encoders.precision import resolve_precision
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.errors import ConfigError
from cache_pipeline.extract.camera_encoders import restore_encoders
from cache_pipeline.extract.freshness import check_sources
from cache_pipeline.policies.robomimic.config import RobomimicConfig
from cache_pipeline.policies.robomimic.policy import CONFIG, build_robomimic_policy
from cache_pipeline.policies.spec import PolicySpec, build_policy
from cache_pipeline.policies.visuomotor import VisuomotorPolicy
from cache_pipeline.runs.checkpoint import Checkpoint, find_checkpoint, read_checkpoint, read_run, run_encoders
from cache_pipeline.runs.contents import recorded_contents
from cache_pipeline.training.config import TrainConfig
from cache_pipeline.training.data.opening import (
    RunData,
    SourcePlan,
    SplitNames,
    check_cameras,
    frozen_encode,
    open_cache_data,
    open_cached,
    open_dataset_data,
    open_live,
    plan_source,
    tell_choice,
)
from cache_pipeline.training.data.sampler import Sampler
from cache_pipeline.training.data.source import Source, SplitRows
from cache_pipeline.training.robomimic import RobomimicLearner, fit_robomimic, robomimic_config, robomimic_splits
from cache_pipeline.training.run import check_resumed
from cache_pipeline.training.update.learner import Learner, PolicyLearner

STATISTICS_ROWS = 1024


class TrainSession(NamedTuple):
    """What a training run works with.

    Attributes:
        splits: windows of the train and of the held-out split.
        learner: a PolicyLearner, or a RobomimicLearner.
        resumed: the checkpoint from which the run goes on; its state is in the learner.
    """

    config: TrainConfig
    device: torch.device
    data: RunData
    spec: PolicySpec
    encoders: dict[str, ImageEncoder]
    splits: tuple[SplitRows, SplitRows | None]
    plan: SourcePlan
    source: Source
    learner: Any
    sampler: Sampler
    resumed: Checkpoint | None


def open_session(config: TrainConfig, run: Path) -> TrainSession:
    """Opens everything that ``config`` asks for, the normalisation's statistics taken, or the run's state read.

    Args:
        run: the run folder; looked at only when resuming.

    Raises:
        ConfigError, DatasetError, CacheError, EncoderError, CheckpointError: what does not fit.
    """
    device = resolve_device(config.device)
    bridge = robomimic_config(config) if config.robomimic else None
    data = _open(config if bridge is None else _with_keys(config, bridge), run)
    check_cameras(data.cameras)
    tell_choice(data)
    before = check_resumed(run, config, data.identity) if config.resume else None
    spec, encoders = _resumed(run, before, config.named_factory) if before is not None else _fresh(config, bridge, data)
    opened = _open_own if bridge is None else _open_robomimic
    splits, plan, source, learner, batch_size = opened(config, spec, encoders, data, device, before)
    resumed: Checkpoint | None = None
    if before is not None:
        resumed = read_checkpoint(find_checkpoint(run, latest=True)[1])
        learner.load(resumed.model, resumed.ema, resumed.resume)
    sampler = Sampler(len(splits[0]), batch_size, config.seed, views=plan.views, blocks=plan.blocks)
    return TrainSession(config, device, data, spec, encoders, splits, plan, source, learner, sampler, resumed)


class _Opened(NamedTuple):
    splits: tuple[SplitRows, SplitRows | None]
    plan: SourcePlan
    source: Source
    learner: Learner
    batch_size: int


def _open_own(
    config: TrainConfig,
    spec: PolicySpec,
    encoders: Mapping[str, ImageEncoder],
    data: RunData,
    device: torch.device,
    before: Mapping[str, Any] | None,
) -> _Opened:
    assert config.batch_size is not None
    policy = build_policy(spec, encoders, config.seed).to(device)
    policy.feature_noise, policy.feature_dropout = config.feature_noise, config.feature_dropout
    policy.precision = resolve_precision(config.precision, device)
    splits = data.splits(WindowSpec(spec.obs_horizon, spec.action_horizon), device)
    plan = _plan(config, data, len(splits[0]), device, before)
    source = _source(config, data, plan, splits, spec, encoders, device)
    learner = _learner(config, policy, device)
    if before is None:
        fit_statistics(policy, data, source, config.action_normalization)
    return _Opened(splits, plan, source, learner, config.batch_size)


def _open_robomimic(
    config: TrainConfig,
    spec: PolicySpec,
    encoders: Mapping[str, ImageEncoder],
    data: RunData,
    device: torch.device,
    before: Mapping[str, Any] | None,
) -> _Opened:
    policy = build_robomimic_policy(spec, encoders, device, config.seed)
    splits = robomimic_splits(policy.config, data.rows, device)
    plan = _plan(config, data, len(splits[0]), device, before)
    source = _source(config, data, plan, splits, spec, encoders, device)
    precision = "tf32" if config.precision == "tf32" else "fp32"
    learner = RobomimicLearner(policy, windows=len(splits[0]), seed=config.seed, precision=precision)
    if before is None:
        fit_robomimic(policy, data.rows, source)
    return _Opened(splits, plan, source, learner, policy.config.batch_size)


def fit_statistics(policy: VisuomotorPolicy, data: RunData, source: Source, normalization: Any) -> None:
    """Takes the normalisation's statistics: of features from rows spread over the train split, of the rest from all."""
    rows = data.rows.train_rows
    chosen = np.unique(np.linspace(0, rows - 1, min(rows, STATISTICS_ROWS)).round().astype(np.int64))
    low_dim = {key: values[:rows] for key, values in data.rows.low_dim.items()}
    policy.fit(source.features_of(chosen), low_dim, data.rows.actions[:rows], normalization)


def _with_keys(config: TrainConfig, bridge: RobomimicConfig) -> TrainConfig:
    """Cameras, low-dim keys and filter keys of a robomimic JSON, where no option names others."""
    if config.robomimic_config is None:
        return config
    train, valid = bridge.filter_keys
    return replace(
        config,
        cameras=config.cameras if config.cameras is not None else bridge.cameras,
        low_dim_keys=config.low_dim_keys if config.low_dim_keys is not None else bridge.low_dim,
        filter_key=config.filter_key or train,
        valid_key=config.valid_key or valid,
    )


def _open(config: TrainConfig, run: Path) -> RunData:
    names = SplitNames(config.filter_key, config.valid_key, config.seed)
    if config.resume:
        before = read_run(run)["data"]
        known = None if config.deep else recorded_contents(before)
        names = names._replace(run_data=before, where=str(run), known=known)
    if config.cache is not None:
        check_sources(FeatureCache(config.cache), config.datasets, deep=config.deep)
    if config.live:
        return open_dataset_data(config.datasets, config.cameras, config.low_dim_keys, names)
    assert config.cache is not None
    return open_cache_data(config.cache, config.cameras, config.low_dim_keys, names)


def _resumed(run: Path, before: Mapping[str, Any], encoder: str | None) -> tuple[PolicySpec, dict[str, ImageEncoder]]:
    spec = PolicySpec.from_json(before.get("policy"))
    return spec, run_encoders(run, spec, encoder)


def _fresh(
    config: TrainConfig, bridge: RobomimicConfig | None, data: RunData
) -> tuple[PolicySpec, dict[str, ImageEncoder]]:
    if config.cache is not None:
        cache = data.cache or FeatureCache(config.cache)
        encoders, preprocess = _cache_encoders(cache, tuple(data.cameras), config.named_factory)
    else:
        encoders, preprocess = _live_encoders(config, data)
    distinct = list(dict.fromkeys(id(encoder) for encoder in encoders.values()))
    names = ["encoder.safetensors", *(f"encoder_{number}.safetensors" for number in range(2, len(distinct) + 1))]
    if bridge is None:
        assert config.obs_horizon is not None
        assert config.action_horizon is not None
        name, options = config.policy, dict(config.policy_options)
        horizons = (config.obs_horizon, config.action_horizon)
    else:
        name, options = bridge.name, {CONFIG: bridge.on_features(tuple(data.cameras), tuple(data.low_dim)).json}
        horizons = (bridge.obs_horizon, 1)
    spec = PolicySpec(
        name=name,
        options=options,
        emb_dim=config.emb_dim,
        obs_horizon=horizons[0],
        action_horizon=horizons[1],
        action_dim=int(data.rows.actions.shape[1]),
        cameras=data.cameras,
        low_dim=data.low_dim,
        preprocess={camera: value.to_json() for camera, value in preprocess.items()},
        encoder_files={camera: names[distinct.index(id(encoder))] for camera, encoder in encoders.items()},
        cut=next(iter(encoders.values())).cut,
        share_rgb_model=config.freeze_encoder or config.share_rgb_model,
        clip_actions=bridge is None and config.action_normalization == "minmax",
        rotation_6d=() if bridge is not None else config.rotation_6d,
    )
    return spec, encoders


def _cache_encoders(
    cache: FeatureCache, cameras: Sequence[str], encoder: str | None
) -> tuple[dict[str, ImageEncoder], dict[str, Preprocess]]:
    entries = {camera: cache.cameras[camera] for camera in cameras}
    preprocess = {camera: Preprocess.from_json(entry.identity["preprocess"]) for camera, entry in entries.items()}
    return restore_encoders(cache, encoder, cameras), preprocess


def _live_encoders(config: TrainConfig, data: RunData) -> tuple[dict[str, ImageEncoder], dict[str, Preprocess]]:
    encoder = build_encoder(config.encoder if config.encoder is not None else EncoderSpec())
    preprocess = config.preprocess if config.preprocess is not None else make_preprocess(encoder)
    return dict.fromkeys(data.cameras, encoder), dict.fromkeys(data.cameras, preprocess)


def _plan(
    config: TrainConfig, data: RunData, windows: int, device: torch.device, before: Mapping[str, Any] | None
) -> SourcePlan:
    views = _views(config, data)
    plan = plan_source(
        data,
        windows,
        source=config.source,
        order=config.order,
        views=views,
        max_memory=config.max_memory,
        device=device,
    )
    return plan if before is None else plan.in_order_of(before)


def _views(config: TrainConfig, data: RunData) -> int:
    if data.cache is None:
        return 1
    views = min(data.cache.cameras[camera].views for camera in data.cameras)
    if config.augment and views == 1:
        raise ConfigError(f"{data.cache.path} has the clean view alone; run its extract-features again with --views 4")
    return 1 if config.augment is False else views


def _source(
    config: TrainConfig,
    data: RunData,
    plan: SourcePlan,
    splits: tuple[SplitRows, SplitRows | None],
    spec: PolicySpec,
    encoders: Mapping[str, ImageEncoder],
    device: torch.device,
) -> Source:
    if plan.source != "live":
        return open_cached(data, plan, splits, max_memory=config.max_memory, device=device)
    preprocess = {camera: Preprocess.from_json(value) for camera, value in spec.preprocess.items()}
    return open_live(
        data,
        splits,
        frozen_encode(encoders, preprocess, device, config.precision),
        hand_on_frames=not config.freeze_encoder,
        max_memory=config.max_memory,
        device=device,
    )


def _learner(config: TrainConfig, policy: VisuomotorPolicy, device: torch.device) -> PolicyLearner:
    learner = PolicyLearner(
        policy,
        config.optim,
        rates={"policy": config.lr, "encoder": config.encoder_lr},
        steps=config.steps,
        seed=config.seed,
        device=device,
    )
    if not config.freeze_encoder:
        policy.carries_encoder = True
        policy.obs_encoder.key_model_map.to(memory_format=torch.channels_last).requires_grad_(True)
        learner.learn("encoder", policy.encoder_parameters())
    policy.train()
    return learner
