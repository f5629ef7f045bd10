"""Simulates extraction on many workers: the static split (`--part i/n`) against a pool (`--workers`, Ray).

    python docs/scale_simulation.py

A unit takes the mean time or longer: most within 10 % of it, one in a hundred ten times as long (a straggling read).
Some workers are slow all the time (a shared or throttled GPU). Nodes are lost at random moments; a lost worker comes
back after a while. In the static split its part waits for it; in a pool its units go to the others.
"""

from __future__ import annotations

import heapq
import statistics
from dataclasses import dataclass

import numpy as np

UNITS = 292_969  # 100 million frames of 3 cameras in blocks of 1,024 rows
UNIT_S = 0.70
RUNS = 3


@dataclass(frozen=True)
class Case:
    """Workers, the fraction of slow ones with their factor, losses per worker and hour, seconds until it is back."""

    name: str
    workers: int
    slow: float = 0.0
    factor: float = 1.0
    losses: float = 0.0
    back_s: float = 300.0


CASES = (
    Case("16 equal workers", 16),
    Case("64 equal workers", 64),
    Case("64 workers, 5 % at half speed", 64, slow=0.05, factor=2.0),
    Case("64 workers, a loss per worker and 2 h", 64, losses=0.5),
    Case("64 workers, both", 64, slow=0.05, factor=2.0, losses=0.5),
    Case("256 workers, both", 256, slow=0.05, factor=2.0, losses=0.5),
)


def unit_seconds(rng: np.random.Generator) -> np.ndarray:
    seconds = UNIT_S * rng.normal(1.0, 0.1, UNITS).clip(0.5)
    seconds[rng.random(UNITS) < 0.01] *= 10
    return seconds


def one_unit(now: float, seconds: float, case: Case, rng: np.random.Generator) -> tuple[float, bool]:
    """Returns when a unit that is begun at ``now`` ends, and whether its worker was lost before that."""
    if case.losses:
        lost = rng.exponential(3600 / case.losses)
        if lost < seconds:
            return now + lost, False
    return now + seconds, True


def static_split(units: np.ndarray, speeds: np.ndarray, case: Case, rng: np.random.Generator) -> float:
    ends = []
    for worker, speed in enumerate(speeds):
        now = 0.0
        for seconds in units[worker :: case.workers]:
            done = False
            while not done:
                now, done = one_unit(now, seconds * speed, case, rng)
                now += 0.0 if done else case.back_s
        ends.append(now)
    return max(ends)


def pool(units: np.ndarray, speeds: np.ndarray, case: Case, rng: np.random.Generator) -> float:
    free = [(0.0, worker) for worker in range(case.workers)]
    heapq.heapify(free)
    waiting, last = list(units[::-1]), 0.0
    while waiting:
        now, worker = heapq.heappop(free)
        seconds = waiting.pop()
        now, done = one_unit(now, seconds * speeds[worker], case, rng)
        if done:
            last = max(last, now)
        else:
            waiting.append(seconds)
            now += case.back_s
        heapq.heappush(free, (now, worker))
    return last


def main() -> None:
    print(f"{UNITS} units of {UNIT_S} s on average; hours until the last unit is done; median of {RUNS} runs")
    print("| case | ideal, h | static split, h | of ideal | pool, h | of ideal |")
    print("|---|---|---|---|---|---|")
    for case in CASES:
        rows = []
        for seed in range(RUNS):
            rng = np.random.default_rng(seed)
            units = unit_seconds(rng)
            speeds = np.where(rng.random(case.workers) < case.slow, case.factor, 1.0)
            ideal = units.sum() / (1 / speeds).sum()
            rows.append((ideal, static_split(units, speeds, case, rng), pool(units, speeds, case, rng)))
        ideal, split, pooled = (statistics.median(column) / 3600 for column in zip(*rows, strict=True))
        print(
            f"| {case.name} | {ideal:.3f} | {split:.3f} | {split / ideal:.2f} | {pooled:.3f} | {pooled / ideal:.2f} |"
        )


if __name__ == "__main__":
    main()
