"""Fine-tunes a run with encoder layers unfrozen: live, or live only above the cut of a frontier cache."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.demos.remote import is_there
from cache_pipeline.demos.windows import WindowSpec
from cache_pipeline.encoders.device import resolve_device
from cache_pipeline.encoders.image_encoder import ImageEncoder
from cache_pipeline.encoders.precision import emulates, nearest_precision, resolve_precision
from cache_pipeline.errors import CacheError, CheckpointError, ConfigError, DatasetError, OptionError
from cache_pipeline.extract.freshness import check_sources
from cache_pipeline.files import Location, location, resolved
from cache_pipeline.policies.build import build_policy
from cache_pipeline.policies.spec import PolicySpec
from cache_pipeline.policies.visuomotor import ENCODERS, VisuomotorPolicy
from cache_pipeline.runs.checkpoint import Checkpoint, find_checkpoint, read_checkpoint
from cache_pipeline.runs.contents import recorded_contents
from cache_pipeline.runs.policy import run_encoders
from cache_pipeline.runs.record import RunRecord, read_record
from cache_pipeline.training.agreement import check_encoders, check_features, check_fits
from cache_pipeline.training.config import FinetuneConfig
from cache_pipeline.training.data.rows import cache_row_numbers
from cache_pipeline.training.data.run_data import (
    DemoChoice,
    RunData,
    features_precision,
    open_cache_data,
    open_dataset_data,
    tell_choice,
)
from cache_pipeline.training.result import TrainResult
from cache_pipeline.training.run import run_session
from cache_pipeline.training.session import Session, Trainee, assemble, augment, check_resumed, continued
from cache_pipeline.training.update.distributed import current_ranks
from cache_pipeline.training.update.learner import PolicyLearner
from cache_pipeline.training.update.unfreezing import (
    Unfreezing,
    above_cut,
    check_freeze,
    check_layers,
    parse_unfreezing,
)

logger = logging.getLogger("cache_pipeline")

ENCODER_RATE = 1e-5


def finetune(config: FinetuneConfig, *, progress: bool = True) -> TrainResult:
    """Fine-tunes a run as ``config`` says and writes a new run folder.

    Raises:
        ConfigError: options do not fit the run, or a layer does not exist.
        DatasetError, CacheError: data that cannot be used.
        CheckpointError: the run is damaged, does not fit the data, or its features differ from those of its cache.
        RunLockedError: another process writes the run folder.
        RunStopped: SIGINT or SIGTERM stopped the run; it was saved and can be resumed.
    """
    base, folder = find_checkpoint(config.checkpoint)
    named = base if base.name.strip(".") else resolved(base)  # "." and ".." have no name of their own
    run = config.out if config.out is not None else named.with_name(f"{named.name}_finetune")
    return run_session(config, run, partial(open_finetuning, base=base, folder=folder), progress=progress)


class Origin(NamedTuple):
    """The run from which fine-tuning starts.

    Attributes:
        checkpoint: source of the weights: the checkpoint to fine-tune, or the latest of a run to resume.
        record: record of the run that has this checkpoint.
        base: record of the run that is fine-tuned; differs from ``record`` only on resume.
        encoders: camera → the initial encoder.
    """

    checkpoint: Checkpoint
    record: RunRecord
    base: RunRecord
    encoders: Mapping[str, ImageEncoder]


def open_finetuning(config: FinetuneConfig, run: Path, *, base: Path, folder: Path) -> Session:
    """Opens a run that fine-tunes ``folder``, a checkpoint of ``base``, or that resumes such a run.

    Raises:
        As ``finetune`` does.
    """
    if config.batchnorm == "update" and current_ranks().world > 1:
        raise ConfigError("BatchNorm statistics would differ between processes; leave --update-batchnorm out")
    device = resolve_device(config.device)
    unfreezing = parse_unfreezing(config.unfreeze, config.unfreeze_schedule, config.steps)
    first = read_record(base)
    record = read_record(run) if config.resume else first
    if config.cache is not None:
        check_sources(FeatureCache(config.cache), config.datasets, deep=config.deep)
    opened = partial(_open_data, config, record, folder)
    data = opened(config.cache)
    tell_choice(data)
    checkpoint = read_checkpoint(find_checkpoint(run, latest=True)[1] if config.resume else folder)
    encoders = run_encoders(run if config.resume else base, record.policy, config.encoder_factory)
    origin = Origin(checkpoint, record, first, encoders)
    spec = _retargeted(config, origin, data)
    precision = _precision(config, origin, data, device)
    policy = _build(config, origin, spec, precision, device)
    _check_options(config, policy, unfreezing, spec.cut)
    if config.cache is not None and not config.resume:
        assert data.cache is not None
        check_encoders(policy, data.cache)
    splits = data.splits(WindowSpec(spec.obs_horizon, spec.action_horizon), device)
    learner = PolicyLearner(
        policy,
        config.optim,
        rates={"policy": config.lr, "encoder": _encoder_rate(config, policy)},
        steps=config.steps,
        seed=config.seed,
        device=device,
        accumulate=config.accumulate,
    )
    session = assemble(
        config,
        device,
        data,
        Trainee(spec, encoders, policy, splits, learner, config.batch_size),
        record if config.resume else None,
        frames=cache(lambda: data if config.cache is None else opened(None)),
        precision=precision,
        unfreezing=unfreezing,
        start=folder,
    )
    if config.resume:
        check_resumed(record, run, config, data)
        return continued(session, checkpoint)
    _check_features(config, session, first, folder)
    return session


def _open_data(config: FinetuneConfig, record: RunRecord, folder: Path, path: Location | None) -> RunData:
    """Opens the cache at ``path``, or the dataset, with the demos of the run unless filter keys are given."""
    before, spec = record.data, record.policy
    known = None if config.deep else recorded_contents(before)
    choice = DemoChoice(config.filter_key, config.valid_key, config.seed, known=known)
    choice = choice._replace(fits=partial(check_fits, spec, folder))
    if config.filter_key is None and config.valid_key is None:
        choice = choice._replace(recorded=before, where=str(config.checkpoint))
    paths = config.datasets or tuple(Path(file) for file in before.datasets)
    try:
        if path is not None:
            return open_cache_data(path, tuple(spec.cameras), tuple(spec.low_dim), choice, before.action_keys)
        return open_dataset_data(paths, tuple(spec.cameras), tuple(spec.low_dim), choice, before.action_keys)
    except (DatasetError, ConfigError) as error:
        raise CheckpointError(f"{folder} cannot be used with these data: {error}") from error


def _precision(config: FinetuneConfig, origin: Origin, data: RunData, device: torch.device) -> str:
    """Returns the requested precision, or by default that of the run's features, if the device computes in it."""
    if config.precision != "auto":
        return resolve_precision(config.precision, device)
    made_in = (origin.base.precision if data.cache is None else features_precision(data)) or "auto"
    if not emulates(device, made_in) and nearest_precision(made_in, device) == made_in:
        return made_in
    chosen = resolve_precision("auto", device)
    if made_in != "auto":
        logger.info("the run's features were computed in %s, which this device lacks; it trains in %s", made_in, chosen)
    return chosen


