"""Opens and checks everything that a run needs; writes nothing.

``open_training`` in train.py opens a new run, or a run to resume; ``open_finetuning`` in finetune.py opens one from
another run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from cache_pipeline.encoders.frozen import frozen_encoders
from cache_pipeline.encoders.image_encoder import ImageEncoder
from cache_pipeline.encoders.preprocess import check_views
from cache_pipeline.encoders.view_spec import ViewSpec
from cache_pipeline.errors import CheckpointError, counted
from cache_pipeline.policies.robomimic.policy import RobomimicPolicy
from cache_pipeline.policies.spec import PolicySpec
from cache_pipeline.policies.visuomotor import VisuomotorPolicy
from cache_pipeline.runs.checkpoint import Checkpoint
from cache_pipeline.runs.record import RunRecord, this_process
from cache_pipeline.text import by_name
from cache_pipeline.training.config import FinetuneConfig, TrainConfig
from cache_pipeline.training.data.run_data import RunData
from cache_pipeline.training.data.sampler import Sampler
from cache_pipeline.training.data.source import Source, Splits
from cache_pipeline.training.data.sources import SourcePlan, Sources, plan_source
from cache_pipeline.training.evaluate import ActionError, evaluate
from cache_pipeline.training.robomimic import RobomimicLearner
from cache_pipeline.training.update.distributed import current_ranks
from cache_pipeline.training.update.learner import PolicyLearner
from cache_pipeline.training.update.unfreezing import Unfreezing, above_cut, frozen_cut, unfreeze

logger = logging.getLogger("cache_pipeline")

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


Learner = PolicyLearner | RobomimicLearner


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
    splits: Splits
    sources: Sources
    learner: Learner
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
        """Unfreezes the layers of a phase, and opens the source for its steps.

        Frames are read if layers below the run's cut learn. The cut of the policy is then moved below the lowest layer
        that learns, and the fast path computes what lies below it.
        """
        self.unfreeze(phase.layers, phase.start)
        learning = tuple(layer for item in self.unfreezing if item.step <= phase.start for layer in item.layers)
        policy, cut = self.policy, self.record.policy.cut
        encoders = list(policy.encoders.values())
        live = self.sources.plan.source == "live" or not above_cut(encoders, learning, cut)
        frozen = frozen_cut(encoders, learning, cut) if live else None
        source = self.sources.open(live=live)
        if isinstance(policy, VisuomotorPolicy):
            policy.obs_encoder.cut_at(frozen or cut)
        precision = self.record.precision or "auto"
        policy.frozen_trunks = (
            {} if frozen is None else frozen_encoders(policy.encoders, policy.preprocessing, self.device, precision)
        )
        return source

    def unfreeze(self, layers: tuple[str, ...], step: int) -> None:
        """Unfreezes layers of the encoder from ``step`` on."""
        if layers:
            assert isinstance(self.policy, VisuomotorPolicy)
            assert isinstance(self.learner, PolicyLearner)
            freeze = self.config.freeze if isinstance(self.config, FinetuneConfig) else None
            self.learner.learn("encoder", unfreeze(self.policy, layers, freeze), step)
            names, report = ", ".join(layers), self.policy.obs_encoder.parameter_report()
            logger.info("encoder layers trained from step %d on: %s; %s", step, names, report)

    @property
    def measurable(self) -> bool:
        """Whether the run has held-out windows."""
        return self.splits[1] is not None

    def measure(self) -> ActionError:
        """Measures the held-out action error of the current policy."""
        valid, source, policy = self.splits[1], self.sources.current, self.policy
        assert valid is not None
        assert source is not None
        most = self.config.saving.eval_windows
        # robomimic's policies keep a state while acting; in a window they start afresh.
        predict = policy.predict if isinstance(policy, RobomimicPolicy) else policy.act
        policy.eval()
        try:
            return evaluate(predict, source, len(valid), self.data.mean_action, device=self.device, most=most)
        finally:
            policy.train()


class Trainee(NamedTuple):
    """A policy with its initial encoders, its windows and its learner."""

    spec: PolicySpec
    encoders: Mapping[str, ImageEncoder]
    policy: VisuomotorPolicy | RobomimicPolicy
    splits: Splits
    learner: Learner
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
    parts = config.accumulate if isinstance(config, FinetuneConfig) else 1
    batch_size = fitting_batch_size(trainee.batch_size, windows, parts * current_ranks().world)
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
        record=replace(record, policy=trainee.spec, precision=precision),
        device=device,
        data=data,
        encoders=trainee.encoders,
        policy=policy,
        splits=trainee.splits,
        sources=sources,
        learner=trainee.learner,
        sampler=Sampler(windows, batch_size, config.seed, views=plan.views, blocks=plan.blocks),
        unfreezing=unfreezing,
    )


def augment(policy: VisuomotorPolicy, spec: PolicySpec, views: ViewSpec | None) -> None:
    """Turns augmentation of live frames on, or off for None; logs what it cannot change.

    Raises:
        ConfigError: it would change nothing.
    """
    policy.augmentation = views
    if views is None:
        return
    found = {name: check_views(views, policy.preprocessing[name], shape[:2]) for name, shape in spec.cameras.items()}
    for line in by_name({name: note for name, note in found.items() if note is not None}, "camera"):
        logger.info("%s", line)


def fitting_batch_size(asked: int, windows: int, multiple: int) -> int:
    """Returns the batch size, or the largest multiple that the windows can fill once. Warns if it is smaller."""
    if asked <= windows:
        return asked
    fitting = max(1, windows // multiple) * multiple
    logger.warning("batch_size %d is more than the data's %s; %d is used", asked, counted(windows, "window"), fitting)
    return fitting


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
