"""Splits demos into a training set and a held-out set."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cache_pipeline.errors import DatasetError, available, counted
from cache_pipeline.text import listed

TRAIN_KEY, VALID_KEY = "train", "valid"
HELD_OUT = 0.1


class Split(NamedTuple):
    """Ascending indices into the given demos. A dataset of one demo has no ``valid``.

    ``rule`` is a sentence for the log. ``warnings`` name demos that a filter key lists but that are left out.
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
    """Splits demos by the file's ``train`` and ``valid`` keys; without these, by a seeded random split.

    Demos of ``valid`` are never trained on, unless ``filter_key`` is ``valid`` or ``valid_key`` names another key.

    Args:
        demos: all demos, as indices or names: ``range(len(dataset.demos))`` with ``dataset.masks``.
        masks: filter key → its demos, as in ``demos``. A demo that is not in ``demos`` causes a warning.
        seed: seed of the random split, which holds out 10 % of the demos, at least one.
        filter_key: train on the demos of this key. Without ``valid_key`` the file's ``valid`` is held out; if there is
            no ``valid``, 10 % of the demos of this key.
        valid_key: hold out the demos of this key. Without ``filter_key`` all other demos are trained on.

    Raises:
        DatasetError: a named key does not exist, has no demo in ``demos``, or shares demos with the other key; or no
            demo is left to train on.
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
    apart = set(held)
    train = tuple(i for i in chosen if i not in apart)
    used = [held_key] if train_key is None else [train_key, held_key]
    warnings = [*_absent(used, masks, place)]
    if train_key is not None and len(train) < len(chosen):
        shared = [demos[i] for i in chosen if i in apart]
        overlap = f"filter keys {train_key!r} and {held_key!r} share {len(shared)} demos ({shared[0]}, …)"
        if filter_key is not None and valid_key is not None:
            raise DatasetError(f"{overlap}; the held-out error would be meaningless: name keys without common demos")
        warnings.append(f"{overlap}: these demos are held out")
    if not train:
        raise DatasetError(
            f"filter key {held_key!r} holds out all demos, so none is left to train on; choose the training demos "
            f"with --filter-key and the held-out demos with --valid-key"
        )
    return _by_keys(train, held, _why(used, filter_key, valid_key))._replace(warnings=tuple(warnings))


def keep_together(split: Split, contents: Mapping[int, Hashable], names: Sequence[str]) -> Split:
    """Moves training demos whose contents equal those of a held-out demo to the held-out side, and warns of them.

    Otherwise the held-out error would be measured on what was trained on. If no demo were left to train on, the split
    stays.

    Args:
        split: the split.
        contents: demo → a value that is equal for equal contents.
        names: the name of each demo, for the warning.
    """
    first: dict[Hashable, int] = {}
    copies: dict[int, int] = {}
    for demo in (*split.valid, *split.train):  # a held-out demo is the original of its copies
        original = first.setdefault(contents[demo], demo)
        if original != demo:
            copies[demo] = original
    if not copies:
        return split
    some = ", ".join(f"{names[copy]} = {names[original]}" for copy, original in list(copies.items())[:5])
    repeat = "demo repeats" if len(copies) == 1 else "demos repeat"
    warning = f"{len(copies)} {repeat} the contents of others ({some}{', …' if len(copies) > 5 else ''})"
    held_out = set(split.valid)
    leaked = {demo: None for demo in split.train if demo in copies and copies[demo] in held_out}
    train = tuple(demo for demo in split.train if demo not in leaked)
    if not leaked:
        return split._replace(warnings=(*split.warnings, warning))
    if not train:
        warning += "; all training demos repeat held-out ones, so the held-out error says nothing about new demos"
        return split._replace(warnings=(*split.warnings, warning))
    warning += f"; {counted(len(leaked), 'training demo')} equal to held-out ones are held out with them"
    return split._replace(
        train=train, valid=tuple(sorted((*split.valid, *leaked))), warnings=(*split.warnings, warning)
    )


def _without_held_out(
    demos: Sequence[Hashable],
    masks: Mapping[str, Collection[Hashable]],
    here: Mapping[str, tuple[int, ...]],
    seed: int,
    filter_key: str | None,
) -> Split:
    """Makes the seeded split of the demos of ``filter_key``, or of all demos."""
    if filter_key is None:
        none_here = f"no demo of filter key {VALID_KEY!r} is in the data"
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
    """Returns the warning for a filter key that names demos that are not in the data."""
    return (
        f"filter key {key!r} names {len(absent)} demos that are not in the data ({listed(absent, limit=5)}); "
        f"the other {named - len(absent)} of {named} are used"
    )


def _by_keys(train: tuple[int, ...], valid: tuple[int, ...], why: str) -> Split:
    return Split(train, valid, f"{counted(len(train), 'demo')} to train on, {len(valid)} held out: {why}")


def _seeded(demos: Sequence[int], seed: int, why: str) -> Split:
    if len(demos) == 1:
        return Split(tuple(demos), (), "1 demo to train on, 0 held out: one demo cannot be split")
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
    reason = f"names {len(named)} demos, and none of them is in the data ({named[0]}, …)" if named else "names no demos"
    return f"filter key {key!r} {reason}; {available(usable, key)}"
