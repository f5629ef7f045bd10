"""Asks a policy for the actions of several episodes at once.

The actions of an episode depend on its seed and its obs alone, bit for bit, whatever episodes are asked for beside it:

- Each episode draws its noise from a generator of its own.
- Arithmetic in batches of different sizes differs in the last bits, which a simulation magnifies. So frames are
  encoded, and the policy is asked, in batches of fixed sizes, the last one padded. In a batch of one size a row depends
  neither on the others nor on its place. (Measured in float32 on a CPU: an action head gives other last bits in
  batches of 1, 2 and 16, and equal ones for any batches of one size; so does a ResNet.)
- A policy that cannot be given noise (robomimic's algorithms, policies of the user's own) is asked for one episode at a
  time, with torch's generator seeded for that episode.

Another machine, number of threads or device may give other bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_pipeline.encoders.frozen import frozen_encoders
from cache_pipeline.sim.history import Moment, ObsHistory

ACTING_BATCH = 8
"""Episodes in one call of a policy; a smaller batch takes about the same time."""
ENCODED_AT_ONCE = {"cpu": 2, "cuda": 16}
"""Frames in one call of an encoder. On a CPU the time per frame hardly depends on it; 2 is what To = 2 needs."""

Item = TypeVar("Item")


class ActingPolicy(Protocol):
    """Interface of a policy in a rollout, such as ``VisuomotorPolicy``.

    Optional attributes: ``encode(camera, frames) -> features``: each frame is then encoded once, and ``act`` gets
    features. ``noise_shape``: the policy takes batches, and ``noise=`` if the shape is not None. ``for_episode()``
    returns a policy with a state of its own. ``start_episode()`` resets the state.
    """

    @property
    def cameras(self) -> Mapping[str, tuple[int, ...]]:
        """rgb obs key → (H, W) or (H, W, 3) of its images."""

    @property
    def low_dim(self) -> Mapping[str, tuple[int, ...]]:
        """Low-dim key → shape of one row."""

    @property
    def obs_horizon(self) -> int:
        """To."""

    @property
    def env_args(self) -> Mapping[str, Any] | None:
        """Value in the dataset of the policy, or None."""

    @property
    def render_flags(self) -> Mapping[str, Any] | None:
        """Value in the dataset of the policy, or None."""

    def act(self, obs: dict[str, Tensor]) -> Tensor:
        """Returns actions (B, Ta, A) in dataset units; the first one belongs to the last obs.

        Args:
            obs: each camera uint8 (B, To, H, W, 3), each low-dim key float32 (B, To, d). B is 1 unless the policy has
                ``noise_shape``.
        """


class Mind:
    """What a policy remembers of one episode: its last obs, its random numbers, and its own state if it has one."""

    def __init__(self, policy: Any, history: ObsHistory, seed: int) -> None:
        self.policy, self.history = policy, history
        self.generator = torch.Generator().manual_seed(seed)


class Actor:
    """Asks ``policy`` for the actions of all episodes that need some.

    Args:
        policy: the policy; it must be in evaluation mode.
        device: device of the policy's input.
    """

    def __init__(self, policy: ActingPolicy, device: str | torch.device) -> None:
        self._policy: Any = policy
        self._device = torch.device(device)
        self._together = hasattr(policy, "noise_shape")
        self._encodes = hasattr(policy, "encode")

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(self._policy.cameras)

    @property
    def keys(self) -> tuple[str, ...]:
        """The obs that the policy needs."""
        return (*self._policy.cameras, *self._policy.low_dim)

    @property
    def obs_horizon(self) -> int:
        return int(self._policy.obs_horizon)

    @property
    def one_at_a_time(self) -> bool:
        """Whether episodes must follow each other, since the policy has one state for all."""
        return hasattr(self._policy, "start_episode") and not hasattr(self._policy, "for_episode")

    def begin(self, seed: int) -> Mind:
        """Begins the episode of ``seed``."""
        policy = self._policy
        if hasattr(policy, "for_episode"):
            policy = policy.for_episode()
        elif hasattr(policy, "start_episode"):
            policy.start_episode()
        return Mind(policy, ObsHistory(self.keys, self.obs_horizon), seed)

    @torch.no_grad()
    def act(self, minds: Sequence[Mind]) -> list[NDArray[np.float64]]:
        """Returns the chunk (Ta, A) of each episode for its last obs."""
        if self._encodes:
            self._encode([moment for mind in minds for moment in mind.history.moments])
        if self._together:
            return self._act_together(minds)
        return [self._act_alone(mind) for mind in minds]

    def _encode(self, moments: Sequence[Moment]) -> None:
        """Encodes the frames that have no feature yet."""
        for camera in self._policy.cameras:
            new = list({id(moment): moment for moment in moments if camera not in moment.features}.values())
            for group, padded in _batches(new, ENCODED_AT_ONCE.get(self._device.type, 1)):
                frames = torch.from_numpy(np.stack([moment.obs[camera] for moment in padded]))
                features = self._policy.encode(camera, frames.to(self._device))
                for moment, feature in zip(group, features, strict=False):
                    moment.features[camera] = feature

    def _act_together(self, minds: Sequence[Mind]) -> list[NDArray[np.float64]]:
        shape, chunks = self._policy.noise_shape, []
        for group, padded in _batches(minds, ACTING_BATCH):
            drawn = {}
            if shape is not None:
                noise = {id(mind): torch.randn(shape, generator=mind.generator) for mind in group}
                drawn["noise"] = torch.stack([noise[id(mind)] for mind in padded]).to(self._device)
            actions = self._policy.act(self._obs(padded), **drawn)
            assert len(actions) == len(padded), actions.shape
            chunks += list(actions[: len(group)].double().cpu().numpy())
        return chunks

    def _act_alone(self, mind: Mind) -> NDArray[np.float64]:
        seed = int(torch.randint(2**62, (), generator=mind.generator))
        with seeded(seed, self._device):
            actions = mind.policy.act(self._obs([mind]))
        assert actions.shape[:-2] == (1,), actions.shape
        return np.asarray(actions[0].double().cpu().numpy())

    def _obs(self, minds: Sequence[Mind]) -> dict[str, Tensor]:
        stacks = [mind.history.stack() for mind in minds]
        obs = {}
        for key in self.keys:
            if self._encodes and key in self._policy.cameras:
                rows = [torch.stack([moment.features[key] for moment in mind.history.moments]) for mind in minds]
                obs[key] = torch.stack(rows)
                continue
            values = torch.from_numpy(np.stack([stack[key] for stack in stacks]))
            obs[key] = (values if key in self._policy.cameras else values.float()).to(self._device)
        return obs


def on_fast_path(policy: Any) -> Any:
    """Lets a loaded policy encode frames on the fast path of frozen encoders, in fp32, and returns it."""
    if not policy.frozen_trunks:
        device = torch.device(policy.device)
        policy.frozen_trunks = frozen_encoders(policy.encoders, policy.preprocessing, device, "fp32")
    return policy


def _batches(items: Sequence[Item], size: int) -> Iterator[tuple[Sequence[Item], list[Item]]]:
    """Yields groups of at most ``size`` items, each also padded to ``size`` by its last item."""
    for start in range(0, len(items), size):
        group = items[start : start + size]
        yield group, [*group, *[group[-1]] * (size - len(group))]


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's generator inside the block and restores the caller's random state."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
