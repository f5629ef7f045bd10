import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cache_pipeline.encoders.frozen import FrozenEncoder
from cache_pipeline.encoders.image_encoder import EncoderSpec, build_encoder
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.extract.encode import BatchEncoder
from cache_pipeline.extract.lanes import MAX_LANES, cpu_lanes
from cache_pipeline.extract.pipeline import _may_wait


@pytest.fixture(scope="module")
def encoder():
    return FrozenEncoder(build_encoder(EncoderSpec(weights="random")), Preprocess(), "cpu", "fp32")


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(0).integers(256, size=(11, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3, 20], indirect=True)
def test_lanes_divide_the_threads_and_other_threads_keep_their_count(threads):
    lanes = cpu_lanes()
    count = min(threads, MAX_LANES)
    together = threading.Barrier(count)

    def seen():
        together.wait()
        return torch.get_num_threads()

    found = [lane.result() for lane in [lanes.submit(seen) for _ in range(count)]]
    assert found == [threads // count] * count
    assert torch.get_num_threads() == threads
    born = []
    later = threading.Thread(target=lambda: born.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert born == [threads]


def test_features_are_the_same_in_lanes_and_out_of_them(encoder, frames, monkeypatch):
    in_lanes = BatchEncoder(4, "float32")(encoder, frames)
    monkeypatch.setattr(FrozenEncoder, "can_run_in_lanes", False)
    np.testing.assert_allclose(BatchEncoder(4, "float32")(encoder, frames), in_lanes, rtol=1e-5, atol=1e-5)


def test_two_encodings_under_way_do_not_mix(encoder, frames):
    batches, told = BatchEncoder(4, "float32"), []
    one, two = batches.start(encoder, frames, None, told.append), batches.start(encoder, frames[::-1].copy())
    assert np.array_equal(two.result()[::-1], one.result())
    assert sum(told) == len(frames)


def test_an_error_in_a_lane_comes_out_and_the_other_batches_are_dropped(encoder, frames, monkeypatch):
    calls = []

    def fail(self, batch, views=None):
        calls.append(len(batch))
        raise ValueError("a broken encoder")

    monkeypatch.setattr(FrozenEncoder, "__call__", fail)
    encoding = BatchEncoder(1, "float32").start(encoder, np.repeat(frames, 100, axis=0))
    with pytest.raises(ValueError, match="a broken encoder"):
        encoding.result()
    stopped = len(calls)
    assert cpu_lanes().submit(lambda: len(calls)).result() == stopped


def test_two_encodings_that_run_out_of_memory_halve_the_batch_once(encoder, frames, monkeypatch):
    real = FrozenEncoder.__call__

    def limited(self, batch, views=None):
        if len(batch) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch, views)

    wanted = BatchEncoder(4, "float32")(encoder, frames)
    monkeypatch.setattr(FrozenEncoder, "__call__", limited)
    batches, told = BatchEncoder(8, "float32"), []
    under_way = [batches.start(encoder, frames, None, told.append) for _ in range(2)]
    for encoding in under_way:
        assert np.array_equal(encoding.result(), wanted)
    assert batches.batch_size == 4
    assert sum(told) == 2 * len(frames)


def test_frames_done_before_memory_ran_out_are_not_counted_twice(encoder, frames, monkeypatch):
    real, many = FrozenEncoder.__call__, np.concatenate([frames, 255 - frames])

    def limited(self, batch, views=None):
        if len(batch) > 4 and not np.array_equal(np.asarray(batch[0]), many[0]):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch, views)

    monkeypatch.setattr(FrozenEncoder, "__call__", limited)
    batches, told = BatchEncoder(8, "float32"), []
    batches.start(encoder, many, None, told.append).result()
    assert batches.batch_size == 4
    assert min(told) == -8
    assert sum(told) == len(many)


def test_a_unit_is_waited_for_when_later_ones_keep_the_lanes_busy():
    none, short, long = (None if n is None else SimpleNamespace(batches=n) for n in (None, 1, MAX_LANES))
    waits = [
        ([none], True),
        ([short], False),
        ([short, none], False),
        ([short, *[short] * (MAX_LANES - 1)], False),
        ([short, *[short] * MAX_LANES], True),
        ([long, short], False),
        ([short, long], True),
    ]
    for started, expected in waits:
        assert _may_wait([(None, None, encoding) for encoding in started]) is expected
