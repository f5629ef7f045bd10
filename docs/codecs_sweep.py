"""Measures size and speed of codecs, chunks and shards on real features: `uv run docs/codecs_sweep.py DATASET`.

Prints the tables of docs/codecs.md. Features are encoded in memory. Each variant is a zarr v3 array in a temporary
folder, written and read like a cache: whole shards, synced, a CRC-32C per chunk. Reads come from the page cache; times
are medians.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.codecs.numcodecs import BitRound, PCodec

from cache_pipeline.cache.arrays import StoredArray
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.encoders.frozen import FrozenEncoder
from cache_pipeline.encoders.image_encoder import EncoderSpec, build_encoder, make_preprocess
from cache_pipeline.extract.encode import BatchEncoder

ROUNDS = 5
GATHERED = 512
CHUNK_KB, SHARD_ROWS = 64, 1024
BLOSC_LEVELS, KEEP_BITS = (("lz4", 5), ("zstd", 3)), 7
THROUGH_ZARR = "none, read by zarr"
HEAD = "size, fraction of float16 | write, MB/s | load, MB/s | gather of 512 rows, ms |"


def codecs() -> dict[str, dict[str, Any]]:
    """Returns codec name → arguments of ``zarr.create_array``."""
    blosc = {cname: BloscCodec(cname=cname, clevel=level, shuffle="bitshuffle") for cname, level in BLOSC_LEVELS}
    rounded = {"filters": [BitRound(keepbits=KEEP_BITS)]}
    return {
        "none": {},
        THROUGH_ZARR: {},
        "blosc lz4, bitshuffle": {"compressors": [blosc["lz4"]]},
        "blosc zstd, bitshuffle": {"compressors": [blosc["zstd"]]},
        "zstd": {"compressors": [ZstdCodec(level=3)]},
        "pcodec": {"serializer": PCodec(level=8)},
        f"bitround {KEEP_BITS}, zstd": {**rounded, "compressors": [ZstdCodec(level=3)]},
        f"bitround {KEEP_BITS}, blosc zstd, bitshuffle": {**rounded, "compressors": [blosc["zstd"]]},
    }


class Figures(NamedTuple):
    """Cost of one variant; ``size`` is a fraction of the raw bytes, ``error`` a fraction of the largest value."""

    size: float
    write_mb_s: float
    load_mb_s: float
    gather_ms: float
    error: float


def main() -> None:
    """Encodes the features and prints the tables of each cut."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--rgb-model-name", default="resnet18")
    parser.add_argument("--weights", default="random", help="random, imagenet or a file")
    parser.add_argument("--cuts", default="avgpool,layer3")
    parser.add_argument("--frames", type=int, default=2000)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)  # numcodecs: not yet in the zarr v3 specification
    for cut in options.cuts.split(","):
        spec = EncoderSpec(rgb_model_name=options.rgb_model_name, weights=options.weights, cut=cut)
        features = encode(options.dataset, spec, options.frames)
        shape = "×".join(map(str, features.shape))
        what = f"{spec.rgb_model_name}, {spec.source}, at {cut}"
        print(f"\n**{what}**: {shape} float16, {features.nbytes / 1e6:.1f} MB\n")
        sweep_codecs(features)
        sweep_layout(features)


def encode(path: Path, spec: EncoderSpec, frames: int) -> NDArray[np.float16]:
    """Encodes the first frames of the first camera to (N, …) features."""
    dataset, encoder = Dataset.open([path]), build_encoder(spec)
    camera, segments, left = next(iter(dataset.cameras)), [], frames
    for number, demo in enumerate(dataset.demos):
        segments.append((number, 0, min(left, demo.length)))
        left -= segments[-1][2]
    images = dataset.gather(camera, [segment for segment in segments if segment[2]])
    frozen = FrozenEncoder(encoder, make_preprocess(encoder), precision="fp32")
    return BatchEncoder(32, "float16")(frozen, images)


