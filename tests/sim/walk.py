"""A small environment with gymnasium's interface, for tests in this process and in workers."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np


class Walk:
    """A point that actions move, with noise of the seed; small differences of actions grow tenfold at each step.

    It is a gymnasium environment too. Success depends on the last bits of the actions.
    """

    action_space = None

    def __init__(self, size: int = 8, length: int = 12, busy_s: float = 0.0) -> None:
        self.size, self.length, self.busy_s = size, length, busy_s

    def reset(self, *, seed: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        self.random = np.random.default_rng(seed)
        self.place, self.steps = self.random.normal(size=3), 0
        return self._obs(), {}

    def close(self) -> None:
        pass

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        until = time.process_time() + self.busy_s
        while time.process_time() < until:
            pass
        self.steps += 1
        self.place = np.sin(100 * (self.place + action[:3]) + self.random.normal(size=3))
        info = {"is_success": np.float32(self.place.sum() > 2.2)}
        return self._obs(), 0.0, False, self.steps >= self.length, info

    def _obs(self) -> dict[str, np.ndarray]:
        shades = (127 * (1 + np.outer(np.ones(self.size), np.sin(self.place.sum() + np.arange(self.size))))).astype(
            np.uint8
        )
        image = np.stack([shades, shades.T, shades], axis=-1)
        return {"front_image": image, "wrist_image": image[::-1].copy(), "pose": self.place.astype(np.float32)}


def make() -> Walk:
    return Walk()


def lacking() -> Walk:
    made = Walk()
    seen = made._obs
    made._obs = lambda: {key: value for key, value in seen().items() if key != "pose"}  # type: ignore[method-assign]
    return made


class Dying(Walk):
    """Ends its process at the fourth step, as a crash of the simulator does."""

    def step(self, action: np.ndarray) -> Any:
        if self.steps == 3:
            os._exit(9)
        return super().step(action)


class Failing(Walk):
    def step(self, action: np.ndarray) -> Any:
        raise ZeroDivisionError("the arm is on fire")


def busy() -> Walk:
    """Takes 5 ms of one core per step."""
    return Walk(busy_s=0.005, length=20)
