"""Which demos train and which are held out."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cache_pipeline.errors import DatasetError, available

TRAIN_KEY, VALID_KEY = "train", "valid"
HELD_OUT = 0.1


class Split(NamedTuple):
    """Indices into the demos given, ascending; ``rule`` is a sentence for the log. A single demo has no ``valid``.

    ``warnings`` say which demos were left out although a filter key names them.
    """

    train: tuple[int, ...]
    valid: tuple[int, ...]
    rule: str
    warnings: tuple[str, ...] = ()


def split_demos(
    demos: Sequence[Hashable],
    masks: Mapping[str, Collection[Hashable]],
    *,
    seed: int = 0,
    filter_key: str | None = None,
    valid_key: str | None = None,
) -> Split:
    """The file's ``train`` and ``valid`` keys as far as their demos are here, else a seeded split by demo.

    Demos of ``valid`` never train, unless it is the ``filter_key`` or another ``valid_key`` is named in its place.

    Works on anything that tells demos apart: ``split_demos(range(len(dataset.demos)), dataset.masks)``, or names with
    masks of names.

    Args:
        demos: the demos that are here.
        masks: filter key → its demos, named as in ``demos``; those that are not here are warned of.
        seed: of the seeded split, which holds out a tenth of the demos, at least one.
        filter_key: train on this key's demos; without ``valid_key`` the file's ``valid`` is held out, or a tenth of
            this key's demos if there is none.
        valid_key: hold out this key's demos; without ``filter_key`` all others train.

    Raises:
        DatasetError: a key asked for is not there, has no demo here, or shares demos with the other; or none is left to
            train on.
    """
    assert len(demos) > 0
    place = {demo: i for i, demo in enumerate(demos)}
    here = {key: tuple(sorted(place[d] for d in members if d in place)) for key, members in masks.items()}
    for key in (filter_key, valid_key):
        if key is not None and not here.get(key):
            raise DatasetError(_why_not(key, masks, here))
    held_key = valid_key or VALID_KEY
    asked_to_train = filter_key == held_key and valid_key is None
    held = () if asked_to_train else here.get(held_key, ())
    if not held:
        return _without_held_out(demos, masks, here, seed, filter_key)
    train_key = filter_key or (TRAIN_KEY if valid_key is None and here.get(TRAIN_KEY) else None)
    chosen = range(len(demos)) if train_key is None else here[train_key]
    train = tuple(i for i in chosen if i not in set(held))
    used = [held_key] if train_key is None else [train_key, held_key]
    warnings = [*_absent(used, masks, place)]
    if train_key is not None and len(train) < len(chosen):
        shared = [demos[i] for i in chosen if i in set(held)]
        told = f"filter keys {train_key!r} and {held_key!r} share {len(shared)} demos ({shared[0]}, …)"
        if filter_key is not None and valid_key is not None:
            raise DatasetError(f"{told}; the held-out error would mean nothing: name two keys that share none")
        warnings.append(f"{told}: they are held out")
    if not train:
        raise DatasetError(
            f"filter key {held_key!r} holds out all demos, which leaves none to train on; name what to train on with "
            f"--filter-key, and what to hold out with --valid-key"
        )
    return _by_keys(train, held, _why(used, filter_key, valid_key))._replace(warnings=tuple(warnings))


def _without_held_out(
    demos: Sequence[Hashable],
    masks: Mapping[str, Collection[Hashable]],
    here: Mapping[str, tuple[int, ...]],
    seed: int,
    filter_key: str | None,
) -> Split:
    """The seeded split, of the demos of the key asked for or of all."""
    if filter_key is None:
        none_here = f"no demo of filter key {VALID_KEY!r} is here"
        why = none_here if masks.get(VALID_KEY) else f"there is no filter key {VALID_KEY!r}"
        return _seeded(range(len(demos)), seed, f"because {why}")
    split = _seeded(here[filter_key], seed, f"of the demos of filter key {filter_key!r}")
    return split._replace(warnings=tuple(_absent([filter_key], masks, set(demos))))


def _why(used: Sequence[str], filter_key: str | None, valid_key: str | None) -> str:
    if len(used) == 1:
        return f"filter key {used[0]!r} is held out"
    whose = "the file's " if filter_key is None and valid_key is None else ""
    return f"{whose}filter keys {used[0]!r} and {used[1]!r}"


def _absent(
    keys: Sequence[str], masks: Mapping[str, Collection[Hashable]], here: Collection[Hashable]
) -> Iterator[str]:
    for key in keys:
        absent = [str(demo) for demo in masks[key] if demo not in here]
        if absent:
            yield absent_demos(key, absent, len(masks[key]))


def absent_demos(key: str, absent: Sequence[str], named: int) -> str:
    """The warning for a filter key some of whose demos are not here."""
    some = ", ".join(absent[:5]) + (", …" if len(absent) > 5 else "")
    return (
        f"filter key {key!r} names {len(absent)} demos that are not here ({some}); "
        f"the other {named - len(absent)} of {named} are taken"
    )


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


def _why_not(key: str, masks: Mapping[str, Collection[Hashable]], here: Mapping[str, Collection[int]]) -> str:
    usable = [name for name, members in here.items() if members]
    if key not in masks:
        return f"there is no filter key {key!r}; {available(usable, key)}"
    named = [str(demo) for demo in masks[key]]
    reason = f"names {len(named)} demos, none of which is here ({named[0]}, …)" if named else "names no demos"
    return f"filter key {key!r} {reason}; {available(usable, key)}"
