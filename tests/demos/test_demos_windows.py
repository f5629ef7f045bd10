"""Windows equal those of robomimic; epoch orders are permutations that depend only on (seed, epoch)."""

import contextlib
import io
import random

import h5py
import numpy as np
import pytest
from fakes import make_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_pipeline.demos.windows import WindowSpec, epoch_order, make_windows
from cache_pipeline.errors import ConfigError


def random_settings(seed):
    rng = random.Random(seed)
    spec = WindowSpec(rng.randint(1, 5), rng.randint(1, 6), bool(rng.getrandbits(1)), bool(rng.getrandbits(1)))
    shortest = spec.obs_horizon - 1 + spec.action_horizon
    low = 1 if spec.pad_start and spec.pad_end else shortest
    return spec, [rng.randint(low, low + 6) for _ in range(rng.randint(1, 4))]


@pytest.mark.parametrize("seed", range(24))
def test_rows_actions_and_mask_equal_those_of_robomimics_sequence_dataset(tmp_path, seed):
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.importorskip("robomimic")
        from robomimic.utils.dataset import SequenceDataset
    spec, lengths = random_settings(seed)
    path = make_dataset(tmp_path / "lift.hdf5", lengths=lengths, cameras={}, masks={})
    with h5py.File(path, "r+") as file:
        first = 0
        for i, length in enumerate(lengths):
            demo = file[f"data/demo_{i}"]
            demo["obs/row"] = np.arange(first, first + length)[:, None]
            first += length
        actions = np.concatenate([file[f"data/demo_{i}/actions"][()] for i in range(len(lengths))])
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = SequenceDataset(
            str(path),
            obs_keys=("row",),
            dataset_keys=("actions",),
            frame_stack=spec.obs_horizon,
            seq_length=spec.action_horizon,
            pad_frame_stack=spec.pad_start,
            pad_seq_length=spec.pad_end,
            get_pad_mask=True,
            load_next_obs=False,
        )
    ours = make_windows(np.cumsum([0, *lengths[:-1]]), lengths, spec)
    assert len(theirs) == len(ours.demo)
    now = spec.obs_horizon - 1
    for number in range(len(theirs)):
        item = theirs[number]
        np.testing.assert_array_equal(item["obs"]["row"][: now + 1, 0], ours.obs_rows[number])
        np.testing.assert_array_equal(item["obs"]["row"][now:, 0], ours.action_rows[number])
        np.testing.assert_array_equal(item["actions"][now:], actions[ours.action_rows[number]])
        np.testing.assert_array_equal(item["obs"]["pad_mask"][now:, 0], ours.action_mask[number])
    theirs.close_and_delete_hdf5_handle()


def test_windows_of_a_short_demo_are_as_documented():
    windows = make_windows([10], [3], WindowSpec(obs_horizon=2, action_horizon=3))
    assert windows.obs_rows.tolist() == [[10, 10], [10, 11], [11, 12]]
    assert windows.action_rows.tolist() == [[10, 11, 12], [11, 12, 12], [12, 12, 12]]
    assert windows.action_mask.tolist() == [[True, True, True], [True, True, False], [True, False, False]]
    assert [array.dtype for array in windows] == [np.int64, np.int64, bool, np.int64]


@given(
    demos=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 5)), min_size=1, max_size=6),
    to=st.integers(1, 6),
    ta=st.integers(1, 6),
)
@settings(max_examples=80, deadline=None)
def test_windows_stay_within_their_demo_in_any_row_space_and_cover_every_step(demos, to, ta):
    lengths = np.array([length for length, _ in demos])
    starts = np.cumsum([gap + before for (_, gap), before in zip(demos, [0, *lengths[:-1]], strict=True)])
    windows = make_windows(starts, lengths, WindowSpec(to, ta))
    steps = np.concatenate([np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)])
    np.testing.assert_array_equal(windows.obs_rows[:, -1], steps)
    np.testing.assert_array_equal(windows.action_rows[:, 0], steps)
    for rows in (windows.obs_rows, windows.action_rows):
        assert (rows >= starts[windows.demo, None]).all()
        assert (rows < (starts + lengths)[windows.demo, None]).all()
    assert windows.action_mask[:, 0].all()


def test_without_padding_every_window_is_whole():
    windows = make_windows([0, 6], [6, 5], WindowSpec(2, 3, pad_start=False, pad_end=False))
    assert windows.demo.tolist() == [0, 0, 0, 1, 1]
    assert windows.action_mask.all()
    assert (np.diff(windows.obs_rows) == 1).all()
    assert (np.diff(windows.action_rows) == 1).all()


def test_a_demo_too_short_for_one_whole_window_is_an_error_and_not_skipped():
    with pytest.raises(ConfigError, match=r"demo number 1 has 3 steps, fewer than the 4"):
        make_windows([0, 6], [6, 3], WindowSpec(2, 3, pad_start=False, pad_end=False))


@pytest.mark.parametrize("options", [{"obs_horizon": 0}, {"action_horizon": -1}])
def test_horizons_below_one_are_refused(options):
    with pytest.raises(ConfigError, match="must be at least 1"):
        WindowSpec(**options)


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    order = epoch_order(100, 3, 5)
    np.random.seed(1)  # noqa: NPY002
    np.testing.assert_array_equal(epoch_order(100, 3, 5), order)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(100))
    for other in (epoch_order(100, 3, 6), epoch_order(100, 4, 5), epoch_order(100, 5, 3)):
        assert (other != order).any()


def test_the_order_of_an_epoch_never_changes_between_versions():
    assert epoch_order(8, 0, 0).tolist() == [3, 6, 4, 0, 7, 5, 2, 1]


def test_a_negative_seed_is_refused():
    with pytest.raises(ConfigError, match="seed -1"):
        epoch_order(3, -1, 0)
