"""Live source: the encoder computes features from frames at every step.

Frames stay on the device as uint8 if they fit; otherwise a few threads prefetch them from the dataset. Batches hold
frames. The policy encodes them: frozen layers on the fast path, the others in the forward pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.encoders.frozen import FrozenEncoder
from cache_pipeline.policies.batch import Batch
from cache_pipeline.training.data.memory import fits, piece_rows
from cache_pipeline.training.data.sampler import Plan
from cache_pipeline.training.data.source import SplitRows, Splits, take_rows

READ_AHEAD, READERS = 4, 4
ENCODE_ROWS = 256


class DemoFrames(NamedTuple):
    """Locations of packed rows' frames: ``demos`` are numbers in the dataset, ``starts`` their first packed rows."""

    dataset: Dataset
    demos: tuple[int, ...]
    starts: NDArray[np.int64]

    @property
    def n_rows(self) -> int:
        return sum(self.dataset.demos[demo].length for demo in self.demos)

    def read(self, camera: str, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Reads the frames (…,H,W,3) of ``rows`` (…), which may repeat."""
        held, inverse = np.unique(rows, return_inverse=True)
        cuts = np.flatnonzero((np.diff(held) > 1) | (np.diff(self._place(held)) > 0)) + 1
        runs = [(int(run[0]), len(run)) for run in np.split(held, cuts) if len(run)]
        return self.dataset.gather(camera, [self._segment(*run) for run in runs])[inverse.reshape(rows.shape)]

    def load(self, camera: str, device: torch.device) -> Tensor:
        """Loads all frames, (N,H,W,3) uint8, to the device, part by part."""
        out = torch.empty(self.n_rows, *self.dataset.cameras[camera], dtype=torch.uint8, device=device)
        step = piece_rows(len(out), out[:1].nbytes)
        for demo, row in zip(self.demos, self.starts.tolist(), strict=True):
            length = self.dataset.demos[demo].length
            for start in range(0, length, step):
                piece = torch.from_numpy(self.dataset.frames(demo, camera, start, min(length, start + step)))
                out[row + start : row + start + len(piece)].copy_(piece)
        return out

    def _segment(self, row: int, count: int) -> tuple[int, int, int]:
        """Returns (demo, start, stop) of ``count`` packed rows of one demo."""
        place = int(self._place(np.array([row]))[0])
        start = row - int(self.starts[place])
        return self.demos[place], start, start + count

    def _place(self, rows: NDArray[np.int64]) -> NDArray[np.intp]:
        return np.searchsorted(self.starts, rows, side="right") - 1


class _Frames(Protocol):
    def batches(self, plans: Iterable[Plan], split: SplitRows) -> Iterator[tuple[Plan, dict[str, Tensor]]]: ...


class LiveSource:
    """Frames of the train and held-out demos.

    Args:
        frames: locations of the frames.
        cameras: names.
        encoders: makes the frozen encoder of each camera, for ``features_of``.
        budget: bytes that resident frames may take; beyond it frames are prefetched.
    """

    name = "live"

    def __init__(
        self,
        frames: DemoFrames,
        cameras: Sequence[str],
        *,
        encoders: Callable[[], Mapping[str, FrozenEncoder]],
        splits: Splits,
        budget: int,
        device: torch.device,
    ) -> None:
        self.cameras = tuple(cameras)
        self._demo_frames, self._device = frames, device
        self._encoders = encoders
        self._splits = splits
        needed = frames.n_rows * sum(int(np.prod(frames.dataset.cameras[camera])) for camera in cameras)
        kind = _ResidentFrames if fits(needed, budget) else _ReadAheadFrames
        self._frames: _Frames = kind(frames, self.cameras, device)

    def batches(self, plans: Iterable[Plan], *, valid: bool = False) -> Generator[Batch, None, None]:
        split = self._splits[int(valid)]
        assert split is not None
        for plan, frames in self._frames.batches(plans, split):
            yield split.batch(plan, frames)

    def frames_of(self, camera: str, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Returns the frames (n,H,W,3) of packed rows (n,)."""
        return self._demo_frames.read(camera, rows)

    def features_of(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        encoders, features = self._encoders(), {}
        for camera in self.cameras:
            parts = np.split(rows, range(ENCODE_ROWS, len(rows), ENCODE_ROWS))
            encoded = [encoders[camera](self._demo_frames.read(camera, part)).cpu() for part in parts]
            features[camera] = torch.cat(encoded)
        return features


class _ResidentFrames:
    def __init__(self, frames: DemoFrames, cameras: Sequence[str], device: torch.device) -> None:
        self._frames = {camera: frames.load(camera, device) for camera in cameras}
        self._device = device

    def batches(self, plans: Iterable[Plan], split: SplitRows) -> Iterator[tuple[Plan, dict[str, Tensor]]]:
        for plan in plans:
            rows = torch.from_numpy(split.obs_rows[plan.windows]).to(self._device)
            yield plan, {camera: take_rows(values, rows) for camera, values in self._frames.items()}


class _ReadAheadFrames:
    def __init__(self, frames: DemoFrames, cameras: Sequence[str], device: torch.device) -> None:
        self._source, self._cameras, self._device = frames, cameras, device

    def batches(self, plans: Iterable[Plan], split: SplitRows) -> Iterator[tuple[Plan, dict[str, Tensor]]]:
        plans = iter(plans)
        with ThreadPoolExecutor(READERS, thread_name_prefix="frames") as readers:
            coming: deque[tuple[Plan, Future[dict[str, Tensor]]]] = deque()
            for plan in islice(plans, READ_AHEAD):
                coming.append((plan, readers.submit(self._read, plan, split)))
            while coming:
                plan, future = coming.popleft()
                frames = future.result()
                for following in islice(plans, 1):
                    coming.append((following, readers.submit(self._read, following, split)))
                yield plan, {camera: values.to(self._device, non_blocking=True) for camera, values in frames.items()}

    def _read(self, plan: Plan, split: SplitRows) -> dict[str, Tensor]:
        rows = split.obs_rows[plan.windows]
        return {camera: torch.from_numpy(self._source.read(camera, rows)) for camera in self._cameras}
