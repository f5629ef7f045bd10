"""Long tests of the cache: `uv run pytest -m stress tests/stress`."""

import json
import os
import random
import shutil
import subprocess
import time

import h5py
import numpy as np
import pytest
from cache_fakes import CAMERA, change_pixel, equal, extract, outputs
from fakes import make_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from killed import start

from cache_pipeline.cache.compact import compact
from cache_pipeline.cache.integrity import check_integrity
from cache_pipeline.cache.manifest_store import MANIFEST
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.cache.summary import inspect_cache
from cache_pipeline.errors import CacheError, CachePipelineError

pytestmark = [pytest.mark.stress, pytest.mark.timeout(7200)]

KILLS = int(os.environ.get("STRESS_KILLS", "200"))
EXAMPLES = int(os.environ.get("STRESS_EXAMPLES", "60"))
PAIRS = int(os.environ.get("STRESS_PAIRS", "20"))
FLIPS = int(os.environ.get("STRESS_FLIPS", "8"))
MUTATIONS = int(os.environ.get("STRESS_MUTATIONS", "3000"))


def test_many_kills_at_random_moments_never_change_a_digest(tmp_path):
    dataset = make_dataset(tmp_path / "demos.hdf5", lengths=(17, 30, 9, 21))
    whole, out = tmp_path / "whole.zarr", tmp_path / "killed.zarr"
    extract(whole, dataset, views=2)
    rng, finished, advanced = random.Random(0), 0, 0
    seconds = seconds_of_a_run(dataset, tmp_path / "timed.zarr")
    for _ in range(KILLS):
        units = len(list(out.glob("ledger/**/*.json")))
        process = start(out, dataset, seconds=0.002)
        process.join(rng.uniform(0, 1.2 * seconds))
        process.kill()
        process.join()
        advanced += len(list(out.glob("ledger/**/*.json"))) > units
        if (out / MANIFEST).exists():
            finished += 1
            assert outputs(out) == outputs(whole)
            shutil.rmtree(out)
    extract(out, dataset, views=2)
    assert outputs(out) == outputs(whole)
    assert check_integrity(out).ok
    print(f"{KILLS} kills, {advanced} of them after units were written, {finished} after the end")
    assert advanced > 0


def seconds_of_a_run(dataset, out):
    """From starting a process to its end, once the fork server is up."""
    for _ in range(2):
        started = time.perf_counter()
        process = start(out, dataset, seconds=0.002)
        process.join()
        assert process.exitcode == 0
        seconds = time.perf_counter() - started
        shutil.rmtree(out)
    return seconds


def test_two_extractions_started_at_once_never_spoil_a_cache(tmp_path):
    dataset = make_dataset(tmp_path / "demos.hdf5", lengths=(17, 30, 9, 21))
    whole, refused = tmp_path / "whole.zarr", 0
    extract(whole, dataset, views=2)
    for number in range(PAIRS):
        out = tmp_path / f"{number}.zarr"
        pair = [start(out, dataset, seconds=0.002) for _ in range(2)]
        for process in pair:
            process.join()
        refused += sum(process.exitcode != 0 for process in pair)
        assert any(process.exitcode == 0 for process in pair)
        assert outputs(out) == outputs(whole)
        assert check_integrity(out).ok
        shutil.rmtree(out)
    print(f"{PAIRS} pairs, {refused} times one of them was refused")


def test_a_byte_flipped_anywhere_in_any_file_is_found(tmp_path):
    dataset = make_dataset(tmp_path / "demos.hdf5", lengths=(7, 12))
    path, rng, flips = tmp_path / "cache.zarr", random.Random(2), 0
    extract(path, dataset, views=2)
    ledger = {file: file.read_bytes() for file in (path / "ledger").rglob("*.json")}
    files = [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        content = file.read_bytes()
        places = {0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(FLIPS))}
        for at in places:
            file.write_bytes(content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :])
            if file.suffix != ".json" or parsed(file.read_bytes()) != parsed(content) or file.name == "zarr.json":
                assert not check_integrity(path).ok, (file, at)
                flips += 1
            file.write_bytes(content)
            for record in ledger:  # the check strikes the damaged unit's
                if not record.exists():
                    record.write_bytes(ledger[record])
    print(f"{flips} flipped bytes in {len(files)} files")


