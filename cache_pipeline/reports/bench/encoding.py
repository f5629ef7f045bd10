"""Benchmarks of the encoder alone, a whole extraction, and loading a cache."""

from __future__ import annotations

import io
import math
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.encoders.frozen import FrozenEncoder, preferred_batch_size
from cache_pipeline.encoders.image_encoder import EncoderSpec, build_encoder
from cache_pipeline.encoders.precision import error_over_variation, resolve_precision
from cache_pipeline.encoders.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from cache_pipeline.extract.config import ExtractConfig
from cache_pipeline.extract.encode import BatchEncoder
from cache_pipeline.extract.pipeline import extract_features
from cache_pipeline.memory import retained_memory
from cache_pipeline.reports.bench.case import BenchRow, BenchSetup
from cache_pipeline.reports.bench.measure import Prepare, Work, side_by_side

EAGER_BATCH = 64
LARGE_CACHE_BYTES = 500_000_000
MOST_VIEWS = 32
"""A small dataset makes a smaller cache; extraction of more views of its few frames would take long."""
EAGER_NAME = f"torchvision, eager, fp32, no_grad, batches of {EAGER_BATCH}"
# Every precision is measured, also if features of random weights exceed the default bound.
BOUND = 1.0
NUMPY_NAME = "numpy.load of the same float16 features, from the page cache"


def encode(setup: BenchSetup) -> list[BenchRow]:
    """Measures the encoder alone on frames in memory, in the fastest precision and fp32; peer: an eager loop."""
    precisions = _precisions(setup)
    alone: dict[str, Prepare] = {name: partial(_encoder_alone, setup, name) for name in precisions}
    rates = side_by_side({"peer": partial(_eager_loop, setup), **alone}, setup.seconds)
    rows = []
    for name in precisions:
        case = f"encode {setup.rgb_model_name} {name} (error {_error(setup, name):.1e} of variation), images/s"
        rows.append(BenchRow(case=case, ours=rates[name], peer=rates["peer"], peer_name=EAGER_NAME))
    return rows


def extract(setup: BenchSetup) -> list[BenchRow]:
    """Measures an extraction from HDF5 to a finished cache; peer: an eager loop; limit: the encoder alone."""
    work: dict[str, Prepare] = {"peer": partial(_eager_loop, setup)}
    precisions = _precisions(setup)
    for precision in precisions:
        work[f"limit {precision}"] = partial(_encoder_alone, setup, precision)
        work[precision] = partial(_extractions, setup, precision)
    rates = side_by_side(work, setup.seconds)
    return [
        BenchRow(
            case=f"extract {setup.rgb_model_name} {precision}, HDF5 to cache, images/s",
            ours=rates[precision],
            peer=rates["peer"],
            peer_name=EAGER_NAME,
            limit=rates[f"limit {precision}"],
        )
        for precision in precisions
    ]


def load(setup: BenchSetup) -> list[BenchRow]:
    """Measures loading a cache, avgpool features and up to 500 MB of layer3 maps; peer: ``numpy.load``."""
    small, large = setup.folder / "small.zarr", setup.folder / "large.zarr"
    _extraction(setup, small)
    one_view = _extraction_bytes(setup, large)
    _extraction(setup, large, cut="layer3", views=min(math.ceil(LARGE_CACHE_BYTES / one_view), MOST_VIEWS))
    rows = []
    for name, path in (("avgpool", small), ("layer3, several views", large)):
        megabytes = FeatureCache(path).nbytes() / 1e6
        work = {"ours": partial(_load_cache, path), "peer": partial(_load_numpy, path)}
        rates = side_by_side(work, setup.seconds)
        case = f"load {name}, {megabytes:.0f} MB in {megabytes / rates['ours']:.3f} s, MB/s"
        rows.append(BenchRow(case=case, ours=rates["ours"], peer=rates["peer"], peer_name=NUMPY_NAME))
    return rows


