from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_pipeline.training.config import Order
from cache_pipeline.training.data.run_data import DemoChoice, open_cache_data
from cache_pipeline.training.data.sampler import BlockOrder, Sampler
from cache_pipeline.training.data.sources import plan_source

orders = st.sampled_from([None, BlockOrder(block=3, pool=7), BlockOrder(block=4, pool=4), BlockOrder(block=5, pool=99)])


def drawn(sampler: Sampler, steps: int) -> np.ndarray:
    return np.concatenate([plan.windows for plan in sampler.plans(0, steps)])


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 5), orders)
def test_every_epoch_sees_every_window_once(n: int, batch: int, seed: int, blocks: BlockOrder | None) -> None:
    seen = drawn(Sampler(n, batch, seed, blocks=blocks), -(-3 * n // batch))
    for epoch in range(3):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(1, 17), st.integers(0, 30), orders)
def test_the_plan_of_a_step_does_not_depend_on_the_steps_before(
    n: int, batch: int, step: int, blocks: BlockOrder | None
) -> None:
    walked = Sampler(n, batch, 1, views=3, blocks=blocks)
    for plan in walked.plans(0, step + 1):
        last = plan
    fresh = Sampler(n, batch, 1, views=3, blocks=blocks).plan(step)
    assert np.array_equal(last.windows, fresh.windows)
    assert np.array_equal(last.views, fresh.views)
    assert last.pool == fresh.pool


def test_epochs_and_seeds_give_different_orders() -> None:
    first = drawn(Sampler(50, 50, 0), 2)
    assert not np.array_equal(first[:50], first[50:])
    assert not np.array_equal(first[:50], drawn(Sampler(50, 50, 1), 1))


def test_all_windows_of_a_pool_lie_in_the_blocks_drawn_for_it() -> None:
    sampler = Sampler(60, 10, 0, blocks=BlockOrder(block=5, pool=20))
    for pool in range(3):
        windows = np.concatenate([plan.windows for plan in sampler.plans(2 * pool, 2 * pool + 2)])
        assert [plan.pool for plan in sampler.plans(2 * pool, 2 * pool + 2)] == [pool, pool]
        assert len(set(windows // 5)) == 4


def test_blocks_are_drawn_from_the_whole_and_mixed_within_their_pool() -> None:
    windows = drawn(Sampler(1000, 100, 0, blocks=BlockOrder(block=10, pool=500)), 5)
    assert windows.min() < 100
    assert windows.max() > 900
    assert np.abs(np.diff(windows)).mean() > 100


@pytest.mark.parametrize("blocks", [None, BlockOrder(block=4, pool=8)])
def test_views_are_drawn_evenly_and_anew_in_each_epoch(blocks: BlockOrder | None) -> None:
    sampler = Sampler(4000, 4000, 0, views=4, blocks=blocks)
    views = [np.empty(4000, np.int64) for _ in range(2)]
    for epoch, plan in enumerate(sampler.plans(0, 2)):
        views[epoch][plan.windows] = plan.views
    counts = np.bincount(views[0], minlength=4)
    assert (counts > 800).all()
    assert 0.6 < (views[0] != views[1]).mean() < 0.9


def test_in_block_order_a_block_has_one_view() -> None:
    plan = Sampler(40, 40, 0, views=5, blocks=BlockOrder(block=4, pool=8)).plan(0)
    for block in range(10):
        assert len(set(plan.views[plan.windows // 4 == block])) == 1


@pytest.mark.parametrize(("pools", "order", "blocks"), [(8, "auto", False), (800, "auto", True), (8, "block", True)])
def test_a_streamed_cache_many_times_larger_than_memory_is_shuffled_in_blocks(
    pools: int, order: Order, blocks: bool, cache: Path
) -> None:
    data = open_cache_data(cache, None, None, DemoChoice())
    windows, row_bytes = 800, 2 * 512 * 4
    plan = plan_source(
        data,
        windows,
        source="streamed",
        order=order,
        views=1,
        max_memory=3 * row_bytes * (windows // pools),
        device=torch.device("cpu"),
    )
    assert plan.source == "streamed"
    assert (plan.blocks is not None) is blocks
    assert plan.with_order(plan.order) == plan