def _retargeted(config: FinetuneConfig, origin: Origin, data: RunData) -> PolicySpec:
    """Returns the spec with the cache's cut, and one encoder per camera unless they share one."""
    spec = origin.record.policy
    if data.cache is not None:
        cuts = {data.cache.cameras[camera].identity["cut"] for camera in spec.cameras}
        if len(cuts) != 1:
            raise ConfigError(f"{data.cache.path} has the cuts {', '.join(sorted(cuts))}; fine-tuning needs one cut")
        spec = replace(spec, cut=cuts.pop())
        for encoder in origin.encoders.values():
            encoder.cut_at(spec.cut)
    if any(name.startswith(ENCODERS) for name in origin.checkpoint.state.model):
        if config.share_rgb_model and not spec.share_rgb_model:
            raise OptionError("--share-rgb-model has no effect: the run's cameras have encoders tuned apart")
        return spec
    if config.share_rgb_model and len({id(encoder) for encoder in origin.encoders.values()}) > 1:
        raise OptionError("--share-rgb-model has no effect: the run's cameras have encoders of their own")
    return replace(spec, share_rgb_model=config.share_rgb_model)


def _build(
    config: FinetuneConfig, origin: Origin, spec: PolicySpec, precision: str, device: torch.device
) -> VisuomotorPolicy:
    policy = build_policy(spec, origin.encoders, config.seed)
    if not config.resume:
        policy.load_tensors({**origin.checkpoint.state.model, **origin.checkpoint.state.ema})
    policy.carries_encoder = True
    policy.precision = precision
    for encoder in policy.obs_encoder.key_model_map.distinct():
        encoder.train_batch_norm = config.batchnorm == "update"
        if config.checkpointing:
            encoder.enable_gradient_checkpointing()
    augment(policy, spec, config.augmentation if config.augment else None)
    policy.obs_encoder.key_model_map.to(memory_format=torch.channels_last)
    return policy.to(device).train()


