"""Go on from a run with an encoder that learns: live, or live above the cut of a frontier cache."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.demos.windows import WindowSpec
from cache_pipeline.encoders.device import resolve_device
from cache_pipeline.encoders.image_encoder import ImageEncoder
from cache_pipeline.encoders.precision import resolve_precision
from cache_pipeline.encoders.views import ViewSpec
from cache_pipeline.errors import CacheError, CheckpointError, ConfigError, DatasetError, EncoderError, OptionError
from cache_pipeline.extract.freshness import check_sources
from cache_pipeline.files import resolved
from cache_pipeline.policies.spec import PolicySpec, build_policy
from cache_pipeline.policies.visuomotor import ENCODERS, VisuomotorPolicy
from cache_pipeline.runs.checkpoint import (
    Checkpoint,
    find_checkpoint,
    read_checkpoint,
    read_run,
    run_encoders,
)
from cache_pipeline.runs.contents import recorded_contents
from cache_pipeline.runs.folder import RunFolder, run_folder
from cache_pipeline.runs.metrics import check_wandb
from cache_pipeline.training.agreement import check_encoders, check_features, check_fits
from cache_pipeline.training.config import FinetuneConfig
from cache_pipeline.training.data.live import LiveSource
from cache_pipeline.training.data.opening import (
    RunData,
    SourcePlan,
    SplitNames,
    features_precision,
    frozen_encode,
    frozen_encoders,
    open_cache_data,
    open_cached,
    open_dataset_data,
    open_live,
    plan_source,
    tell_choice,
)
from cache_pipeline.training.data.rows import cache_row_numbers
from cache_pipeline.training.data.sampler import Sampler
from cache_pipeline.training.data.source import Source
from cache_pipeline.training.loop import Phase
from cache_pipeline.training.result import TrainResult
from cache_pipeline.training.run import check_resumed, start_run
from cache_pipeline.training.train import begins_anew, complete, measurement
from cache_pipeline.training.update.distributed import Ranks, current_ranks, joined_ranks
from cache_pipeline.training.update.learner import PolicyLearner
from cache_pipeline.training.update.unfreezing import (
    Unfreezing,
    above_cut,
    check_freeze,
    check_layers,
    frozen_cut,
    parse_unfreezing,
    unfreeze,
)

logger = logging.getLogger("cache_pipeline")

ENCODER_RATE = 1e-5


def finetune(config: FinetuneConfig, *, progress: bool = True) -> TrainResult:
    """Fine-tunes as ``config`` asks and leaves a run folder of its own.

    Raises:
        ConfigError: options that do not fit the run, or a layer that does not exist.
        DatasetError, CacheError: data that cannot be used.
        CheckpointError: a run that is damaged, does not fit the data, or whose features are not those of its cache.
        RunLockedError: another process writes the run folder.
        RunStopped: asked to stop by SIGINT or SIGTERM; the run was saved and can be resumed.
    """
    check_wandb(config.wandb)
    with joined_ranks(config.device) as ranks:
        return _finetune(config, ranks, progress=progress)


def _finetune(config: FinetuneConfig, ranks: Ranks, *, progress: bool) -> TrainResult:
    ranks.check(config.batch_size)
    if config.batchnorm == "update" and ranks.world > 1:
        raise ConfigError("BatchNorm statistics of several processes would differ; leave --update-batchnorm out")
    device = resolve_device(config.device)
    base, folder = find_checkpoint(config.checkpoint)
    named = base if base.name.strip(".") else resolved(base)  # "." and ".." have no name of their own
    run = config.out if config.out is not None else named.with_name(f"{named.name}_finetune")
    with run_folder(run, resume=config.resume, overwrite=config.overwrite, writes=ranks.first) as out:
        if begins_anew(out, ranks) and config.resume:
            config = replace(config, resume=False)
        session = FinetuneSession(config, device, base, folder, out)
        resumed = session.start()
        measure = measurement(session.learner, session.current, session.data, session.valid, device, config.saving)
        return complete(
            out,
            session.learner,
            session.sampler,
            session.phases(),
            measure,
            config,
            resumed,
            ranks=ranks,
            progress=progress,
            trained=True,
        )


class FinetuneSession:
    """The pieces of one fine-tuning run, made in the order in which errors are cheapest."""

    def __init__(self, config: FinetuneConfig, device: torch.device, base: Path, folder: Path, out: RunFolder) -> None:
        self._config, self._device, self._out, self._folder = config, device, out, folder
        run = self._run = out.place
        self._before = read_run(base)
        self._origin = read_run(run) if config.resume else self._before
        self._unfreezing = parse_unfreezing(config.unfreeze, config.unfreeze_schedule, config.steps)
        spec = PolicySpec.from_json(self._origin.get("policy"))
        if config.cache is not None:
            check_sources(FeatureCache(config.cache), config.datasets, deep=config.deep)
        self.data = self._open(spec, config.cache)
        tell_choice(self.data)
        self._start_from = read_checkpoint(find_checkpoint(run, latest=True)[1] if config.resume else folder)
        self._encoders = run_encoders(run if config.resume else base, spec, config.encoder_factory)
        self.spec = self._retarget(spec)
        self._precision = self._choose_precision()
        self.policy = self._build()
        check_layers(self.policy, self._unfreezing)
        check_freeze(self.policy, self._unfreezing, config.freeze)
        self._check_augment()
        if config.cache is not None and not config.resume:
            assert self.data.cache is not None
            check_encoders(self.policy, self.data.cache)
        shape = WindowSpec(spec.obs_horizon, spec.action_horizon)
        self._splits = self.data.splits(shape, device)
        self.valid = self._splits[1]
        self._plan = plan_source(
            self.data,
            len(self._splits[0]),
            source=config.source,
            order=config.order,
            views=1,
            max_memory=config.max_memory,
            device=device,
        )
        if config.resume:
            self._plan = self._plan.in_order_of(self._origin)
        self.sampler = Sampler(len(self._splits[0]), config.batch_size, config.seed, blocks=self._plan.blocks)
        self.learner = PolicyLearner(
            self.policy,
            config.optim,
            rates={"policy": config.lr, "encoder": self._encoder_rate()},
            steps=config.steps,
            seed=config.seed,
            device=device,
            accumulate=config.accumulate,
        )
        self._opened: Source | None = None
        self._live_data: RunData | None = self.data if config.cache is None else None

    def start(self) -> Checkpoint | None:
        """Checks the features and makes the run folder, or takes up the run where it stopped."""
        config = self._config
        if config.resume:
            check_resumed(self._run, config, self.data.identity)
            for item in self._unfreezing:
                if item.step < self._start_from.step:
                    self._begin(item)
            self.learner.load(self._start_from.model, self._start_from.ema, self._start_from.resume)
            return self._start_from
        self._source_at(0)
        self._check_features()
        value = {
            "kind": "finetune",
            "config": config.to_json(),
            "policy": self.spec.to_json(),
            "data": self.data.identity,
            "order": self._plan.order,
            "precision": self._precision,
            "from": str(self._folder.resolve()),
        }
        if current_ranks().first:
            start_run(
                self._out, value, {file: self._encoders[camera] for camera, file in self.spec.encoder_files.items()}
            )
        return None

    def phases(self) -> list[Phase]:
        """One phase for each unfreezing; before the first of them projection and policy learn alone."""
        items = self._unfreezing if self._unfreezing[0].step == 0 else (Unfreezing(0, ()), *self._unfreezing)
        stops = [*(item.step for item in items[1:]), self._config.steps]
        return [
            Phase(item.step, stop, partial(self._begin, item), partial(self._source_at, item.step))
            for item, stop in zip(items, stops, strict=True)
        ]

    def current(self) -> Source:
        """The source that is trained on now."""
        assert self._opened is not None
        return self._opened

    def _open(self, spec: PolicySpec, cache: Path | None) -> RunData:
        config, before = self._config, self._origin["data"]
        known = None if config.deep else recorded_contents(before)
        names = SplitNames(config.filter_key, config.valid_key, config.seed, known=known)
        names = names._replace(fits=partial(check_fits, spec, self._folder))
        if config.filter_key is None and config.valid_key is None:
            names = names._replace(run_data=before, where=str(config.checkpoint))
        paths = config.datasets or tuple(Path(path) for path in before["datasets"])
        try:
            if cache is not None:
                return open_cache_data(cache, tuple(spec.cameras), tuple(spec.low_dim), names)
            return open_dataset_data(paths, tuple(spec.cameras), tuple(spec.low_dim), names)
        except (DatasetError, ConfigError) as error:
            raise CheckpointError(f"{self._folder} cannot be used with these data: {error}") from error

    def _choose_precision(self) -> str:
        """The precision that was asked for, else that in which the run's features were made, if the device has it."""
        if self._config.precision != "auto":
            return resolve_precision(self._config.precision, self._device)
        cache = self.data.cache
        made_in = features_precision(cache, tuple(self.data.cameras)) if cache else self._before.get("precision")
        try:
            return resolve_precision(made_in or "auto", self._device)
        except EncoderError as error:
            logger.info("the run's features were made in %s, which this device lacks: %s", made_in, error)
            return resolve_precision("auto", self._device)

    def _retarget(self, spec: PolicySpec) -> PolicySpec:
        """The spec with the cache's cut, and with an encoder for each camera unless they are to share one."""
        if self.data.cache is not None:
            cuts = {self.data.cache.cameras[camera].identity["cut"] for camera in spec.cameras}
            if len(cuts) != 1:
                raise ConfigError(f"{self.data.cache.path} is cut at {', '.join(sorted(cuts))}; one cut is needed")
            spec = replace(spec, cut=cuts.pop())
            _cut(self._encoders, spec.cut)
        if any(name.startswith(ENCODERS) for name in self._start_from.model):
            if self._config.share_rgb_model and not spec.share_rgb_model:
                raise OptionError("--share-rgb-model has no effect: the run's cameras have encoders tuned apart")
            return spec
        if self._config.share_rgb_model and len({id(encoder) for encoder in self._encoders.values()}) > 1:
            raise OptionError("--share-rgb-model has no effect: the run's cameras have encoders of their own")
        return replace(spec, share_rgb_model=self._config.share_rgb_model)

    def _check_augment(self) -> None:
        """Raises OptionError if frames are to be augmented and none will be read."""
        last = self._layers(self._config.steps)
        if self._config.augment and self._config.cache and above_cut(self.policy, last, self.spec.cut):
            raise OptionError(
                f"--augment has no effect: all that learns lies above the cut of {self._config.cache}, so no frames "
                "are read; give --live-encoder instead of --from-cache"
            )

    def _build(self) -> VisuomotorPolicy:
        config = self._config
        policy = build_policy(self.spec, self._encoders, config.seed)
        if not config.resume:
            policy.load_tensors({**self._start_from.model, **self._start_from.ema})
        policy.carries_encoder = True
        policy.precision = self._precision
        for encoder in policy.obs_encoder.key_model_map.distinct():
            encoder.train_batch_norm = config.batchnorm == "update"
            if config.checkpointing:
                encoder.enable_gradient_checkpointing()
        policy.augmentation = ViewSpec() if config.augment else None
        policy.obs_encoder.key_model_map.to(memory_format=torch.channels_last)
        return policy.to(self._device).train()

    def _encoder_rate(self) -> float:
        """The encoder's peak learning rate: as asked, else in proportion to the features' variation, at most 1e-5."""
        if self._config.encoder_lr is not None:
            return self._config.encoder_lr
        variation = self.policy.feature_variation()
        rate = ENCODER_RATE * min(1.0, variation)
        logger.info("encoder learning rate %.2g, since features vary by %.2g of their mean", rate, variation)
        return rate

    def _begin(self, item: Unfreezing) -> None:
        if item.layers:
            self.learner.learn("encoder", unfreeze(self.policy, item.layers, self._config.freeze), item.step)

    def _layers(self, step: int) -> tuple[str, ...]:
        """All that learns at ``step``."""
        return tuple(layer for item in self._unfreezing if item.step <= step for layer in item.layers)

    def _source_at(self, step: int) -> Source:
        layers = self._layers(step)
        live = self._config.cache is None or not above_cut(self.policy, layers, self.spec.cut)
        if self._opened is None or (self._opened.name == "live") is not live:
            memory = self._config.max_memory
            self._opened = self._make_live(memory) if live else self._make_cached(self.data, self._plan)
            logger.info("%s: %s source", self._run, self._opened.name)
        self._fit_to(self._opened, layers)
        return self._opened

    def _fit_to(self, source: Source, layers: tuple[str, ...]) -> None:
        """Moves the policy's cut to where the source's features enter; frames take the fast path while it is frozen."""
        encoders, cut = self.policy.obs_encoder, self.spec.cut
        frozen = frozen_cut(self.policy, layers) if source.name == "live" else None
        encoders.cut_at(frozen or cut)
        self.policy.frozen_trunks = {}
        if frozen is not None:
            self.policy.frozen_trunks = frozen_encoders(
                dict(encoders.key_model_map.items()), encoders.preprocessing, self._device, self._precision
            )

    def _make_cached(self, data: RunData, plan: SourcePlan) -> Source:
        memory = self._config.max_memory
        return open_cached(data, plan, self._splits, max_memory=memory, device=self._device)

    def _make_live(self, max_memory: int | None) -> LiveSource:
        if self._live_data is None:
            self._live_data = self._open(self.spec, None)
        return open_live(
            self._live_data,
            self._splits,
            frozen_encode(self._encoders, self.policy.obs_encoder.preprocessing, self._device, "fp32"),
            hand_on_frames=True,
            max_memory=max_memory,
            device=self._device,
        )

    def _check_features(self) -> None:
        """Compares the features of the first batch in the cache at hand with live ones, if both can be had."""
        reference = self._reference()
        if isinstance(reference, str):
            logger.info("%s, so cached and live features are not compared", reference)
            return
        cached, live = reference
        assert cached.cache is not None
        packed = np.unique(self._splits[0].obs_rows[self.sampler.plan(0).windows])
        check_features(cached.cache, cache_row_numbers(cached.cache, cached.split)[packed], live, packed)

    def _reference(self) -> tuple[RunData, LiveSource] | str:
        """The cache of this fine-tuning, else that of the run, and live frames; or why they cannot be compared."""
        if self._config.cache is not None:
            gone = [str(path) for path in self._config.datasets or self.data.files if not Path(path).is_file()]
            return f"{gone[0]} is not there" if gone else (self.data, self._make_live(0))
        before = self._before["data"]
        if before["cache"] is None or before["fingerprint"] is None:
            return f"{self._folder} was not trained from a cache"
        try:
            if FeatureCache(before["cache"]).fingerprint != before["fingerprint"]:
                return f"{before['cache']} has changed since the run was trained"
        except CacheError as error:
            return f"the run's cache cannot be read ({error})"
        cached = self._open(self.spec, Path(before["cache"]))
        assert cached.cache is not None
        if cached.digests != self.data.digests and cached.rows.demos != self.data.rows.demos:
            return f"{before['cache']} holds other demos than the dataset"
        check_encoders(self.policy, cached.cache)
        live = self.current()
        assert isinstance(live, LiveSource)
        return cached, live


def _cut(encoders: Mapping[str, ImageEncoder], cut: str) -> None:
    for encoder in encoders.values():
        encoder.cut = cut
