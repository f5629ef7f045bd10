"""Trains a policy on cached features or with live encoding."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from cache_pipeline.files import absolute
from cache_pipeline.policies.build import build_policy
from cache_pipeline.policies.robomimic.config import RobomimicConfig
from cache_pipeline.policies.robomimic.policy import CONFIG, RobomimicPolicy, build_robomimic_policy
from cache_pipeline.policies.spec import PolicySpec
from cache_pipeline.policies.visuomotor import VisuomotorPolicy
from cache_pipeline.runs.checkpoint import find_checkpoint, read_checkpoint
from cache_pipeline.runs.contents import recorded_contents
from cache_pipeline.runs.policy import run_encoders
from cache_pipeline.runs.record import RunRecord, read_record
from cache_pipeline.training.config import TrainConfig
from cache_pipeline.training.data.run_data import (
    DemoChoice,
    RunData,
    features_precision,
    open_cache_data,
    open_dataset_data,
    tell_choice,
)
from cache_pipeline.training.data.source import Source
from cache_pipeline.training.result import TrainResult
from cache_pipeline.training.robomimic import RobomimicLearner, fit_robomimic, robomimic_config, robomimic_splits
from cache_pipeline.training.run import run_session
from cache_pipeline.training.session import Session, Trainee, assemble, augment, check_resumed, continued
from cache_pipeline.training.update.learner import PolicyLearner
from cache_pipeline.training.update.unfreezing import ALL, Unfreezing

logger = logging.getLogger("cache_pipeline")

RUNS = Path("runs")
STATISTICS_ROWS = 1024


def train(config: TrainConfig, *, progress: bool = True) -> TrainResult:
    """Trains a policy as ``config`` says and writes a run folder.

    Raises:
        ConfigError: options do not fit the data.
        DatasetError, CacheError: the data cannot be used.
        CheckpointError: the run folder exists, a run to resume does not fit, or a value is not finite.
        RunLockedError: another process writes the run folder.
        RunStopped: SIGINT or SIGTERM stopped the run; it was saved and can be resumed.
    """
    out = config.out if config.out is not None else default_run(config)
    return run_session(config, out, open_training, progress=progress)


def default_run(config: TrainConfig) -> Path:
    """Returns the default run folder: ``runs/<name of the cache or of the first dataset>``."""
    return RUNS / Path(absolute(config.cache or config.datasets[0])).stem


def open_training(config: TrainConfig, run: Path) -> Session:
    """Opens the data, encoders and policy of ``config``; computes statistics, or reads the state of the run to resume.

    Args:
        run: the run folder; read only on resume.

    Raises:
        ConfigError, DatasetError, CacheError, EncoderError, CheckpointError: an input does not fit the others.
    """
    device = resolve_device(config.device)
    bridge = robomimic_config(config) if config.robomimic else None
    before = read_record(run) if config.resume else None
    data = _open_data(config if bridge is None else _with_keys(config, bridge), before, run)
    if not data.cameras:
        raise ConfigError("no cameras are chosen; name at least one with --cameras")
    tell_choice(data)
    if before is not None:
        check_resumed(before, run, config, data)
        spec, encoders = before.policy, run_encoders(run, before.policy, config.named_factory)
    else:
        spec, encoders = _new_policy(config, bridge, data)
    trainee = (_own_trainee if bridge is None else _robomimic_trainee)(config, spec, encoders, data, device)
    session = assemble(
        config,
        device,
        data,
        trainee,
        before,
        frames=lambda: data,
        precision=resolve_precision(config.precision, device) if config.live else features_precision(data),
        views=_views(config, data),
        unfreezing=() if config.freeze_encoder else (Unfreezing(0, (ALL,)),),
    )
    if before is not None:
        return continued(session, read_checkpoint(find_checkpoint(run, latest=True)[1]))
    source = session.sources.open(live=config.live)
    if isinstance(trainee.policy, RobomimicPolicy):
        fit_robomimic(trainee.policy, data.rows, source)
    else:
        fit_statistics(trainee.policy, data, source, config.action_normalization)
    return session


def fit_statistics(policy: VisuomotorPolicy, data: RunData, source: Source, normalization: Any) -> None:
    """Computes normalisation statistics: of features from a sample of train rows, of the rest from all train rows."""
    rows = data.rows.train_rows
    chosen = np.unique(np.linspace(0, rows - 1, min(rows, STATISTICS_ROWS)).round().astype(np.int64))
    low_dim = {key: values[:rows] for key, values in data.rows.low_dim.items()}
    policy.fit(source.features_of(chosen), low_dim, data.rows.actions[:rows], normalization)


def _open_data(config: TrainConfig, before: RunRecord | None, run: Path) -> RunData:
    choice = DemoChoice(config.filter_key, config.valid_key, config.seed)
    if before is not None:
        known = None if config.deep else recorded_contents(before.data)
        choice = choice._replace(recorded=before.data, where=str(run), known=known)
    if config.cache is not None:
        check_sources(FeatureCache(config.cache), config.datasets, deep=config.deep)
    if config.live:
        return open_dataset_data(config.datasets, config.cameras, config.low_dim_keys, choice, config.action_key)
    assert config.cache is not None
    return open_cache_data(config.cache, config.cameras, config.low_dim_keys, choice, config.action_key)


def _with_keys(config: TrainConfig, bridge: RobomimicConfig) -> TrainConfig:
    """Fills in cameras, low-dim keys and filter keys from a robomimic JSON, unless options name others."""
    if config.robomimic_config is None:
        return config
    train, valid = bridge.filter_keys
    return replace(
        config,
        cameras=config.cameras if config.cameras is not None else bridge.cameras,
        low_dim_keys=config.low_dim_keys if config.low_dim_keys is not None else bridge.low_dim,
        filter_key=config.filter_key or train,
        valid_key=config.valid_key or valid,
        action_key=config.action_key or bridge.action_keys,
    )


def _own_trainee(
    config: TrainConfig, spec: PolicySpec, encoders: Mapping[str, ImageEncoder], data: RunData, device: torch.device
) -> Trainee:
    assert config.batch_size is not None
    policy = build_policy(spec, encoders, config.seed).to(device)
    policy.feature_noise, policy.feature_dropout = config.feature_noise, config.feature_dropout
    augment(policy, spec, config.augmentation if config.live and config.augment else None)
    policy.precision = resolve_precision(config.precision, device)
    if not config.freeze_encoder:
        policy.carries_encoder = True
        policy.obs_encoder.key_model_map.to(memory_format=torch.channels_last)
    learner = PolicyLearner(
        policy,
        config.optim,
        rates={"policy": config.lr, "encoder": config.encoder_lr},
        steps=config.steps,
        seed=config.seed,
        device=device,
    )
    policy.train()
    policy.obs_encoder.log_encoders()
    if config.freeze_encoder:
        logger.info("the encoder is frozen; %s", policy.obs_encoder.parameter_report())
    splits = data.splits(WindowSpec(spec.obs_horizon, spec.action_horizon), device)
    return Trainee(spec, encoders, policy, splits, learner, config.batch_size)


def _robomimic_trainee(
    config: TrainConfig, spec: PolicySpec, encoders: Mapping[str, ImageEncoder], data: RunData, device: torch.device
) -> Trainee:
    policy = build_robomimic_policy(spec, encoders, device, config.seed)
    splits = robomimic_splits(policy.config, data.rows, device)
    precision = "tf32" if config.precision == "tf32" else "fp32"
    learner = RobomimicLearner(policy, windows=len(splits[0]), seed=config.seed, precision=precision)
    return Trainee(spec, encoders, policy, splits, learner, policy.config.batch_size)


def _new_policy(
    config: TrainConfig, bridge: RobomimicConfig | None, data: RunData
) -> tuple[PolicySpec, dict[str, ImageEncoder]]:
    """Returns the spec and the encoders of a new run."""
    if config.cache is not None:
        encoders, preprocess = _cache_encoders(data.cache or FeatureCache(config.cache), config, data)
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
        pooling=config.pooling,
    )
    return spec, encoders


def _cache_encoders(
    cache: FeatureCache, config: TrainConfig, data: RunData
) -> tuple[dict[str, ImageEncoder], dict[str, Preprocess]]:
    preprocess = {camera: Preprocess.from_json(cache.cameras[camera].identity["preprocess"]) for camera in data.cameras}
    return restore_encoders(cache, config.named_factory, tuple(data.cameras)), preprocess


def _live_encoders(config: TrainConfig, data: RunData) -> tuple[dict[str, ImageEncoder], dict[str, Preprocess]]:
    encoder = build_encoder(config.encoder if config.encoder is not None else EncoderSpec())
    preprocess = config.preprocess if config.preprocess is not None else make_preprocess(encoder)
    return dict.fromkeys(data.cameras, encoder), dict.fromkeys(data.cameras, preprocess)


def _views(config: TrainConfig, data: RunData) -> int:
    if data.cache is None:
        return 1
    views = min(data.cache.cameras[camera].views for camera in data.cameras)
    if config.augment and views == 1:
        raise ConfigError(f"{data.cache.path} has only the clean view; run its extract-features again with --views 4")
    return 1 if config.augment is False else views