def _check_options(
    config: FinetuneConfig, policy: VisuomotorPolicy, unfreezing: tuple[Unfreezing, ...], cut: str
) -> None:
    """Raises ConfigError for layers that the encoder lacks, and OptionError for options without effect."""
    check_layers(policy, unfreezing)
    check_freeze(policy, unfreezing, config.freeze)
    last = tuple(layer for item in unfreezing for layer in item.layers)
    if config.augment and config.cache and above_cut(policy.encoders.values(), last, cut):
        raise OptionError(
            f"--augment has no effect: all that learns is above the cut of {config.cache}, so no frames are read; "
            "give --live-encoder instead of --from-cache"
        )


def _encoder_rate(config: FinetuneConfig, policy: VisuomotorPolicy) -> float:
    """Returns the encoder's peak learning rate: the option, else at most 1e-5, in proportion to feature variation.

    Features are divided by their deviation, which enlarges what an update does; keypoints of spatial softmax are not.
    """
    if config.encoder_lr is not None:
        return config.encoder_lr
    variation = policy.feature_variation()
    if variation is None:
        logger.info("encoder learning rate %.2g", ENCODER_RATE)
        return ENCODER_RATE
    rate = ENCODER_RATE * min(1.0, variation)
    logger.info("encoder learning rate %.2g, because features vary by %.2g of their mean", rate, variation)
    return rate


def _check_features(config: FinetuneConfig, session: Session, base: RunRecord, folder: Path) -> None:
    """Compares the cached features of the first batch with live ones, if both are available.

    The cache is the one of this fine-tuning, else the one that the run was trained on.
    """
    assert isinstance(session.policy, VisuomotorPolicy)
    cached = _compared_cache(config, session, base, folder)
    if isinstance(cached, str):
        logger.info("%s, so cached and live features are not compared", cached)
        return
    assert cached.cache is not None
    check_encoders(session.policy, cached.cache)
    packed = np.unique(session.splits[0].obs_rows[session.sampler.plan(0).windows])
    rows = cache_row_numbers(cached.cache, cached.split)[packed]
    check_features(cached.cache, rows, session.sources.open_live(0), packed)


def _compared_cache(config: FinetuneConfig, session: Session, base: RunRecord, folder: Path) -> RunData | str:
    """Opens the cache to compare with live features; returns the reason if there is none."""
    data, before = session.data, base.data
    if config.cache is not None:
        gone = [str(path) for path in config.datasets or data.files if not is_there(path)]
        return f"{gone[0]} does not exist" if gone else data
    if before.cache is None or before.fingerprint is None:
        return f"{folder} was not trained from a cache"
    try:
        if FeatureCache(before.cache).fingerprint != before.fingerprint:
            return f"{before.cache} has changed since the run was trained"
    except CacheError as error:
        return f"the run's cache cannot be read ({error})"
    cached = _open_data(config, base, folder, location(before.cache))
    if cached.digests != data.digests and cached.rows.demos != data.rows.demos:
        return f"{before.cache} holds other demos than the dataset"
    return cached
