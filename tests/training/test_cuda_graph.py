from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cache_pipeline.policies.batch import Batch
from cache_pipeline.training.config import OptimConfig
from cache_pipeline.training.cuda_graph import WARM_UP, GraphedUpdate, Number, Recording
from cache_pipeline.training.learner import PolicyLearner
from cache_pipeline.training.optim import Optimizer
from cache_pipeline.training.session import open_session
from tests.training.training_runs import config

STEPS = 9
GIVEN_UP = "training goes on without"


class Tape:
    """Records as a CUDA graph does: nothing is done while recording, and a replay works on the tensors of then."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator, self.warm, self.replays = generator, 0, 0

    def warm_up(self, work: Callable[[], Any]) -> Any:
        self.warm += 1
        return work()

    def record(self, work: Callable[[], Tensor]) -> Recording:
        loss = torch.zeros(())

        def replay() -> None:
            self.replays += 1
            self.before(loss)
            loss.copy_(work())

        return Recording(replay, loss)

    def before(self, loss: Tensor) -> None:
        pass


class Refusing(Tape):
    def record(self, work: Callable[[], Tensor]) -> Recording:
        work()
        raise RuntimeError("operation not permitted when stream is capturing")


class Failing(Tape):
    def before(self, loss: Tensor) -> None:
        raise torch.OutOfMemoryError("no room")


class OtherNumbers(Tape):
    def before(self, loss: Tensor) -> None:
        torch.rand(1, generator=self.generator)


class OtherLoss(Tape):
    def record(self, work: Callable[[], Tensor]) -> Recording:
        return super().record(lambda: 1.01 * work())


class Doubling(Tape):
    """Makes two updates for one, whose loss is the first one's."""

    def record(self, work: Callable[[], Tensor]) -> Recording:
        inner = super().record(work)

        def replay() -> None:
            inner.replay()
            kept = inner.loss.clone()
            inner.replay()
            inner.loss.copy_(kept)

        return Recording(replay, inner.loss)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def opened(request: pytest.FixtureRequest, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    run = tmp_path_factory.mktemp("graph") / "run"
    return open_session(config(run, cache, batch_size=8, precision=request.param), run)


@pytest.fixture
def batches(opened: Any) -> list[Batch]:
    return list(opened.source.batches(opened.sampler.plans(0, STEPS)))


def learner(opened: Any, recorder: Callable[[torch.Generator], Any] | None = None, **optim: Any) -> PolicyLearner:
    return PolicyLearner(
        copy.deepcopy(opened.learner.policy),
        OptimConfig(**{"warmup_steps": 2, "grad_clip": 0.5, **optim}),
        rates={"policy": 1e-3, "encoder": 1e-4},
        steps=STEPS,
        seed=3,
        device=torch.device("cpu"),
        recorder=recorder,
    )


def trained(learner: PolicyLearner, batches: Sequence[Batch]) -> list[Tensor]:
    """Losses, then all that is kept."""
    losses = [learner.step(batch, number) for number, batch in enumerate(batches)]
    kept = {**learner.model_tensors(), **learner.ema_tensors(), **learner.resume_tensors()}
    return [*losses, *(kept[name] for name in sorted(kept))]


def check_same(opened: Any, found: Any, wanted: Any) -> None:
    """But for the rounding of the learning rate to float32, which bfloat16 makes larger."""
    atol = 1e-6 if opened.config.precision == "fp32" else 5e-5
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=atol)


def recorded_with(opened: Any, kind: type[Tape], **optim: Any) -> tuple[PolicyLearner, list[Any]]:
    """A learner, and the recorders that it has made."""
    tapes: list[Tape] = []

    def tape(generator: torch.Generator) -> Tape:
        tapes.append(kind(generator))
        return tapes[-1]

    return learner(opened, tape, **optim), tapes


@pytest.mark.parametrize("optim", [{}, {"ema": None, "grad_clip": None}])
def test_replayed_updates_are_those_that_were_recorded(
    opened: Any, batches: list[Batch], optim: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    ours, (tape,) = recorded_with(opened, Tape, **optim)
    check_same(opened, trained(ours, batches), trained(learner(opened, **optim), batches))
    assert (tape.warm, tape.replays) == (WARM_UP, STEPS - WARM_UP)
    assert not caplog.records


@pytest.mark.parametrize("kind", [Refusing, Failing, OtherNumbers, OtherLoss, Doubling])
def test_a_recording_that_fails_or_differs_is_given_up_and_nothing_of_it_is_left(
    opened: Any, batches: list[Batch], kind: type[Tape], caplog: pytest.LogCaptureFixture
) -> None:
    ours, (tape,) = recorded_with(opened, kind)
    found, wanted = trained(ours, batches), trained(learner(opened), batches)
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))
    assert caplog.text.count(GIVEN_UP) == 1
    assert tape.replays <= 2


