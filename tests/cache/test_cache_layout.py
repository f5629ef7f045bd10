import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_pipeline.cache.layout import (
    Unit,
    align_up,
    block_segments,
    choose_chunk_rows,
    choose_shard_rows,
    place_demos,
)

lengths = st.lists(st.integers(1, 40), max_size=12)


@given(lengths, lengths, st.integers(1, 17))
def test_every_live_row_lies_in_one_segment_of_its_own_block(first, added, shard_rows):
    old = place_demos(first, [None] * len(first), 0, shard_rows)
    both = [*first, *added]
    new = place_demos(both, [*old.rows, *[None] * len(added)], old.n_rows, shard_rows)
    covered = []
    for block, segments in block_segments(new.rows, both, shard_rows).items():
        for segment in segments:
            assert block * shard_rows <= segment.start < segment.stop <= (block + 1) * shard_rows
            assert segment.start - segment.offset == new.rows[segment.demo]
            covered += range(segment.start, segment.stop)
    assert len(covered) == len(set(covered)) == sum(both)
    assert covered == sorted(covered)
    assert max(covered, default=-1) < new.n_rows or not both


@given(lengths, lengths, st.integers(1, 17))
def test_new_demos_never_share_a_shard_with_old_rows(first, added, shard_rows):
    old = place_demos(first, [None] * len(first), 0, shard_rows)
    new = place_demos([*first, *added], [*old.rows, *[None] * len(added)], old.n_rows, shard_rows)
    assert new.rows[: len(first)] == old.rows
    assert all(row >= align_up(old.n_rows, shard_rows) for row in new.rows[len(first) :])
    assert new.n_rows >= old.n_rows


@given(st.integers(1, 1 << 20))
def test_chunks_divide_shards(row_bytes):
    shard_rows = choose_shard_rows(row_bytes)
    assert shard_rows % choose_chunk_rows(row_bytes, shard_rows) == 0


@given(st.sampled_from(["features", "frames", "rows"]), st.integers(0, 9), st.integers(0, 999))
def test_a_unit_is_known_again_by_its_name(kind, view, block):
    camera = "" if kind == "rows" else "agentview_image"
    unit = Unit(kind, camera, view if kind == "features" else 0, block)
    assert Unit.parse(unit.name) == unit


@pytest.mark.parametrize("name", ["", "features", "features/a/x/1", "rows/1/2", "frames/3", "pixels/a/0"])
def test_other_names_are_no_units(name):
    with pytest.raises(ValueError):
        Unit.parse(name)


def test_no_demos_have_no_blocks():
    assert block_segments((), (), 8) == {}
    assert place_demos((), (), 0, 8) == ((), 0)
