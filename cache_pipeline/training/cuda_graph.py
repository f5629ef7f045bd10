"""A policy's update recorded once as a CUDA graph and replayed with one launch, in place of one for every kernel.

After Ng et al., Accelerating PyTorch with CUDA Graphs, 2021 (https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from cache_pipeline.policies.batch import Batch

logger = logging.getLogger("cache_pipeline")

WARM_UP = 3
LOSS_TOLERANCE, MOVE_TOLERANCE = 1e-3, 1e-2

T = TypeVar("T")
Number = float | Tensor
Update = Callable[[Batch, Sequence[Number]], Tensor]
"""A batch and the numbers that go with its step, to the loss, a scalar on the device, detached."""


class Recording(NamedTuple):
    """What replays an update, and where it leaves the loss."""

    replay: Callable[[], None]
    loss: Tensor


class Recorder(Protocol):
    """Records work of the device."""

    def warm_up(self, work: Callable[[], T]) -> T:
        """Does ``work`` where it will be recorded."""
        ...

    def record(self, work: Callable[[], Tensor]) -> Recording:
        """Records ``work``; raises RuntimeError where that cannot be."""
        ...


class GraphedUpdate:
    """Makes updates one by one at first, then by a recording of one, if that does the same.

    The fourth update is made both ways, from the same weights and random numbers. Unless they agree, and wherever
    recording fails, updates go on one by one; so does one of a batch unlike those before.

    Args:
        update: the ordinary way.
        recorded: the same, asking the device nothing and allocating nothing that outlives it. Numbers are scalars on
            the device. What it raises leaves no gradients.
        state: all tensors that an update changes.
        generator: of its random numbers.
    """

    def __init__(
        self,
        update: Update,
        recorded: Update,
        state: Callable[[], Sequence[Tensor]],
        generator: torch.Generator,
        recorder: Recorder,
    ) -> None:
        self._update, self._recorded, self._state = update, recorded, state
        self._generator, self._recorder = generator, recorder
        self._seen, self._given_up = 0, False
        self._batch: Batch | None = None
        self._numbers: list[Tensor] = []
        self._recording: Recording | None = None

    @property
    def recorded(self) -> bool:
        """Whether updates are replayed now."""
        return self._recording is not None

    def __call__(self, batch: Batch, numbers: Sequence[float]) -> Tensor:
        """The loss of one update, detached."""
        if self._given_up or not self._takes(batch):
            return self._update(batch, numbers)
        self._seen += 1
        if self._seen <= WARM_UP:
            return self._recorder.warm_up(lambda: self._update(batch, numbers))
        if self._recording is None:
            return self._begin(batch, numbers)
        self._replay(self._recording, batch, numbers)
        return self._recording.loss.clone()

    def _takes(self, batch: Batch) -> bool:
        """Frames are for encoders, whose work outweighs launches."""
        if any(values.dtype == torch.uint8 for values in batch.obs.values()):
            return False
        if self._batch is None:
            return True
        known, new = _tensors(self._batch), _tensors(batch)
        return known.keys() == new.keys() and all(
            value.shape == new[key].shape and value.dtype == new[key].dtype for key, value in known.items()
        )

    def _begin(self, batch: Batch, numbers: Sequence[float]) -> Tensor:
        """Records the update, tries it, and makes it in the ordinary way."""
        before, random = _copies(self._state()), self._generator.get_state()
        recording, found = None, []
        try:
            recording = self._record(batch, numbers)
            self._replay(recording, batch, numbers)
            found = _copies([recording.loss, *self._state()])
        except RuntimeError as error:
            logger.warning("a step could not be recorded as a CUDA graph (%s); training goes on without", error)
        for value, old in zip(self._state(), before, strict=True):
            value.copy_(old)
        self._generator.set_state(random)
        loss = self._update(batch, numbers)
        if found and not _agree(found, [loss, *self._state()], before):
            logger.warning("a step recorded as a CUDA graph does not do what it did before; training goes on without")
            found = []
        self._given_up = not found
        self._recording = recording if found else None
        return loss

    def _record(self, batch: Batch, numbers: Sequence[float]) -> Recording:
        obs = {key: value.clone() for key, value in batch.obs.items()}
        rows = None if batch.rows is None else batch.rows.clone()
        own = self._batch = Batch(obs, batch.actions.clone(), batch.mask.clone(), rows)
        self._numbers = [torch.tensor(number, dtype=torch.float32, device=own.actions.device) for number in numbers]
        return self._recorder.record(lambda: self._recorded(own, self._numbers))

    def _replay(self, recording: Recording, batch: Batch, numbers: Sequence[float]) -> None:
        assert self._batch is not None
        new = _tensors(batch)
        for key, value in _tensors(self._batch).items():
            value.copy_(new[key], non_blocking=True)
        for own, number in zip(self._numbers, numbers, strict=True):
            own.fill_(number)
        recording.replay()


class CudaRecorder:
    """Records on a stream of its own.

    Args:
        generator: from which the work draws random numbers; further draws follow each replay.
    """

    def __init__(self, device: torch.device, generator: torch.Generator) -> None:
        self._device, self._generator = device, generator
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def warm_up(self, work: Callable[[], T]) -> T:
        around = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(around)
        with torch.cuda.stream(self._stream):
            result = work()
        around.wait_stream(self._stream)
        return result

    def record(self, work: Callable[[], Tensor]) -> Recording:
        graph = torch.cuda.CUDAGraph()
        with ExitStack() as stack:
            stack.enter_context(torch.cuda.device(self._device))
            around = torch.cuda.current_stream()
            # Some versions of torch leave the recording stream in place where recording fails.
            stack.callback(torch.cuda.set_stream, around)
            for generator in (self._generator, torch.cuda.default_generators[around.device_index]):
                stack.enter_context(_given_back(generator))
            graph.register_generator_state(self._generator)
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                loss = work()
        return Recording(graph.replay, loss)


@contextmanager
def _given_back(generator: torch.Generator) -> Iterator[None]:
    """Has a recording that fails take a copy of the generator's state with it: one in use then stays unusable."""
    state = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        yield
    except BaseException:
        generator.graphsafe_set_state(state)
        raise


def _tensors(batch: Batch) -> dict[str, Tensor]:
    """All that a batch holds, by a name each."""
    rows = {} if batch.rows is None else {"rows": batch.rows}
    obs = {f"obs/{key}": value for key, value in batch.obs.items()}
    return {**obs, "actions": batch.actions, "mask": batch.mask, **rows}


def _copies(values: Sequence[Tensor]) -> list[Tensor]:
    return [value.detach().clone() for value in values]


def _agree(found: Sequence[Tensor], wanted: Sequence[Tensor], before: Sequence[Tensor]) -> bool:
    """Whether two updates from ``before`` did the same but for rounding; the loss comes first in both."""
    loss, expected = found[0], wanted[0]
    if not bool((loss - expected).abs() <= LOSS_TOLERANCE * expected.abs()):
        return False
    moves = zip(found[1:], wanted[1:], before, strict=True)
    return all(bool((one - two).norm() <= MOVE_TOLERANCE * (two - old).norm()) for one, two, old in moves)
