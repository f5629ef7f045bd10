"""Opens and checks everything that a run needs; writes nothing.

``open_training`` opens a new run, or a run to resume; ``open_finetuning`` in finetune.py opens one from another run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.demos.windows import WindowSpec
from cache_pipeline.encoders.device import resolve_device
from cache_pipeline.encoders.frozen import FrozenEncoder, frozen_encoders
from cache_pipeline.encoders.image_encoder import EncoderSpec, ImageEncoder, build_encoder, make_preprocess
from cache_pipeline.encoders.precision import resolve_precision
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.errors import CheckpointError, ConfigError
from cache_pipeline.extract.camera_encoders import restore_encoders
from cache_pipeline.extract.freshness import check_sources
from cache_pipeline.policies.build import build_policy
from cache_pipeline.policies.robomimic.config import RobomimicConfig
from cache_pipeline.policies.robomimic.policy import CONFIG, RobomimicPolicy, build_robomimic_policy
from cache_pipeline.policies.spec import PolicySpec
from cache_pipeline.policies.visuomotor import VisuomotorPolicy
from cache_pipeline.runs.checkpoint import Checkpoint, find_checkpoint, read_checkpoint
from cache_pipeline.runs.contents import recorded_contents
from cache_pipeline.runs.policy import run_encoders
from cache_pipeline.runs.record import RunRecord, read_record, this_process
from cache_pipeline.training.config import FinetuneConfig, TrainConfig
from cache_pipeline.training.data.run_data import (
    DemoChoice,
    RunData,
    check_cameras,
    features_precision,
    open_cache_data,
    open_dataset_data,
    tell_choice,
)
from cache_pipeline.training.data.sampler import Sampler
from cache_pipeline.training.data.source import Source, SplitRows
from cache_pipeline.training.data.sources import SourcePlan, Sources, plan_source
from cache_pipeline.training.evaluate import ActionError, evaluate
from cache_pipeline.training.robomimic import RobomimicLearner, fit_robomimic, robomimic_config, robomimic_splits
from cache_pipeline.training.update.learner import PolicyLearner
from cache_pipeline.training.update.unfreezing import ALL, Unfreezing, above_cut, frozen_cut, unfreeze

logger = logging.getLogger("cache_pipeline")

STATISTICS_ROWS = 1024
# Options that may change on resume: they affect outputs or the device, not what is learned.
FREE_TO_CHANGE = {
    "resume",
    "overwrite",
    "out",
    "saving",
    "device",
    "encoder_factory",
    "deep",
    "max_memory",
    "source",
    "cache",
    "datasets",
    "wandb",
    "steps",
}


class Phase(NamedTuple):
    """Steps ``start`` to ``stop``; ``layers`` of the encoder learn from ``start`` on."""

    start: int
    stop: int
    layers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Session:
    """Everything that a run needs for training.

    Attributes:
        record: the contents of run.json.
        encoders: camera → the initial encoder of the run.
        splits: windows of the train and of the held-out split.
        learner: trains ``policy``.
        unfreezing: encoder layers and the step from which they learn; empty if the encoder stays frozen.
        resumed: the checkpoint from which the run continues; the learner already has its state.
    """

    config: TrainConfig | FinetuneConfig
    record: RunRecord
    device: torch.device
    data: RunData
    encoders: Mapping[str, ImageEncoder]
    policy: VisuomotorPolicy | RobomimicPolicy
    splits: tuple[SplitRows, SplitRows | None]
    sources: Sources
    learner: Any
    sampler: Sampler
    unfreezing: tuple[Unfreezing, ...] = ()
    resumed: Checkpoint | None = None

    @property
    def files(self) -> dict[str, ImageEncoder]:
        """Returns the encoders by file name in the run folder."""
        return {self.record.policy.encoder_files[camera]: encoder for camera, encoder in self.encoders.items()}

    def phases(self) -> list[Phase]:
        """Returns one phase per unfreezing; before the first, only projection and policy learn."""
        begins = self.unfreezing
        if not begins or begins[0].step > 0:
            begins = (Unfreezing(0, ()), *begins)
        stops = [*(item.step for item in begins[1:]), self.config.steps]
        return [Phase(item.step, stop, item.layers) for item, stop in zip(begins, stops, strict=True)]

    def enter(self, phase: Phase) -> Source:
        """Unfreezes the layers of a phase, and opens the source for its steps."""
        self.unfreeze(phase.layers, phase.start)
        return self.source_at(phase.start)

    def unfreeze(self, layers: tuple[str, ...], step: int) -> None:
        """Unfreezes layers of the encoder from ``step`` on."""
        if layers:
            assert isinstance(self.policy, VisuomotorPolicy)
            freeze = self.config.freeze if isinstance(self.config, FinetuneConfig) else None
            self.learner.learn("encoder", unfreeze(self.policy, layers, freeze), step)
            names, report = ", ".join(layers), self.policy.obs_encoder.parameter_report()
            logger.info("from step %d on the encoder's %s learns; %s", step, names, report)

    def source_at(self, step: int) -> Source:
        """Opens the source for a step. With live frames, frozen layers run on the fast path."""
        policy, cut = self.policy, self.record.policy.cut
        live, frozen = self.sources.plan.source == "live", cut
        learning = tuple(layer for item in self.unfreezing if item.step <= step for layer in item.layers)
        if learning:
            assert isinstance(policy, VisuomotorPolicy)
            live, frozen = live or not above_cut(policy, learning, cut), frozen_cut(policy, learning) or ""
        source = self.sources.open(live=live)
        if isinstance(policy, VisuomotorPolicy):
            policy.obs_encoder.cut_at(frozen if live and frozen else cut)
        policy.frozen_trunks = self._frozen_trunks() if live and frozen else {}
        return source

    def _frozen_trunks(self) -> dict[str, FrozenEncoder]:
        precision = self.record.precision or "auto"
        return frozen_encoders(self.policy.encoders, self.policy.preprocessing, self.device, precision)

    @property
    def measurable(self) -> bool:
        """Whether the run has held-out windows."""
        return self.splits[1] is not None

    def measure(self) -> ActionError:
        """Measures the held-out action error of the current policy."""
        valid, source, policy = self.splits[1], self.sources.current, self.learner.policy
        assert valid is not None
        assert source is not None
        most = self.config.saving.eval_windows
        policy.eval()
        try:
            return evaluate(policy, source, len(valid), self.data.mean_action, device=self.device, most=most)
        finally:
            policy.train()


class Trainee(NamedTuple):
    """A policy with its initial encoders, its windows and its learner."""

    spec: PolicySpec
    encoders: Mapping[str, ImageEncoder]
    policy: VisuomotorPolicy | RobomimicPolicy
    splits: tuple[SplitRows, SplitRows | None]
    learner: Any
    batch_size: int


def assemble(
    config: TrainConfig | FinetuneConfig,
    device: torch.device,
    data: RunData,
    trainee: Trainee,
    before: RunRecord | None,
    *,
    frames: Callable[[], RunData],
    precision: str,
    views: int = 1,
    unfreezing: tuple[Unfreezing, ...] = (),
    start: Path | None = None,
) -> Session:
    """Plans the source and the order of samples, and builds a session.

    Args:
        before: record of the run to resume; its order of samples is kept.
        frames: opens the dataset with the frames of the same demos.
        precision: precision in which features are computed.
        views: number of views to draw from.
        start: checkpoint from which fine-tuning starts.
    """
    windows, policy = len(trainee.splits[0]), trainee.policy
    plan = plan_source(
        data,
        windows,
        source=config.source,
        order=config.order,
        views=views,
        max_memory=config.max_memory,
        device=device,
    )
    if before is not None:
        plan, record = plan.with_order(before.order), before.with_steps(config.steps)
    else:
        record = _new_record(config, trainee.spec, data, plan, start)
    sources = Sources(
        data,
        trainee.splits,
        plan,
        frames=frames,
        encoders=lambda: frozen_encoders(policy.encoders, policy.preprocessing, device, "fp32"),
        max_memory=config.max_memory,
        device=device,
    )
    return Session(
        config=config,
        record=replace(record, precision=precision),
        device=device,
        data=data,
        encoders=trainee.encoders,
        policy=policy,
        splits=trainee.splits,
        sources=sources,
        learner=trainee.learner,
        sampler=Sampler(windows, trainee.batch_size, config.seed, views=plan.views, blocks=plan.blocks),
        unfreezing=unfreezing,
    )


def _new_record(
    config: TrainConfig | FinetuneConfig, spec: PolicySpec, data: RunData, plan: SourcePlan, start: Path | None
) -> RunRecord:
    return RunRecord(
        kind="train" if isinstance(config, TrainConfig) else "finetune",
        config=config.to_json(),
        policy=spec,
        data=data.record,
        order=plan.order,
        start=None if start is None else str(start.resolve()),
        **this_process(),
    )


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
    check_cameras(data.cameras)
    tell_choice(data)
    if before is not None:
        check_resumed(before, run, config, data)
        spec, encoders = before.policy, run_encoders(run, before.policy, config.named_factory)
    else:
        spec, encoders = _new_policy(config, bridge, data)
    trainee = (_own_trainee if bridge is None else _robomimic_trainee)(config, spec, encoders, data, device)
    live = data.cache is None or config.source == "live"
    session = assemble(
        config,
        device,
        data,
        trainee,
        before,
        frames=lambda: data,
        precision=resolve_precision(config.precision, device) if live else features_precision(data),
        views=_views(config, data),
        unfreezing=() if config.freeze_encoder else (Unfreezing(0, (ALL,)),),
    )
    if before is not None:
        return continued(session, read_checkpoint(find_checkpoint(run, latest=True)[1]))
    source = session.sources.open(live=live)
    if isinstance(trainee.policy, RobomimicPolicy):
        fit_robomimic(trainee.policy, data.rows, source)
    else:
        fit_statistics(trainee.policy, data, source, config.action_normalization)
    return session


def continued(session: Session, checkpoint: Checkpoint) -> Session:
    """Loads a checkpoint into the session of a run to resume; raises CheckpointError if it does not fit."""
    for item in session.unfreezing:
        if item.step < checkpoint.step:
            session.unfreeze(item.layers, item.step)
    session.learner.load(checkpoint.state)
    return replace(session, resumed=checkpoint)


def check_resumed(before: RunRecord, run: Path, config: TrainConfig | FinetuneConfig, data: RunData) -> None:
    """Raises CheckpointError for the first option, or the cache, that differs from that of the run to resume."""
    recorded = type(config).from_json(before.config).to_json()
    for name, now in config.to_json().items():
        if name not in FREE_TO_CHANGE and recorded[name] != now:
            raise CheckpointError(
                f"{run} was trained with {name} {recorded[name]!r} but is resumed with {now!r}; give the same value, "
                f"or another --out"
            )
    fingerprints = {before.data.fingerprint, data.record.fingerprint} - {None}
    if len(fingerprints) > 1:
        raise CheckpointError(f"the cache has changed since {run} was trained; give another --out to start a new run")
    if config.steps < before.steps:
        raise CheckpointError(
            f"{run} is a run of {before.steps} steps but is resumed with {config.steps}; give --steps "
            f"{before.steps}, or more to extend it"
        )
    if config.steps > before.steps:
        logger.info("%s and its learning-rate schedule now end at step %d, not %d", run, config.steps, before.steps)


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
        return open_dataset_data(config.datasets, config.cameras, config.low_dim_keys, choice)
    assert config.cache is not None
    return open_cache_data(config.cache, config.cameras, config.low_dim_keys, choice)


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
    )


def _own_trainee(
    config: TrainConfig, spec: PolicySpec, encoders: Mapping[str, ImageEncoder], data: RunData, device: torch.device
) -> Trainee:
    assert config.batch_size is not None
    policy = build_policy(spec, encoders, config.seed).to(device)
    policy.feature_noise, policy.feature_dropout = config.feature_noise, config.feature_dropout
    policy.augmentation = config.augmentation if config.live and config.augment else None
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
