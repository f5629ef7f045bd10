"""The split into training and held-out demos, and the rule in the log."""

import pytest
from fakes import make_dataset
from hypothesis import given
from hypothesis import strategies as st

from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.demos.split import split_demos
from cache_pipeline.errors import DatasetError

NAMES = [f"demo_{i}" for i in range(10)]


def test_the_train_and_valid_keys_of_the_file_are_used():
    split = split_demos(NAMES, {"train": NAMES[:8], "valid": NAMES[8:]})
    assert split.train == tuple(range(8))
    assert split.valid == (8, 9)
    assert split.rule == "8 demos to train on, 2 held out: the file's filter keys 'train' and 'valid'"


@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"train": NAMES},
        {"train": NAMES[:8], "valid": ["demo_99"]},
        {"train": NAMES[:8], "valid": []},
    ],
)
def test_without_a_valid_key_a_tenth_is_held_out_by_seed_and_the_reason_is_given(masks):
    split = split_demos(NAMES, masks, seed=3)
    assert len(split.valid) == 1
    assert "a seeded split by demo (seed 3) because" in split.rule
    assert split == split_demos(NAMES, masks, seed=3)


@pytest.mark.parametrize(
    ("masks", "train", "words"),
    [
        ({"train": [*NAMES[:8], "demo_99"], "valid": NAMES[8:]}, (0, 1, 2, 3, 4, 5, 6, 7), "'train' names 1 demos"),
        ({"train": NAMES[:8], "valid": [*NAMES[8:], "demo_99"]}, (0, 1, 2, 3, 4, 5, 6, 7), "(demo_99); the other 2 of"),
        ({"train": ["demo_98"], "valid": NAMES[8:]}, (0, 1, 2, 3, 4, 5, 6, 7), None),
        ({"valid": NAMES[8:]}, (0, 1, 2, 3, 4, 5, 6, 7), None),
        (
            {"train": NAMES, "valid": NAMES[8:]},
            (0, 1, 2, 3, 4, 5, 6, 7),
            "share 2 demos (demo_8, …): these demos are held out",
        ),
        ({"train": NAMES[7:], "valid": NAMES[8:]}, (7,), "share 2 demos (demo_8, …): these demos are held out"),
    ],
)
def test_demos_of_valid_are_never_trained_on_and_a_warning_names_them(masks, train, words):
    split = split_demos(NAMES, masks)
    assert (split.train, split.valid) == (train, (8, 9))
    assert any(words in warning for warning in split.warnings) if words else not split.warnings


def test_demos_of_valid_are_trained_on_if_valid_is_the_filter_key():
    masks = {"train": NAMES[:8], "valid": NAMES[8:]}
    split = split_demos(NAMES, masks, filter_key="valid")
    assert sorted(split.train + split.valid) == [8, 9]


def test_a_valid_that_holds_out_every_demo_is_refused():
    with pytest.raises(DatasetError, match="so none is left to train on; choose the training demos"):
        split_demos(NAMES, {"valid": NAMES})


def test_a_demo_held_out_by_one_of_several_files_is_never_trained_on(tmp_path):
    first = make_dataset(tmp_path / "a.hdf5", lengths=(4, 3, 5))
    second = make_dataset(tmp_path / "b.hdf5", lengths=(6, 4), seed=1, masks={})
    dataset = Dataset.open([first, second])
    split = split_demos(range(len(dataset.demos)), dataset.masks)
    assert (split.train, split.valid) == ((0, 1, 3, 4), (2,))


def test_seeds_hold_out_different_demos():
    assert len({split_demos(NAMES, {}, seed=seed).valid for seed in range(20)}) > 4


@given(count=st.integers(2, 200), seed=st.integers(0, 2**40))
def test_a_seeded_split_covers_every_demo_once_and_holds_out_about_a_tenth(count, seed):
    split = split_demos(range(count), {}, seed=seed)
    assert sorted(split.train + split.valid) == list(range(count))
    assert len(split.valid) == max(1, round(count / 10))
    assert split.train


def test_one_demo_is_not_split_and_the_rule_says_so():
    split = split_demos(["demo_0"], {})
    assert split.train == (0,)
    assert split.valid == ()
    assert "one demo cannot be split" in split.rule


def test_a_datasets_own_demos_and_masks_can_be_split(tmp_path):
    dataset = Dataset.open(make_dataset(tmp_path / "lift.hdf5"))
    split = split_demos(range(len(dataset.demos)), dataset.masks)
    assert (split.train, split.valid) == ((0, 1), (2,))


def test_named_filter_and_valid_keys_are_used():
    masks = {"train": NAMES[:8], "valid": NAMES[8:], "some": NAMES[:3], "other": NAMES[5:7]}
    assert split_demos(NAMES, masks, filter_key="some", valid_key="other")[:2] == ((0, 1, 2), (5, 6))
    assert split_demos(NAMES, masks, filter_key="some")[:2] == ((0, 1, 2), (8, 9))
    assert split_demos(NAMES, masks, valid_key="other")[:2] == ((0, 1, 2, 3, 4, 7, 8, 9), (5, 6))


def test_demos_of_the_filter_key_that_are_also_in_valid_are_held_out():
    split = split_demos(NAMES, {"some": NAMES[:3], "valid": NAMES[2:]}, filter_key="some")
    assert (split.train, split.valid) == ((0, 1), (2, 3, 4, 5, 6, 7, 8, 9))
    assert "'some' and 'valid' share 1 demos (demo_2, …): these demos are held out" in split.warnings[0]


def test_the_filter_key_is_split_by_seed_if_there_is_no_valid_key():
    split = split_demos(NAMES, {"some": [*NAMES[:3], "demo_44"]}, filter_key="some")
    assert sorted(split.train + split.valid) == [0, 1, 2]
    assert len(split.valid) == 1
    assert "'some' names 1 demos that are not in the data (demo_44)" in split.warnings[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filter_key": "trian"}, "no filter key 'trian'; available: train, all .did you mean train"),
        (
            {"valid_key": "gone"},
            "'gone' names 2 demos, and none of them is in the data .demo_77, ….; available: train, all",
        ),
        ({"filter_key": "empty"}, "'empty' names no demos"),
        ({"filter_key": "train", "valid_key": "all"}, "share 8 demos .demo_0"),
        ({"valid_key": "all"}, "holds out all demos, so none is left to train on"),
    ],
)
def test_unusable_keys_are_refused_with_a_list_of_usable_keys(options, message):
    masks = {"train": NAMES[:8], "all": NAMES, "gone": ["demo_77", "demo_78"], "empty": []}
    with pytest.raises(DatasetError, match=message):
        split_demos(NAMES, masks, **options)
