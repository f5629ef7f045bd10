"""Which demos train and which are held out."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cache_pipeline.errors import DatasetError, available

TRAIN_KEY, VALID_KEY = "train", "valid"
HELD_OUT = 0.1


class Split(NamedTuple):
    """Indices into the demos given, ascending; ``rule`` is a sentence for the log. A single demo has no ``valid``."""

    train: tuple[int, ...]
    valid: tuple[int, ...]
    rule: str


def split_demos(
    demos: Sequence[Hashable],
    masks: Mapping[str, Collection[Hashable]],
    *,
    seed: int = 0,
    filter_key: str | None = None,
    valid_key: str | None = None,
) -> Split:
    """The file's ``train`` and ``valid`` keys where all their demos are here, else a seeded split by demo.

    Works on anything that tells demos apart: ``split_demos(range(len(dataset.demos)), dataset.masks)``, or names with
    masks of names.

    Args:
        demos: the demos that are here.
        masks: filter key → its demos, named as in ``demos``.
        seed: of the seeded split, which holds out a tenth of the demos, at least one.
        filter_key: train on this key's demos; without ``valid_key`` the file's ``valid`` is held out where it shares no
            demo with this key, else a tenth of this key's demos.
        valid_key: hold out this key's demos; without ``filter_key`` all others train.

    Raises:
        DatasetError: a key asked for is not there, is empty, names absent demos, or shares demos with the other.
    """
    assert len(demos) > 0
    place = {demo: i for i, demo in enumerate(demos)}
    whole = {
        key: tuple(sorted(place[demo] for demo in members))
        for key, members in masks.items()
        if len(members) and all(demo in place for demo in members)
    }
    for key in (filter_key, valid_key):
        if key is not None and key not in whole:
            raise DatasetError(_why_not(key, masks, whole, place))
    valid = whole.get(valid_key or VALID_KEY, ())
    if filter_key is None and valid_key is None:
        train = whole.get(TRAIN_KEY, ())
        if not train or not valid or set(train) & set(valid):
            return _seeded(range(len(demos)), seed, _why_seeded(train, valid))
        return _by_keys(train, valid, f"the file's filter keys {TRAIN_KEY!r} and {VALID_KEY!r}")
    if filter_key is None:
        rest = tuple(i for i in range(len(demos)) if i not in set(valid))
        if not rest:
            raise DatasetError(f"filter key {valid_key!r} names every demo, which leaves none to train on")
        return _by_keys(rest, valid, f"filter key {valid_key!r} is held out")
    train = whole[filter_key]
    if valid_key is not None and (shared := set(train) & set(valid)):
        raise DatasetError(
            f"filter keys {filter_key!r} and {valid_key!r} share {len(shared)} demos ({demos[min(shared)]}, …); "
            "the held-out error would mean nothing: name two keys that share none"
        )
    if not valid or set(train) & set(valid):
        return _seeded(train, seed, f"of the demos of filter key {filter_key!r}")
    return _by_keys(train, valid, f"filter keys {filter_key!r} and {valid_key or VALID_KEY!r}")


def _by_keys(train: tuple[int, ...], valid: tuple[int, ...], why: str) -> Split:
    return Split(train, valid, f"{len(train)} demos train and {len(valid)} are held out: {why}")


def _seeded(demos: Sequence[int], seed: int, why: str) -> Split:
    if len(demos) == 1:
        return Split(tuple(demos), (), "1 demo trains and none is held out: a single demo has no held-out split")
    count = max(1, round(HELD_OUT * len(demos)))
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(demos))
    valid = tuple(sorted(demos[i] for i in order[:count]))
    train = tuple(sorted(demos[i] for i in order[count:]))
    return _by_keys(train, valid, f"a seeded split by demo (seed {seed}) {why}")


def _why_seeded(train: tuple[int, ...], valid: tuple[int, ...]) -> str:
    if train and valid:
        return f"because the filter keys {TRAIN_KEY!r} and {VALID_KEY!r} share demos"
    return f"because there are no filter keys {TRAIN_KEY!r} and {VALID_KEY!r} whose demos are all here"


def _why_not(
    key: str,
    masks: Mapping[str, Collection[Hashable]],
    whole: Mapping[str, Collection[int]],
    place: Mapping[Hashable, int],
) -> str:
    if key not in masks:
        return f"there is no filter key {key!r}; {available(whole, key)}"
    absent = [demo for demo in masks[key] if demo not in place]
    reason = f"names {len(absent)} demos that are not here ({absent[0]}, …)" if absent else "names no demos"
    return f"filter key {key!r} {reason}; {available(whole, key)}"
