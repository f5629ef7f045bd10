"""``probe``: estimates whether frozen features suffice, with linear and nearest-neighbour probes on held-out demos.

A ridge regression and a k-nearest-neighbour regression predict actions and the simulator's low-dim state from three
inputs: the features of one frame, proprioception alone, and features of the same network with random weights. A
projection can use what a linear probe can predict from a feature; a feature may hold more than that. The result is a
heuristic: a policy gets several frames and is not linear (Alain and Bengio, Understanding intermediate layers using
linear classifier probes, 2016, arXiv:1610.01644).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.demos.split import split_demos
from cache_pipeline.encoders.device import resolve_device
from cache_pipeline.encoders.frozen import FrozenEncoder
from cache_pipeline.encoders.image_encoder import EncoderSpec, build_encoder
from cache_pipeline.encoders.precision import nearest_precision
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.encoders.saving import saved_spec
from cache_pipeline.errors import CacheError, CachePipelineError
from cache_pipeline.extract.encode import BatchEncoder
from cache_pipeline.extract.freshness import open_sources
from cache_pipeline.files import PNG, Location, check_output, output_file
from cache_pipeline.progress import Progress, logger
from cache_pipeline.reports import plots

MAX_ROWS = {"train": 3000, "valid": 1000}
RIDGES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
NEIGHBOURS = 5
PROBE_BATCH = 32
PIECE_BATCHES = 8
CLEAR_GAIN = 0.05
PROPRIOCEPTION, FEATURES, RANDOM = "proprioception", "features", "random weights"
BOTH = f"{FEATURES} + {PROPRIOCEPTION}"

Array = NDArray[np.float64]


class ProbeScore(NamedTuple):
    """R² of one input for one target on held-out demos: 1 is perfect, 0 is as good as the mean."""

    inputs: str
    target: str
    ridge_r2: float
    knn_r2: float

    @property
    def best(self) -> float:
        return max(self.ridge_r2, self.knn_r2)


class ProbeResult(NamedTuple):
    """All scores, and a verdict in words."""

    cache: Location
    train_rows: int
    valid_rows: int
    scores: tuple[ProbeScore, ...]
    verdict: str
    picture: Path | None

    def to_json(self) -> dict[str, Any]:
        return {
            "cache": str(self.cache),
            "train_rows": self.train_rows,
            "valid_rows": self.valid_rows,
            "scores": [score._asdict() for score in self.scores],
            "verdict": self.verdict,
            "picture": None if self.picture is None else str(self.picture),
        }

    def lines(self) -> list[str]:
        lines = [f"R² on {self.valid_rows} frames of held-out demos, fitted on {self.train_rows} frames"]
        lines.append(f"{'target':<24}{'inputs':<28}{'ridge':>8}{'k-NN':>8}")
        lines += [f"{s.target:<24}{s.inputs:<28}{s.ridge_r2:>8.3f}{s.knn_r2:>8.3f}" for s in self.scores]
        lines.append(f"heuristic: {self.verdict}")
        return lines if self.picture is None else [*lines, f"picture: {self.picture}"]


def probe_cache(
    path: Location, *, picture: Path | None = None, overwrite: bool = False, seed: int = 0, device: str = "auto"
) -> ProbeResult:
    """Probes the clean view of a cache.

    Args:
        path: the cache.
        picture: path of a PNG of the scores, or None.
        overwrite: replace an existing PNG.
        seed: seed of the split, of the sample of rows of a large cache, and of the random weights.
        device: device of the network with random weights.

    Raises:
        CacheError: the cache has one demo, so none can be held out.
        ConfigError: ``picture`` is taken and may not be replaced.
    """
    if picture is not None:
        check_output(picture, PNG, overwrite=overwrite)
    cache = FeatureCache(path)
    train, valid = _split_rows(cache, seed)
    inputs = {FEATURES: {"train": _features(cache, train), "valid": _features(cache, valid)}}
    proprioception = {"train": _low_dim(cache, train), "valid": _low_dim(cache, valid)}
    if proprioception["train"].shape[1]:
        inputs[PROPRIOCEPTION] = proprioception
        inputs[BOTH] = {part: np.hstack([inputs[FEATURES][part], proprioception[part]]) for part in proprioception}
    targets = {"actions": (cache.array("actions", train), cache.array("actions", valid))}
    dataset = _source(cache)
    if dataset is not None:
        targets |= _privileged(cache, dataset, train, valid)
    scores = [_score(name, x, target, y) for target, y in targets.items() for name, x in inputs.items()]
    if dataset is not None and _are_resnets(cache):
        rows = {"train": train, "valid": valid}
        encoded = {part: _encode_random(cache, dataset, r, seed, device) for part, r in rows.items()}
        scores += [_score(RANDOM, encoded, target, y) for target, y in targets.items()]
    scores.sort(key=lambda score: list(targets).index(score.target))
    if picture is not None:
        _draw(scores, picture, overwrite)
    return ProbeResult(path, len(train), len(valid), tuple(scores), verdict(scores), picture)


def verdict(scores: list[ProbeScore]) -> str:
    """Returns a verdict in words for scores of the targets ``actions`` and, if available, ``object``."""
    best = {(score.target, score.inputs): score.best for score in scores}
    target = "object" if ("object", FEATURES) in best else "actions"
    what = "the state of the objects" if target == "object" else "actions"
    sighted, blind = best[target, FEATURES], best.get((target, PROPRIOCEPTION), 0.0)
    random = best.get((target, RANDOM))
    both, alone = best.get(("actions", BOTH)), best.get(("actions", PROPRIOCEPTION))
    words = [f"R² of {what}: {sighted:.2f} from features, {blind:.2f} from proprioception"]
    if random is not None:
        words.append(f"{random:.2f} from features of random weights: {_against_random(sighted - random)}")
    if sighted > blind + CLEAR_GAIN:
        words.append("the features add information to proprioception: they should suffice")
    else:
        words.append(
            "the features add nothing that a linear probe can use: try other weights, a lower --cut, or finetune"
        )
    if both is not None and alone is not None and both < alone + CLEAR_GAIN:
        words.append("actions are predicted about as well without images")
    return "; ".join(words)


def _against_random(gain: float) -> str:
    if abs(gain) <= CLEAR_GAIN:
        return "these weights are no better than random weights"
    if gain > 0:
        return "pretraining helps"
    return "random weights are better, so try a lower --cut or other weights"


def ridge(x: Array, y: Array, x_valid: Array) -> Array:
    """Returns predictions (M, A) of ridge regression; the penalty is chosen on the last fifth of the training rows."""
    held = max(1, len(x) // 5)
    fit = _ridge_of(x[:-held], y[:-held])
    best = min(RIDGES, key=lambda penalty: float(np.mean((fit(penalty)(x[-held:]) - y[-held:]) ** 2)))
    return _ridge_of(x, y)(best)(x_valid)


def nearest(x: Array, y: Array, x_valid: Array, neighbours: int = NEIGHBOURS) -> Array:
    """Returns the mean target (M, A) of the nearest training rows by Euclidean distance."""
    distances = (x_valid**2).sum(1)[:, None] - 2 * x_valid @ x.T + (x**2).sum(1)[None]
    indices = np.argpartition(distances, min(neighbours, len(x)) - 1, axis=1)[:, :neighbours]
    return y[indices].mean(axis=1)


def r_squared(predicted: Array, truth: Array) -> float:
    """Returns the explained fraction of the variance, averaged over the dimensions that vary.

    A dimension that is predicted worse than by its mean counts as 0.
    """
    total = ((truth - truth.mean(0)) ** 2).sum(0)
    varies = total > 1e-10 * max(1, len(truth))
    if not varies.any():
        return 0.0
    residual = ((predicted - truth) ** 2).sum(0)
    return float(np.mean(np.maximum(1 - residual[varies] / total[varies], 0)))


def _ridge_of(x: Array, y: Array) -> Callable[[float], Callable[[Array], Array]]:
    """Returns penalty → predictor. The products of the rows, which take the time, are computed once."""
    mean = y.mean(0)
    wide = x.shape[1] > len(x)
    gram, target = (x @ x.T, y - mean) if wide else (x.T @ x, x.T @ (y - mean))

    def fit(penalty: float) -> Callable[[Array], Array]:
        solved = np.linalg.solve(gram + penalty * len(x) * np.eye(len(gram)), target)
        weights = x.T @ solved if wide else solved
        return lambda other: other @ weights + mean

    return fit


def _score(name: str, x: Mapping[str, Array], target: str, y: tuple[Array, Array]) -> ProbeScore:
    mean, deviation = x["train"].mean(0), x["train"].std(0)
    varies = deviation > 1e-6 * np.abs(mean)  # else rounding errors
    deviation = np.where(varies, deviation, 1.0) * np.sqrt(x["train"].shape[1])
    train, valid = (x["train"] - mean) / deviation, (x["valid"] - mean) / deviation
    truth = y[1].astype(np.float64)
    return ProbeScore(
        inputs=name,
        target=target,
        ridge_r2=r_squared(ridge(train, y[0].astype(np.float64), valid), truth),
        knn_r2=r_squared(nearest(train, y[0].astype(np.float64), valid), truth),
    )


def _split_rows(cache: FeatureCache, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    split = split_demos(range(len(cache.demos)), cache.masks, seed=seed)
    if not len(split.valid):
        raise CacheError(f"{cache.path} holds one demo, so none can be held out; extract more demos")
    rng = np.random.default_rng(seed)
    parts = []
    for demos, most in ((split.train, MAX_ROWS["train"]), (split.valid, MAX_ROWS["valid"])):
        rows = np.concatenate(
            [np.arange(cache.demos[i].row, cache.demos[i].row + cache.demos[i].length) for i in demos]
        )
        parts.append(rows if len(rows) <= most else np.sort(rng.choice(rows, most, replace=False)))
    return parts[0], parts[1]


def _features(cache: FeatureCache, rows: NDArray[np.int64]) -> Array:
    return np.hstack([_pooled(cache.features(camera, rows).astype(np.float64)) for camera in cache.cameras])


def _pooled(features: Array) -> Array:
    return features.mean((2, 3)) if features.ndim == 4 else features


def _low_dim(cache: FeatureCache, rows: NDArray[np.int64]) -> Array:
    parts = [cache.array(f"low_dim/{key}", rows).reshape(len(rows), -1) for key in cache.low_dim]
    return np.hstack([np.zeros((len(rows), 0)), *parts])


def _source(cache: FeatureCache) -> Dataset | None:
    try:
        return open_sources(cache)
    except CachePipelineError as error:
        logger.info("the source file cannot be read, so random weights and object state are left out: %s", error)
        return None


def _frames_of(cache: FeatureCache, rows: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
    """Returns (demo, its frames among the rows), in the order of rows."""
    starts = np.array([demo.row for demo in cache.demos])
    order = np.argsort(starts)
    owner = order[np.searchsorted(starts[order], rows, side="right") - 1]
    return [(int(i), rows[owner == i] - starts[i]) for i in dict.fromkeys(owner.tolist())]


def _numbers(dataset: Dataset) -> dict[tuple[int, str], int]:
    return {(demo.file, demo.name): number for number, demo in enumerate(dataset.demos)}


def _privileged(
    cache: FeatureCache, dataset: Dataset, train: NDArray[np.int64], valid: NDArray[np.int64]
) -> dict[str, tuple[Array, Array]]:
    try:
        paths = [file.path for file in dataset.files]
        with_object = Dataset.open(paths, cameras=(), low_dim_keys=("object",), action_key=dataset.action_keys)
    except CachePipelineError:
        return {}
    numbers = _numbers(with_object)

    def read(rows: NDArray[np.int64]) -> Array:
        parts = []
        for i, frames in _frames_of(cache, rows):
            number = numbers[cache.demos[i].file, cache.demos[i].name]
            parts.append(with_object.rows(number)["low_dim/object"][frames])
        return np.concatenate(parts)

    return {"object": (read(train), read(valid))}


def _are_resnets(cache: FeatureCache) -> bool:
    specs = {camera: saved_spec(cache.encoder_file(camera)) for camera in cache.cameras}
    own = [camera for camera, spec in specs.items() if spec is None or spec.factory is not None]
    if own:
        logger.info("%s has a custom encoder, so the baseline of random weights is left out", own[0])
    return not own


def _encode_random(cache: FeatureCache, dataset: Dataset, rows: NDArray[np.int64], seed: int, device: str) -> Array:
    per_camera = []
    built: dict[Any, FrozenEncoder] = {}
    for camera, entry in cache.cameras.items():
        saved = saved_spec(cache.encoder_file(camera))
        assert saved is not None
        spec = EncoderSpec(rgb_model_name=saved.rgb_model_name, weights="random", seed=seed, cut=entry.identity["cut"])
        preprocess = Preprocess.from_json(entry.identity["preprocess"])
        precision = nearest_precision(entry.identity["precision"]["compute"], resolve_device(device))
        if (spec, preprocess, precision) not in built:
            encoder = build_encoder(spec)
            built[spec, preprocess, precision] = FrozenEncoder(encoder, preprocess, resolve_device(device), precision)
        frozen = built[spec, preprocess, precision]
        parts, batches = [], BatchEncoder(PROBE_BATCH, "float32")
        with Progress(f"random weights {camera}", len(rows), "images") as progress:
            for images in _picked_frames(cache, dataset, camera, rows):
                parts.append(_pooled(batches(frozen, images).astype(np.float64)))
                progress.advance(len(images))
        per_camera.append(np.concatenate(parts))
    return np.hstack(per_camera)


def _picked_frames(
    cache: FeatureCache, dataset: Dataset, camera: str, rows: NDArray[np.int64]
) -> Iterator[NDArray[np.uint8]]:
    """Yields the frames of the rows in order, a few batches at a time."""
    numbers, waiting = _numbers(dataset), []
    for i, frames in _frames_of(cache, rows):
        demo = cache.demos[i]
        waiting.append(dataset.frames(numbers[demo.file, demo.name], camera)[frames])
        if sum(map(len, waiting)) >= PIECE_BATCHES * PROBE_BATCH:
            yield np.concatenate(waiting)
            waiting = []
    if waiting:
        yield np.concatenate(waiting)


def _draw(scores: list[ProbeScore], picture: Path, overwrite: bool) -> None:
    groups: dict[str, dict[str, float]] = {}
    for score in scores:
        groups.setdefault(score.target, {})[score.inputs] = max(score.best, 0.0)
    png = plots.bars(groups, "Prediction from one frame, held-out demos", "R², better of ridge and k-NN")
    with output_file(picture, PNG, overwrite=overwrite) as partial:
        partial.write_bytes(png)
