"""Benchmarks of training steps: cached, live with frozen encoder, and unfrozen; peer: robomimic's pipeline."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count, repeat
from pathlib import Path
from typing import Any

import torch

from cache_pipeline.cache.folder import remove_cache
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.cache.store import real_store
from cache_pipeline.demos.windows import WindowSpec
from cache_pipeline.encoders.image_encoder import EncoderSpec
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.errors import ConfigError, install_command
from cache_pipeline.extract.config import ExtractConfig
from cache_pipeline.extract.pipeline import extract_features
from cache_pipeline.files import absolute, location
from cache_pipeline.memory import retained_memory
from cache_pipeline.policies.batch import Batch
from cache_pipeline.progress import logger
from cache_pipeline.reports.bench.case import BenchRow, BenchSetup
from cache_pipeline.reports.bench.measure import Prepare, Work, side_by_side
from cache_pipeline.reports.bench.peers import PEER_NAME, RobomimicImages
from cache_pipeline.runs.checkpoint import find_checkpoint
from cache_pipeline.training.config import FinetuneConfig, OptimConfig, TrainConfig
from cache_pipeline.training.data.streamed import POOLS_IN_MEMORY
from cache_pipeline.training.finetune import open_finetuning
from cache_pipeline.training.session import Learner, Session
from cache_pipeline.training.train import open_training
from cache_pipeline.training.train import train as train_run
from cache_pipeline.training.update.learner import PolicyLearner

OBS_HORIZON, ACTION_HORIZON = 2, 8
UNLIMITED = 10**9
FRONTIER_NAME = "the same run with frames in memory: the frozen part on the fast path, layer4 learning"
PRECISIONS = {"fp32": "fp32", "auto": "its default precision"}
MEMORY_NAME = "the same loop with the features in memory"
LIVE_NAME = "the same loop with the frozen encoder live, frames in memory, {precision}"


def train(setup: BenchSetup) -> list[BenchRow]:
    """Measures steps/s on a cache; peers: our live loop and robomimic's; limit: the bare policy step."""
    cache = setup.folder / "train.zarr"
    spec = _spec(setup)
    extract = ExtractConfig(datasets=(setup.dataset,), out=cache, encoders=spec, device=setup.device)
    cameras = len(extract_features(extract, progress=False).cameras)
    work: dict[str, Prepare] = {"cached": partial(_cached, setup, cache), "bare": partial(_bare, setup, cache)}
    peers = {name: LIVE_NAME.format(precision=meaning) for name, meaning in PRECISIONS.items()}
    for precision in PRECISIONS:
        work[precision] = partial(_live, setup, precision, frozen=True)
    if _has_peer(setup):
        work["robomimic"], peers["robomimic"] = partial(_robomimic, setup, frozen=True), PEER_NAME
    rates = side_by_side(work, setup.seconds)
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


def stream(setup: BenchSetup) -> list[BenchRow]:
    """Measures steps/s on a streamed cache in a folder, and at ``setup.store``; peer: the features in memory.

    Raises:
        ConfigError: there is something at ``setup.store``.
    """
    places = {"a folder": absolute(setup.folder / "stream.zarr")}
    if setup.store is not None:
        store = real_store(location(setup.store))
        if next(store.sizes(), None) is not None:
            raise ConfigError(f"there is something at {setup.store}; name a place with nothing, which is removed again")
        places[setup.store] = absolute(location(setup.store))
    try:
        for place in places.values():
            extract = ExtractConfig(
                datasets=(setup.dataset,), out=location(place), encoders=_spec(setup), device=setup.device
            )
            extract_features(extract, progress=False)
        work: dict[str, Prepare] = {name: partial(_streamed, setup, place) for name, place in places.items()}
        work["memory"] = partial(_cached, setup, setup.folder / "stream.zarr")
        rates = side_by_side(work, setup.seconds)
    finally:
        if setup.store is not None:
            remove_cache(store)
    case = f"train {setup.rgb_model_name}, batch {setup.batch_size}, streamed in pools of a quarter of the cache from"
    return [
        BenchRow(case=f"{case} {name}, steps/s", ours=rates[name], peer=rates["memory"], peer_name=MEMORY_NAME)
        for name in places
    ]


def finetune(setup: BenchSetup) -> list[BenchRow]:
    """Measures steps/s with the whole encoder trained; peer: robomimic's loop with the same policy network."""
    work: dict[str, Prepare] = {name: partial(_live, setup, name, frozen=False) for name in PRECISIONS}
    peer_name = None
    if _has_peer(setup):
        work["robomimic"] = partial(_robomimic, setup, frozen=False)
        peer_name = PEER_NAME.replace("VisualCore", "VisualCore unfrozen")
    rates = side_by_side(work, setup.seconds)
    return [
        BenchRow(
            case=f"finetune {setup.rgb_model_name} unfrozen, batch {setup.batch_size}, {name}, steps/s",
            ours=rates[name],
            peer=rates.get("robomimic"),
            peer_name=peer_name,
        )
        for name in PRECISIONS
    ]


