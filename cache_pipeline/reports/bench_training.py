"""Bench cases of training: cached, live-frozen and unfrozen steps beside robomimic's pipeline and the bare step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cache_pipeline.demos.windows import WindowSpec
from cache_pipeline.encoders.image_encoder import EncoderSpec
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.errors import MissingExtraError
from cache_pipeline.extract.config import ExtractConfig
from cache_pipeline.extract.pipeline import extract_features
from cache_pipeline.policies.batch import Batch
from cache_pipeline.progress import logger
from cache_pipeline.reports.bench import BenchRow
from cache_pipeline.reports.measure import side_by_side
from cache_pipeline.reports.peers import PEER_NAME, RobomimicImages
from cache_pipeline.training.checkpoint import find_checkpoint
from cache_pipeline.training.config import FinetuneConfig, OptimConfig, TrainConfig
from cache_pipeline.training.finetune import FinetuneSession
from cache_pipeline.training.learner import PolicyLearner
from cache_pipeline.training.session import TrainSession, open_session
from cache_pipeline.training.train import train as train_run

if TYPE_CHECKING:
    from cache_pipeline.reports.bench import BenchSetup

CACHED_STEPS, LIVE_STEPS = 50, 2
OBS_HORIZON, ACTION_HORIZON = 2, 8
UNLIMITED = 10**9
FRONTIER_NAME = "the same run with frames in memory: the frozen part on the fast path, layer4 learning"
LIVE_NAME = "the same loop with the frozen encoder live, frames in memory, {precision}"


def train(setup: BenchSetup) -> list[BenchRow]:
    """Steps per second from the cache, beside the same policy fed live by us and by robomimic, and the bare step."""
    cache = setup.folder / "train.zarr"
    spec = EncoderSpec(rgb_model_name=setup.rgb_model_name, weights="random")
    extract = ExtractConfig(datasets=(setup.dataset,), out=cache, encoders=spec, device=setup.device)
    extract_features(extract, progress=False)
    cached = _open(setup, cache=cache)
    work = {
        "cached": _steps(cached.learner, _batches(cached), CACHED_STEPS),
        "bare": _bare(_open(setup, cache=cache)),
    }
    for precision in ("fp32", "auto"):
        live = _open(setup, datasets=(setup.dataset,), encoder=spec, preprocess=Preprocess(), precision=precision)
        work[precision] = _steps(live.learner, _batches(live), LIVE_STEPS)
    peer = _peer(setup, cached, frozen=True)
    if peer is not None:
        work["robomimic"] = _steps(_open(setup, cache=cache).learner, peer.batches(), LIVE_STEPS)
    rates = side_by_side(work, setup.seconds)
    peers = {"fp32": LIVE_NAME.format(precision="fp32"), "auto": LIVE_NAME.format(precision="its default precision")}
    if peer is not None:
        peers["robomimic"] = PEER_NAME
    cameras = len(cached.data.cameras)
    case = f"train {setup.rgb_model_name}, batch {setup.batch_size}, {cameras} cameras, To {OBS_HORIZON}, against "
    return [
        BenchRow(
            case=f"{case}{'live ' if name != 'robomimic' else ''}{name}, steps/s",
            ours=rates["cached"],
            peer=rates[name],
            peer_name=description,
            limit=rates["bare"],
        )
        for name, description in peers.items()
    ]


def finetune(setup: BenchSetup) -> list[BenchRow]:
    """Steps per second with the whole encoder learning, beside robomimic's loop with the same policy network."""
    spec = EncoderSpec(rgb_model_name=setup.rgb_model_name, weights="random")
    options = {"datasets": (setup.dataset,), "encoder": spec, "preprocess": Preprocess(), "freeze_encoder": False}
    sessions = {name: _open(setup, precision=name, **options) for name in ("auto", "fp32")}
    work = {name: _steps(session.learner, _batches(session), LIVE_STEPS) for name, session in sessions.items()}
    peer = _peer(setup, sessions["fp32"], frozen=False)
    if peer is not None:
        learner = _open(setup, datasets=(setup.dataset,), encoder=spec, preprocess=Preprocess()).learner
        learner.learn("encoder", ((f"peer.{name}", value) for name, value in peer.named_parameters()))
        work["robomimic"] = _steps(learner, peer.batches(), LIVE_STEPS)
    rates = side_by_side(work, setup.seconds)
    return [
        BenchRow(
            case=f"finetune {setup.rgb_model_name} unfrozen, batch {setup.batch_size}, {name}, steps/s",
            ours=rates[name],
            peer=rates.get("robomimic"),
            peer_name=None if peer is None else PEER_NAME.replace("VisualCore", "VisualCore unfrozen"),
        )
        for name in sessions
    ]


