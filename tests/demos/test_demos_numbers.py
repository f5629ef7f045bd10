"""Actions and low-dim obs: values that cannot be trained on, statistics in float64, and files that crash HDF5."""

import json
import os
import signal
import warnings

import h5py
import numpy as np
import pytest
import test_demos_numbers  # by its own name, under which the child process imports it
from fakes import make_dataset

from cache_pipeline.demos import dataset as dataset_module
from cache_pipeline.demos import numbers, stillness
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.demos.layouts.robomimic import scan
from cache_pipeline.demos.numbers import check_numbers
from cache_pipeline.demos.split import Split, keep_together
from cache_pipeline.demos.summary import inspect_dataset
from cache_pipeline.errors import DatasetError

CAMERA = "agentview_image"


@pytest.fixture
def path(tmp_path):
    return make_dataset(tmp_path / "demos.hdf5")


def rewrite(path, name, change):
    with h5py.File(path, "r+") as file:
        for demo in file["data"]:
            values = change(file[f"data/{demo}/{name}"][()].astype(np.float64))
            del file[f"data/{demo}/{name}"]
            file[f"data/{demo}/{name}"] = values


@pytest.mark.parametrize(("name", "scale"), [("actions", 1e6), ("obs/robot0_eef_pos", 1e8)])
def test_variation_that_float32_cannot_hold_is_said(path, caplog, name, scale):
    rewrite(path, name, lambda values: scale + 1e-3 * values)
    Dataset.open(path).close()
    assert f"{name} varies by only" in caplog.text
    assert "float32 cannot hold this variation" in caplog.text
    assert any(f"{name} varies by only" in note for note in inspect_dataset(path).files[0].notes)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6])
def test_variation_at_any_scale_is_held(path, caplog, scale):
    rewrite(path, "actions", lambda values: scale * values)
    Dataset.open(path).close()
    assert "varies by only" not in caplog.text


@pytest.mark.parametrize(
    ("value", "said"), [(3e37, "beyond ±1e+15; rescale them"), (1e300, "not finite"), (np.nan, "not finite")]
)
def test_values_that_overflow_in_training_are_refused_before_work(path, value, said):
    def change(values):
        values[2, 1] = value
        return values

    rewrite(path, "actions", change)
    with pytest.raises(DatasetError, match=r"demo_0: actions is .* at frame 2 \(1 of 7 frames are ") as error:
        Dataset.open(path)
    assert said in str(error.value)


def test_statistics_of_many_blocks_are_those_of_all_rows_in_float64(path, monkeypatch):
    rewrite(path, "actions", lambda values: 1e6 + values)
    with h5py.File(path) as file:
        rows = np.concatenate([file[f"data/{demo}/actions"][()] for demo in file["data"]])
    found = check_numbers(scan(path).source, [(f"demo_{number}", ("actions",)) for number in range(3)]).statistics[
        "actions"
    ]
    monkeypatch.setattr(numbers, "BLOCK_BYTES", 1)
    assert np.array_equal(found.min, rows.min(0))
    assert np.array_equal(found.max, rows.max(0))
    assert np.allclose(found.std, rows.std(0), rtol=1e-9)
    assert found.beyond_one == len(rows)


@pytest.mark.parametrize("odd", [np.inf, 1 + 2j, "many", 2.5, np.array([1, 2]), -(2**63)])
def test_odd_counts_are_noted_without_a_warning_of_numpy(path, odd):
    with h5py.File(path, "r+") as file:
        file["data"].attrs["total"] = odd
        file["data/demo_1"].attrs["num_samples"] = odd
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notes = inspect_dataset(path).files[0].notes
    if isinstance(odd, int):
        assert any("total is -9223372036854775808" in note for note in notes)
        return
    assert "data.attrs total is not a whole number and is left out" in notes
    assert "num_samples is not a whole number in 1 of 3 demos (demo_1)" in notes


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_attributes_that_are_not_json_are_left_out_with_a_warning(path, caplog, value):
    with h5py.File(path, "r+") as file:
        file["data"].attrs["env_args"] = json.dumps({"env_name": "Lift", "env_kwargs": {"limit": value}})
    with Dataset.open(path) as dataset:
        assert dataset.env_args is None
    assert "env_args is not JSON and is left out" in caplog.text


def crash(*_: object) -> None:
    signal.raise_signal(signal.SIGSEGV)


def crash_at_demo_1(source, camera, size, segments):
    if any(demo == "demo_1" for demo, _, _ in segments):
        os.abort()
    return np.zeros((sum(stop - start for _, start, stop in segments), *size), np.uint8)


def test_a_structure_that_crashes_hdf5_is_a_damaged_file(path, monkeypatch):
    monkeypatch.setattr("cache_pipeline.demos.layouts.robomimic._scan_file", test_demos_numbers.crash)
    for call in (Dataset.open, inspect_dataset):
        with pytest.raises(
            DatasetError, match=r"is damaged: its structure cannot be read \(HDF5 crashed \(SIGSEGV\)\)"
        ):
            call(path)


def test_frames_that_crash_hdf5_are_named(path, monkeypatch):
    monkeypatch.setattr(dataset_module, "read_frames", test_demos_numbers.crash_at_demo_1)
    with Dataset.open(path) as dataset:
        with pytest.raises(DatasetError, match=f"demo_1: '{CAMERA}' between frames 0 and 5 cannot be read"):
            dataset.gather(CAMERA, [(0, 0, 7), (1, 0, 5), (2, 0, 9)])
        assert dataset.frames(0, CAMERA).shape == (7, 24, 24, 3)


@pytest.mark.parametrize(
    ("module", "name", "part"),
    [
        (stillness, "_still_demos", "the images of agentview_image"),
        (numbers, "_check_numbers", "its actions and low-dim obs"),
    ],
)
def test_contents_that_crash_hdf5_are_a_problem_of_the_file(path, monkeypatch, module, name, part):
    monkeypatch.setattr(module, name, test_demos_numbers.crash)
    problems = inspect_dataset(path).files[0].problems
    assert problems == (f"is damaged: {part} cannot be read (HDF5 crashed (SIGSEGV)); copy or download it again",)


def test_demos_that_repeat_held_out_ones_are_held_out_with_them():
    names = [f"demo_{number}" for number in range(6)]
    split = keep_together(Split((0, 1, 2, 3), (4, 5), "rule"), dict(enumerate("abcbbd")), names)
    assert split.train == (0, 2)
    assert split.valid == (1, 3, 4, 5)
    assert split.warnings == (
        "2 demos repeat the contents of others (demo_1 = demo_4, demo_3 = demo_4); 2 training demos equal to held-out "
        "ones are held out with them",
    )


def test_repeated_demos_on_one_side_are_named_and_stay():
    split = keep_together(Split((0, 1, 2), (3,), "rule"), dict(enumerate("aabc")), ["a", "b", "c", "d"])
    assert (split.train, split.valid) == ((0, 1, 2), (3,))
    assert split.warnings == ("1 demo repeats the contents of others (b = a)",)


def test_where_all_training_demos_repeat_held_out_ones_the_split_stays():
    split = keep_together(Split((0, 1), (2,), "rule"), dict(enumerate("aaa")), ["a", "b", "c"])
    assert (split.train, split.valid) == ((0, 1), (2,))
    assert "says nothing about new demos" in split.warnings[0]