def frontier(setup: BenchSetup) -> list[BenchRow]:
    """Measures fine-tuning of layer4 on a layer3 cache; peer: the same run with live frames."""
    caches = {cut: setup.folder / f"{cut}.zarr" for cut in ("avgpool", "layer3")}
    for cut, cache in caches.items():
        encoders = replace(_spec(setup), cut=cut)
        extract = ExtractConfig(datasets=(setup.dataset,), out=cache, encoders=encoders, device=setup.device)
        extract_features(extract, progress=False)
    base = setup.folder / "base"
    train_run(_config(setup, cache=caches["avgpool"], steps=1, out=base), progress=False)
    rows = []
    for precision in PRECISIONS:
        work: dict[str, Prepare] = {
            "ours": partial(_finetuned, setup, base, precision, caches["layer3"]),
            "peer": partial(_finetuned, setup, base, precision, None),
        }
        rates = side_by_side(work, setup.seconds)
        what = f"finetune {setup.rgb_model_name} layer4 from a layer3 cache"
        case = f"{what}, batch {setup.batch_size}, {precision}, steps/s"
        rows.append(BenchRow(case=case, ours=rates["ours"], peer=rates["peer"], peer_name=FRONTIER_NAME))
    return rows


def _cached(setup: BenchSetup, cache: Path) -> Work:
    session = _open(setup, cache=cache)
    return _steps(session.learner, _batches(session), setup.cached_steps)


def _streamed(setup: BenchSetup, place: str) -> Work:
    cache = FeatureCache(location(place))
    session = _open(
        setup, cache=location(place), source="streamed", max_memory=max(1, POOLS_IN_MEMORY * cache.nbytes() // 4)
    )
    return _steps(session.learner, _batches(session), setup.cached_steps)


def _bare(setup: BenchSetup, cache: Path) -> Work:
    """Runs the policy's step on one batch in memory."""
    session = _open(setup, cache=cache)
    return _steps(session.learner, repeat(next(_batches(session))), setup.cached_steps)


def _live(setup: BenchSetup, precision: str, *, frozen: bool) -> Work:
    session = _open_live(setup, precision, frozen=frozen)
    return _steps(session.learner, _batches(session), setup.live_steps)


def _robomimic(setup: BenchSetup, *, frozen: bool) -> Work:
    """Runs our policy on features of robomimic's frames and VisualCore."""
    session = _open_live(setup, "fp32", frozen=True)
    peer = RobomimicImages(
        setup.dataset,
        cameras=session.data.cameras,
        low_dim_keys=tuple(session.data.low_dim),
        windows=WindowSpec(OBS_HORIZON, ACTION_HORIZON),
        batch_size=setup.batch_size,
        frozen=frozen,
        device=torch.device(setup.device),
    )
    if not frozen:
        assert isinstance(session.learner, PolicyLearner)
        session.learner.learn("encoder", ((f"peer.{name}", value) for name, value in peer.named_parameters()))
    return _updates(session.learner, peer.batches(), setup.live_steps)


def _finetuned(setup: BenchSetup, base: Path, precision: str, cache: Path | None) -> Work:
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
    session = open_finetuning(config, out, base=run, folder=checkpoint)
    return _steps(session.learner, _batches(session), setup.live_steps)


def _spec(setup: BenchSetup) -> EncoderSpec:
    return EncoderSpec(rgb_model_name=setup.rgb_model_name, weights="random")


def _config(setup: BenchSetup, **options: Any) -> TrainConfig:
    shape = {"obs_horizon": OBS_HORIZON, "action_horizon": ACTION_HORIZON, "optim": OptimConfig(warmup_steps=0)}
    return TrainConfig(**{"batch_size": setup.batch_size, "device": setup.device, **shape, **options})


def _open(setup: BenchSetup, **options: Any) -> Session:
    return open_training(_config(setup, steps=UNLIMITED, **options), setup.folder / "run")


def _open_live(setup: BenchSetup, precision: str, *, frozen: bool) -> Session:
    return _open(
        setup,
        datasets=(setup.dataset,),
        encoder=_spec(setup),
        preprocess=Preprocess(),
        freeze_encoder=frozen,
        precision=precision,
    )


def _batches(session: Session) -> Iterator[Batch]:
    return session.enter(session.phases()[0]).batches(session.sampler.plans(0, UNLIMITED))


def _steps(learner: Learner, batches: Iterator[Batch], steps: int) -> Work:
    """Runs ``steps`` updates at a time, with retained memory as in the training loop."""
    with retained_memory():
        yield from _updates(learner, batches, steps)


def _updates(learner: Learner, batches: Iterator[Batch], steps: int) -> Work:
    for start in count(0, steps):
        for number in range(start, start + steps):
            loss = learner.step(next(batches), number)
        loss.item()
        yield steps


def _has_peer(setup: BenchSetup) -> bool:
    if setup.rgb_model_name != "resnet18":
        logger.info("robomimic has no %s, so its rows are left out", setup.rgb_model_name)
    elif importlib.util.find_spec("robomimic") is None:
        logger.info("robomimic is not installed, so its rows are left out; type %s", install_command("robomimic"))
    else:
        return True
    return False
