"""Timing that can be compared on a shared machine: contenders take turns, and medians are quoted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

MIN_ROUNDS = 3


def side_by_side(contenders: Mapping[str, Callable[[], int]], seconds: float) -> dict[str, float]:
    """Items per second of each contender, measured in turns so that a drift of the machine meets all alike.

    Args:
        contenders: name → a function that does some work and returns how many items it did. Each is called once first,
            uncounted, to warm up.
        seconds: least time that each contender runs in all; at least three rounds are made.

    Returns:
        Name → median over rounds.
    """
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    spent = dict.fromkeys(contenders, 0.0)
    for work in contenders.values():
        work()
    while min(spent.values()) < seconds or len(next(iter(rates.values()))) < MIN_ROUNDS:
        for name, work in contenders.items():
            if spent[name] >= 4 * seconds and len(rates[name]) >= MIN_ROUNDS:
                continue
            started = time.perf_counter()
            items = work()
            elapsed = time.perf_counter() - started
            spent[name] += elapsed
            rates[name].append(items / elapsed)
    return {name: median(values) for name, values in rates.items()}