def frontier(setup: BenchSetup) -> list[BenchRow]:
    """Fine-tuning layer4 from a cache cut at layer3, beside the same run with everything live."""
    spec = EncoderSpec(rgb_model_name=setup.rgb_model_name, weights="random")
    caches = {cut: setup.folder / f"{cut}.zarr" for cut in ("avgpool", "layer3")}
    for cut, cache in caches.items():
        encoders = replace(spec, cut=cut)
        extract = ExtractConfig(datasets=(setup.dataset,), out=cache, encoders=encoders, device=setup.device)
        extract_features(extract, progress=False)
    base = setup.folder / "base"
    train_run(_config(setup, cache=caches["avgpool"], steps=1, out=base), progress=False)
    rows = []
    for precision in ("fp32", "auto"):
        work = {
            "ours": _finetuned(setup, base, precision, caches["layer3"]),
            "peer": _finetuned(setup, base, precision, None),
        }
        rates = side_by_side(work, setup.seconds)
        what = f"finetune {setup.rgb_model_name} layer4 from a layer3 cache"
        case = f"{what}, batch {setup.batch_size}, {precision}, steps/s"
        rows.append(BenchRow(case=case, ours=rates["ours"], peer=rates["peer"], peer_name=FRONTIER_NAME))
    return rows


def _finetuned(setup: BenchSetup, base: Path, precision: str, cache: Path | None) -> Callable[[], int]:
    config = FinetuneConfig(
        checkpoint=base,
        datasets=(setup.dataset,),
        cache=cache,
        unfreeze="layer4",
        steps=UNLIMITED,
        batch_size=setup.batch_size,
        device=setup.device,
        precision=precision,  # type: ignore[arg-type]
        optim=OptimConfig(warmup_steps=0),
    )
    run, checkpoint = find_checkpoint(base)
    out = setup.folder / f"finetune_{precision}_{'live' if cache is None else 'frontier'}"
    session = FinetuneSession(config, torch.device(setup.device), run, checkpoint, out)
    session.start()
    phase = session.phases()[0]
    phase.begin()
    return _steps(session.learner, phase.open().batches(session.sampler.plans(0, UNLIMITED)), LIVE_STEPS)


def _config(setup: BenchSetup, **options: Any) -> TrainConfig:
    shape = {"obs_horizon": OBS_HORIZON, "action_horizon": ACTION_HORIZON, "optim": OptimConfig(warmup_steps=0)}
    return TrainConfig(**{"batch_size": setup.batch_size, "device": setup.device, **shape, **options})


def _open(setup: BenchSetup, **options: Any) -> TrainSession:
    return open_session(_config(setup, steps=UNLIMITED, **options), setup.folder / "run")


def _batches(session: TrainSession) -> Iterator[Batch]:
    return session.source.batches(session.sampler.plans(0, UNLIMITED))


def _steps(learner: PolicyLearner, batches: Iterator[Batch], steps: int) -> Callable[[], int]:
    numbers = count()

    def run() -> int:
        for _ in range(steps):
            loss = learner.step(next(batches), next(numbers))
        loss.item()
        return steps

    return run


def _bare(session: TrainSession) -> Callable[[], int]:
    """The policy's step on one batch that lies in memory."""
    batch = next(_batches(session))
    numbers = count()

    def run() -> int:
        for _ in range(CACHED_STEPS):
            loss = session.learner.step(batch, next(numbers))
        loss.item()
        return CACHED_STEPS

    return run


def _peer(setup: BenchSetup, session: TrainSession, *, frozen: bool) -> RobomimicImages | None:
    if setup.rgb_model_name != "resnet18":
        logger.info("robomimic has no %s: its rows are left out", setup.rgb_model_name)
        return None
    try:
        return RobomimicImages(
            setup.dataset,
            cameras=session.data.cameras,
            low_dim_keys=tuple(session.data.low_dim),
            windows=WindowSpec(OBS_HORIZON, ACTION_HORIZON),
            batch_size=setup.batch_size,
            frozen=frozen,
            device=torch.device(setup.device),
        )
    except MissingExtraError as error:
        logger.info("%s: its rows are left out", error)
        return None