def _frames(setup: BenchSetup) -> NDArray[np.uint8]:
    dataset = Dataset.open((setup.dataset,))
    camera = next(iter(dataset.cameras))
    parts, total = [], 0
    for demo in range(len(dataset.demos)):
        parts.append(dataset.frames(demo, camera))
        total += len(parts[-1])
        if total >= setup.frames:
            break
    frames = np.concatenate(parts)
    return np.ascontiguousarray(np.resize(frames, (setup.frames, *frames.shape[1:])))


def _precisions(setup: BenchSetup) -> tuple[str, ...]:
    """Returns the fastest precision of the device, then fp32."""
    return tuple(dict.fromkeys((resolve_precision("auto", torch.device(setup.device)), "fp32")))


def _error(setup: BenchSetup, precision: str) -> float:
    """Returns ``error_over_variation`` of features stored as float16."""
    frames = _frames(setup)[:: max(1, setup.frames // EAGER_BATCH)]
    exact, encode = _frozen(setup, "fp32"), BatchEncoder(EAGER_BATCH, "float32")
    wanted, found = (torch.from_numpy(encode(frozen, frames)) for frozen in (exact, exact.in_precision(precision)))
    return error_over_variation(found.half(), wanted)


def _frozen(setup: BenchSetup, precision: str) -> FrozenEncoder:
    encoder = build_encoder(EncoderSpec(rgb_model_name=setup.rgb_model_name, weights="random"))
    return FrozenEncoder(encoder, Preprocess(), torch.device(setup.device), precision)


def _encoder_alone(setup: BenchSetup, precision: str) -> Work:
    frames, frozen = _frames(setup), _frozen(setup, precision)
    batches = BatchEncoder(preferred_batch_size(frozen.device, frames.shape[1] * frames.shape[2]), "float16")
    with retained_memory():
        while True:
            yield len(batches(frozen, frames))


def _eager_loop(setup: BenchSetup) -> Work:
    import torchvision

    model = getattr(torchvision.models, setup.rgb_model_name)(weights=None)
    model.fc = nn.Identity()
    model = model.eval().to(setup.device)
    mean = torch.tensor(IMAGENET_MEAN, device=setup.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=setup.device).view(1, 3, 1, 1)
    resident = torch.from_numpy(_frames(setup)).to(setup.device)
    while True:
        with torch.no_grad():
            for batch in torch.split(resident, EAGER_BATCH):
                features = model((batch.permute(0, 3, 1, 2).float() / 255 - mean) / std)
            features.cpu()
        yield len(resident)


def _extractions(setup: BenchSetup, precision: str) -> Work:
    for number in count():
        yield _extraction(setup, setup.folder / f"extract_{precision}_{number}.zarr", precision=precision)


def _extraction(setup: BenchSetup, out: Path, **options: Any) -> int:
    cut = options.pop("cut", "avgpool")
    spec = EncoderSpec(rgb_model_name=setup.rgb_model_name, weights="random", cut=cut)
    options = {"precision_bound": BOUND, **options}
    config = ExtractConfig(datasets=(setup.dataset,), out=out, encoders=spec, device=setup.device, **options)
    return extract_features(config, progress=False).images


def _extraction_bytes(setup: BenchSetup, out: Path) -> int:
    """Extracts one view of layer3 features of both cameras to ``out`` and returns its size in bytes."""
    _extraction(setup, out, cut="layer3")
    return FeatureCache(out).nbytes()


def _load_cache(path: Path) -> Work:
    while True:
        cache = FeatureCache(path)
        yield sum(cache.views(camera).nbytes for camera in cache.cameras) / 1e6


def _load_numpy(path: Path) -> Work:
    cache = FeatureCache(path)
    files = [path.parent / f"{path.stem}_{camera}.npy" for camera in cache.cameras]
    for camera, file in zip(cache.cameras, files, strict=True):
        values = io.BytesIO()
        np.save(values, cache.views(camera))
        file.write_bytes(values.getbuffer())
    while True:
        yield sum(np.load(file).nbytes for file in files) / 1e6