def sweep_codecs(features: NDArray[np.float16]) -> None:
    """Prints one line per codec, with chunks of ``CHUNK_KB`` and shards of ``SHARD_ROWS``."""
    print(f"| codec | {HEAD} largest error, fraction of largest value |\n|---|---|---|---|---|---|")
    for name, codec in codecs().items():
        f = measure(features, codec, CHUNK_KB, SHARD_ROWS, through_zarr=name == THROUGH_ZARR)
        error = f"{f.error:.1e}" if f.error else "0"
        print(f"| {name} | {f.size:.3f} | {f.write_mb_s:.0f} | {f.load_mb_s:.0f} | {f.gather_ms:.1f} | {error} |")


def sweep_layout(features: NDArray[np.float16]) -> None:
    """Prints one line per chunk size, then per shard size, without a codec."""
    print(f"\n| chunk, kB | shard, rows | {HEAD}\n|---|---|---|---|---|---|")
    sizes = [(kb, SHARD_ROWS) for kb in (16, 64, 256, 1024)] + [(CHUNK_KB, rows) for rows in (256, 4096)]
    for kb, rows in sizes:
        f = measure(features, {}, kb, rows)
        print(f"| {kb} | {rows} | {f.size:.3f} | {f.write_mb_s:.0f} | {f.load_mb_s:.0f} | {f.gather_ms:.1f} |")


def measure(
    features: NDArray[np.float16],
    codec: dict[str, Any],
    chunk_kb: int,
    shard_rows: int,
    *,
    through_zarr: bool = False,
) -> Figures:
    """Measures writing, loading and gathering of one variant."""
    n, megabytes = len(features), features.nbytes / 1e6
    rows = np.random.default_rng(0).permutation(n)[:GATHERED]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        create(path, features, codec, chunk_kb, shard_rows)
        array = StoredArray(path, "features", read_only=False)
        if through_zarr:
            array._layout = None
        write_s = median(times(lambda: write(array, features), 3))
        stored = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        loaded = array.spans([(0, n)])
        error = np.abs(loaded.astype(np.float32) - features).max() / np.abs(features).max()
        load_s = median(times(lambda: array.spans([(0, n)]), ROUNDS))
        gather_s = median(times(lambda: array.gather(rows, n), ROUNDS))
    size = stored / features.nbytes
    return Figures(size, megabytes / write_s, megabytes / load_s, 1e3 * gather_s, float(error))


def create(path: Path, features: NDArray[np.float16], codec: dict[str, Any], chunk_kb: int, shard_rows: int) -> None:
    """Creates an array of whole shards; a chunk has at most ``chunk_kb``, but at least one row."""
    row_bytes, shape = features[0].nbytes, features.shape[1:]
    chunk_rows = shard_rows
    while chunk_rows > 1 and chunk_rows * row_bytes > chunk_kb * 1024:
        chunk_rows //= 2
    compressors = [*codec.get("compressors", []), Crc32cCodec()]
    zarr.create_array(
        path / "features",
        shape=(-(-len(features) // shard_rows) * shard_rows, *shape),
        shards=(shard_rows, *shape),
        chunks=(chunk_rows, *shape),
        dtype=features.dtype,
        fill_value=float("nan"),
        dimension_names=["row", *("feature", "h", "w")[: len(shape)]],
        **{**codec, "compressors": compressors},
    )


def write(array: StoredArray, features: NDArray[np.float16]) -> None:
    """Writes features shard by shard; the last shard is padded with NaN."""
    for block, start in enumerate(range(0, len(features), array.shard_rows)):
        values = np.full((array.shard_rows, *array.row_shape), np.nan, features.dtype)
        part = features[start : start + array.shard_rows]
        values[: len(part)] = part
        array.write_block(block, values)


def times(call: Callable[[], Any], rounds: int) -> Iterator[float]:
    """Yields the seconds of each call."""
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        yield time.perf_counter() - started


if __name__ == "__main__":
    main()