def test_an_update_that_fails_after_its_gradient_leaves_none(
    opened: Any, batches: list[Batch], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ordinary = Optimizer.step

    def step(optimizer: Optimizer, share: float | Tensor) -> None:
        if isinstance(share, Tensor):
            raise RuntimeError("operation not permitted when stream is capturing")
        ordinary(optimizer, share)

    monkeypatch.setattr(Optimizer, "step", step)
    ours, _ = recorded_with(opened, Tape)
    found, wanted = trained(ours, batches), trained(learner(opened), batches)
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))
    assert GIVEN_UP in caplog.text


def test_a_batch_of_another_size_is_not_replayed(opened: Any, batches: list[Batch]) -> None:
    ours, (tape,) = recorded_with(opened, Tape)
    batches[-2] = batches[-2].select(slice(0, 5))
    check_same(opened, trained(ours, batches), trained(learner(opened), batches))
    assert tape.replays == STEPS - WARM_UP - 1


def test_a_state_that_is_loaded_is_gone_on_from(opened: Any, batches: list[Batch]) -> None:
    ours, (tape,) = recorded_with(opened, Tape)
    plain = learner(opened)
    state = [copy.deepcopy(part) for part in (plain.model_tensors(), plain.ema_tensors(), plain.resume_tensors())]
    trained(ours, batches)
    ours.load(*state)
    check_same(opened, trained(ours, batches), trained(plain, batches))
    assert tape.replays == 2 * STEPS - WARM_UP


def test_measuring_between_updates_changes_none(opened: Any, batches: list[Batch]) -> None:
    ours, _ = recorded_with(opened, Tape)
    plain = learner(opened)
    for number, batch in enumerate(batches):
        losses = [each.step(batch, number) for each in (ours, plain)]
        check_same(opened, *losses)
        with ours.averaged():
            assert any(
                not torch.equal(value, ours.model_tensors()[name]) for name, value in plain.model_tensors().items()
            )


def test_what_learns_from_now_on_is_recorded_anew(opened: Any, batches: list[Batch]) -> None:
    ours, tapes = recorded_with(opened, Tape)
    trained(ours, batches)
    ours.learn("encoder", [("extra", torch.nn.Parameter(torch.zeros(2)))])
    trained(ours, batches)
    assert [tape.replays for tape in tapes] == [STEPS - WARM_UP] * 2


def test_parts_of_batches_are_not_recorded(opened: Any) -> None:
    def refuse(generator: torch.Generator) -> Any:
        raise AssertionError

    PolicyLearner(
        copy.deepcopy(opened.learner.policy),
        OptimConfig(),
        rates={"policy": 1e-3},
        steps=STEPS,
        seed=3,
        device=torch.device("cpu"),
        accumulate=2,
        recorder=refuse,
    )


def test_frames_are_not_recorded() -> None:
    def update(batch: Batch, numbers: Sequence[Number]) -> Tensor:
        return torch.zeros(())

    generator = torch.Generator()
    tape = Tape(generator)
    graphed = GraphedUpdate(update, update, list, generator, tape)
    frames = {"camera": torch.zeros(2, 1, 4, 4, 3, dtype=torch.uint8)}
    for _ in range(WARM_UP + 2):
        graphed(Batch(frames, torch.zeros(2, 1, 1), torch.ones(2, 1, dtype=torch.bool)), (1.0, 0.5))
    assert tape.warm == tape.replays == 0
    assert not graphed.recorded


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("policy", ["flow", "mlp", "gmm"])
def test_a_cuda_graph_makes_the_updates_of_its_kernels(
    cache: Path, tmp_path: Path, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = []
    for graphed in (True, False):
        run = tmp_path / str(graphed)
        session = open_session(
            config(run, cache, batch_size=8, policy=policy, device="cuda", precision="fp32", cuda_graph=graphed), run
        )
        found.append(trained(session.learner, list(session.source.batches(session.sampler.plans(0, STEPS)))))
        update = session.learner._graphed
        assert (update is not None and update.recorded) is graphed
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
    assert GIVEN_UP not in caplog.text