@pytest.mark.parametrize("name", [MANIFEST, "ledger"])
def test_a_fuzzed_manifest_or_ledger_gives_only_our_errors(tmp_path, name):
    dataset = make_dataset(tmp_path / "demos.hdf5", lengths=(7, 12))
    path = tmp_path / "cache.zarr"
    extract(path, dataset)
    good = outputs(path)
    files = [path / MANIFEST] if name == MANIFEST else sorted((path / "ledger").rglob("*.json"))
    contents = {file: file.read_bytes() for file in files}
    rng = random.Random(1)
    for _ in range(MUTATIONS):
        file = rng.choice(files)
        file.write_bytes(mutated(contents[file], rng))
        inspect_cache(path)
        changed = parsed(file.read_bytes()) != parsed(contents[file])
        try:
            FeatureCache(path).features(CAMERA)
        except CachePipelineError:
            assert name == MANIFEST
        assert check_integrity(path).ok is not changed
        file.write_bytes(contents[file])
    for file in files[:1]:
        file.write_bytes(mutated(contents[file], rng))
    extract(path, dataset)
    assert outputs(path) == good


def parsed(content: bytes) -> str | None:
    """Canonical text of a JSON value: whitespace and key order aside, ``true`` is not 1."""
    try:
        return json.dumps(json.loads(content), sort_keys=True)
    except ValueError:
        return None


def mutated(content: bytes, rng: random.Random) -> bytes:
    """One byte flipped, removed or added, a piece cut or doubled, or a JSON value replaced."""
    at, to = sorted(rng.randrange(len(content)) for _ in range(2))
    kind = rng.randrange(6)
    if kind == 0:
        return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    if kind == 1:
        return content[:at] + content[to:]
    if kind == 2:
        return content[:to] + content[at:]
    if kind == 3:
        return content[:at] + rng.randbytes(rng.randrange(1, 9)) + content[at:]
    if kind == 4:
        return content[:at]
    value = json.loads(content)
    value[rng.choice(list(value))] = rng.choice([None, -1, "", [], {}, 1e300, "x" * 99, [[]], True])
    return json.dumps(value).encode()


def test_a_full_disk_is_told_and_a_rerun_goes_on(tmp_path):
    dataset = make_dataset(tmp_path / "demos.hdf5", lengths=(40, 60, 80))
    whole, disk = tmp_path / "whole.zarr", tmp_path / "disk"
    extract(whole, dataset, views=4)
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        with pytest.raises(CacheError, match=r"no space left for .*; it needs .* MB in total"):
            extract(disk / "cache.zarr", dataset, views=4)
        assert not (disk / "cache.zarr" / MANIFEST).exists()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        result = extract(disk / "cache.zarr", dataset, views=4)
        assert result.units_reused > 0
        assert outputs(disk / "cache.zarr") == outputs(whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


edits = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 40)),
        st.tuples(st.just("change"), st.integers(0, 99)),
        st.tuples(st.just("remove"), st.integers(0, 99)),
        st.tuples(st.just("views"), st.integers(1, 3)),
        st.tuples(st.just("compact"), st.just(0)),
    ),
    max_size=8,
)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4), shard_rows=st.integers(4, 33), edits=edits)
def test_any_sequence_of_edits_gives_the_cache_that_would_be_made_at_once(tmp_path_factory, lengths, shard_rows, edits):
    folder = tmp_path_factory.mktemp("model")
    demos = {f"demo_{number}": length for number, length in enumerate(lengths)}
    changed: list[tuple[str, int]] = []
    dataset, path, views = folder / "d.hdf5", folder / "c.zarr", 1
    write(dataset, demos, changed)
    extract(path, dataset, shard_rows=shard_rows)
    for what, number in edits:
        names = list(demos)
        if what == "add":
            demos[f"demo_{int(names[-1][5:]) + 1}"] = number
        elif what == "change":
            name = names[number % len(names)]
            changed.append((name, number % demos[name]))
        elif what == "remove" and len(names) > 1:
            name = names[number % len(names)]
            del demos[name]
            changed = [pair for pair in changed if pair[0] != name]
        elif what == "views":
            views = max(views, number)
        elif what == "compact":
            compact(path)
        write(dataset, demos, changed)
        extract(path, dataset, shard_rows=shard_rows, views=views)
    whole = folder / "whole.zarr"
    extract(whole, dataset, shard_rows=shard_rows, views=views)
    cache, model = FeatureCache(path), FeatureCache(whole)
    assert cache.fingerprint == model.fingerprint
    for view in range(views):
        assert equal(cache.features(CAMERA, view=view), model.features(CAMERA, view=view))
    assert equal(cache.array("actions"), model.array("actions"))
    assert check_integrity(path).ok
    shutil.rmtree(folder)


def write(dataset, demos, changed):
    make_dataset(dataset, names=list(demos), lengths=list(demos.values()), masks={})
    for name, frame in changed:
        change_pixel(dataset, name, CAMERA, frame)
    with h5py.File(dataset) as file:
        assert np.all([name in file["data"] for name in demos])
