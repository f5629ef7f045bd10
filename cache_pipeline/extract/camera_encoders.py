"""Builds the frozen encoder of each camera; cameras with the same encoder and preprocessing share it."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_pipeline.cache.manifest import CameraEntry, Manifest
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.cache.store import exists
from cache_pipeline.cache.store_protocol import Store
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.encoders.device import resolve_device
from cache_pipeline.encoders.factory import Factories
from cache_pipeline.encoders.frozen import FrozenEncoder, preferred_batch_size
from cache_pipeline.encoders.identity import collapse_warning, feature_statistics
from cache_pipeline.encoders.image_encoder import EncoderSpec, ImageEncoder, build_encoder
from cache_pipeline.encoders.precision import error_over_variation, nearest_precision, resolve_precision
from cache_pipeline.encoders.preprocess import Preprocess, check_views
from cache_pipeline.encoders.saving import load_encoder, load_encoders, save_encoder, saved_spec
from cache_pipeline.encoders.weights import has_imagenet_file
from cache_pipeline.errors import ConfigError, EncoderError, OptionError, available
from cache_pipeline.extract.config import OTHERS, ExtractConfig
from cache_pipeline.extract.encode import DTYPES, BatchEncoder
from cache_pipeline.files import digest
from cache_pipeline.text import by_name, listed

logger = logging.getLogger("cache_pipeline")

# Number of frames on which the error of a precision is measured. On Lift, the standard deviation of the measured error
# between samples is 2 to 4 % of it; with 16 frames, 4 to 8 %.
SAMPLE = 64
FLAGS = {
    "factory": "--encoder",
    "weights": "--weights or --no-pretrained-encoder",
    "weights_prefix": "--weights-prefix",
    "rgb_model_name": "--rgb-model-name",
}


Built = dict[EncoderSpec, ImageEncoder]


class Measured(NamedTuple):
    """The encoder to use for a camera, what was measured, and what the user should know; empty if nothing."""

    frozen: FrozenEncoder
    figures: dict[str, float]
    info: str
    warning: str


class CameraEncoder(NamedTuple):
    """The encoder of a camera, its fast path, and its entry in the manifest.

    Attributes:
        frozen: fast path in the precision of ``entry``, or in fp32 if the device lacks that precision.
        file: path of all its weights inside a cache, including those above the cut.
    """

    encoder: ImageEncoder
    frozen: FrozenEncoder
    entry: CameraEntry
    file: str

    @property
    def missing_precision(self) -> str | None:
        """The precision of the cached features if the device lacks it, else None. Such features cannot be extended."""
        recorded: str = self.entry.identity["precision"]["compute"]
        return recorded if recorded != self.frozen.precision else None


def build_encoders(
    specs: Iterable[EncoderSpec], store: Store, cached: Mapping[str, str | None], *, stand_in: bool = False
) -> Built:
    """Builds each encoder once.

    Args:
        specs: the encoders.
        store: the cache.
        cached: weight file in the cache → its recorded digest. Without torchvision's file in the hub folder, ImageNet
            weights are read from such a file if it is intact, instead of downloading them again.
        stand_in: use random weights instead of ImageNet weights that would have to be downloaded.
    """
    return {spec: _build(spec, store, cached, stand_in=stand_in) for spec in dict.fromkeys(specs)}


def _build(spec: EncoderSpec, store: Store, cached: Mapping[str, str | None], *, stand_in: bool) -> ImageEncoder:
    if spec.weights != "imagenet" or spec.factory is not None or has_imagenet_file(spec.rgb_model_name):
        return build_encoder(spec)
    with TemporaryDirectory() as folder:
        for name, expected in cached.items():
            if not exists(store, name) or digest(weights := store.read(name)) != expected:
                continue
            file = Path(folder) / Path(name).name
            file.write_bytes(weights)
            saved = saved_spec(file)
            if saved is not None and replace(saved, cut=spec.cut, seed=spec.seed) == spec:
                where = f"{store.place}/{name}"
                logger.info("using the ImageNet weights in %s; torchvision's file is not in its hub folder", where)
                return load_encoder(spec, file)
    if stand_in:
        logger.info("a dry run does not download ImageNet weights; with random ones, precision and time may differ")
        return build_encoder(replace(spec, weights="random"))
    return build_encoder(spec)


def for_cameras(
    built: Mapping[EncoderSpec, ImageEncoder], config: ExtractConfig, dataset: Dataset, cached: Manifest | None
) -> dict[str, CameraEncoder]:
    """Returns camera → encoder in its precision.

    ``precision="auto"`` keeps the precision of cameras in the cache, so a cache can be extended on another machine. For
    new cameras it is the fastest precision whose stored features are within ``config.precision_bound`` of float32 on
    frames of the dataset.

    Args:
        built: result of ``build_encoders``.
        config: the options.
        dataset: the dataset.
        cached: the current manifest, if any.
    """
    device = resolve_device(config.device)
    files: dict[EncoderSpec, str] = {}

    @functools.cache
    def runs_in(spec: EncoderSpec, preprocess: Preprocess, precision: str) -> FrozenEncoder:
        return FrozenEncoder(built[spec], preprocess, device, precision)

    found = {}
    infos: dict[str, str] = {}
    warnings: dict[str, str] = {}
    notes: dict[str, str] = {}
    for camera, image_shape in dataset.cameras.items():
        entry = cached.cameras.get(camera) if cached else None
        spec, preprocess = config.encoder_for(camera), config.preprocess_for(camera)
        if config.precision == "auto" and entry is not None:
            precision = entry.identity["precision"]["compute"]
        else:
            precision = resolve_precision(config.precision, device)
        frozen = runs_in(spec, preprocess, nearest_precision(precision, device))
        measured = entry.measured if entry is not None else None
        if measured is None:
            exact = runs_in(spec, preprocess, "fp32")
            frames, free = _sample(dataset, camera), entry is None and config.precision == "auto"
            result = _measure(frozen, exact, frames, config, free=free)
            frozen, measured = result.frozen, result.figures
            infos |= {camera: result.info} if result.info else {}
            warnings |= {camera: result.warning} if result.warning else {}
            precision = frozen.precision if free else precision
        identity = _as_json({**frozen.identity(image_shape), "precision": {"compute": precision}})
        cached_views = entry.views if entry else 1
        views = max(config.views, cached_views)
        if views > cached_views:
            note = check_views(config.view_spec, preprocess, image_shape[:2])
            notes |= {camera: note} if note else {}
        shape = frozen.feature_shape(image_shape)
        made = CameraEntry(shape, image_shape, identity, views, _view_spec(config, entry, views), measured)
        if spec not in files:
            above = next(built[spec].head_parameters(), None)
            whole = identity["weights"]["digest"] if above is None else built[spec].weights_digest()
            files[spec] = f"encoder/{whole}.safetensors"
        found[camera] = CameraEncoder(built[spec], frozen, made, files[spec])
    for level, said in ((logging.INFO, notes), (logging.INFO, infos), (logging.WARNING, warnings)):
        for line in by_name(said, "camera", more="inspect --json has the error of each"):
            logger.log(level, "%s", line)
    return found


def check_precisions(encoders: Mapping[str, CameraEncoder], cameras: Iterable[str]) -> None:
    """Raises EncoderError if features of one of ``cameras`` have a precision that the device lacks."""
    for camera in cameras:
        missing = encoders[camera].missing_precision
        if missing is not None:
            raise EncoderError(
                f"{camera}: the cached features were computed in {missing}, which {encoders[camera].frozen.device} "
                f"lacks, so the cache cannot be extended here; extend it on a device with {missing}, or replace it "
                f"with --overwrite --precision auto"
            )


def check_names(config: ExtractConfig, dataset: Dataset) -> None:
    """Raises ConfigError if the config has an encoder or preprocessing for a camera that the dataset lacks."""
    for chosen in (config.encoders, config.preprocess):
        for camera in chosen if isinstance(chosen, Mapping) else ():
            if camera != OTHERS and camera not in dataset.cameras:
                raise ConfigError(f"an encoder is given for {camera!r}; {available(dataset.cameras, camera)}")
    chosen = config.encoders
    if isinstance(chosen, Mapping) and OTHERS in chosen and all(camera in chosen for camera in dataset.cameras):
        plain, others = EncoderSpec(), chosen[OTHERS]
        for name, flag in FLAGS.items():
            if getattr(others, name) != getattr(plain, name):
                raise OptionError(
                    f"{flag} ({getattr(others, name)}) has no effect: every camera has its own encoder "
                    f"({listed(dataset.cameras)}); leave it out"
                )


def _sample(dataset: Dataset, camera: str) -> NDArray[np.uint8]:
    """Reads up to ``SAMPLE`` frames, drawn uniformly from all demos; a dataset always gives the same frames."""
    lengths = np.array([demo.length for demo in dataset.demos])
    total, starts = int(lengths.sum()), np.cumsum(lengths) - lengths
    rows = np.sort(np.random.default_rng(0).choice(total, min(SAMPLE, total), replace=False))
    demos = np.searchsorted(starts, rows, side="right") - 1
    return dataset.gather(
        camera, [(d, t, t + 1) for d, t in zip(demos.tolist(), (rows - starts[demos]).tolist(), strict=True)]
    )


def _measure(
    frozen: FrozenEncoder,
    exact: FrozenEncoder,
    frames: NDArray[np.uint8],
    config: ExtractConfig,
    *,
    free: bool,
) -> Measured:
    """Returns the encoder to use, and the error (as stored) and spread of its features on frames of the dataset.

    Args:
        exact: the same encoder in float32.
        free: whether to use ``exact`` if the error of ``frozen`` exceeds the bound.
    """
    height, width = exact.preprocess.output_shape(*frames.shape[1:3])
    size = min(SAMPLE // 2, preferred_batch_size(exact.device, height * width))
    encode, stored = BatchEncoder(size, "float32"), DTYPES[config.store_dtype]
    wanted = torch.from_numpy(encode(exact, frames))

    def error_of(features: Tensor) -> float:
        return error_over_variation(features.to(stored), wanted)

    found = wanted if frozen is exact else torch.from_numpy(encode(frozen, frames))
    error, statistics, info = error_of(found), feature_statistics(wanted), ""
    if not error <= config.precision_bound and free and frozen is not exact:
        made = frozen.precision
        info = f"{made} is too inexact: its error is {_of_bound(error, config)}; fp32 is used"
        frozen, error = exact, error_of(wanted)
    warning = collapse_warning(statistics)
    if not warning and not error <= config.precision_bound:
        mend = "--store-dtype float32" if frozen is exact else "--precision fp32"
        done = f"the error of {frozen.precision}, stored as {config.store_dtype}, is {_of_bound(error, config)}"
        warning = f"{done}; {mend} is more exact"
    figures = {"error_over_variation": _figure(error), "spread": _figure(statistics.spread)}
    return Measured(frozen, figures, info, warning)


def _of_bound(error: float, config: ExtractConfig) -> str:
    return f"{error:.2g} of the features' variation over frames, and {config.precision_bound:g} is allowed"


def _figure(value: float) -> float:
    return float(f"{value:.3g}") if math.isfinite(value) else -1.0


def _view_spec(config: ExtractConfig, entry: CameraEntry | None, views: int) -> dict | None:
    if views == 1:
        return None
    if config.views == 1 and entry is not None:
        return entry.view_spec
    return _as_json(config.view_spec.to_json())


def _as_json(value: dict) -> dict:
    return json.loads(json.dumps(value))


def save_weights(store: Store, cameras: Mapping[str, CameraEncoder], known: Mapping[str, str]) -> None:
    """Writes the weights of every encoder once, unless they are stored with the digest in ``known``: name → digest."""
    for camera in {camera.file: camera for camera in cameras.values()}.values():
        if exists(store, camera.file) and digest(store.read(camera.file)) == known.get(camera.file):
            continue
        with TemporaryDirectory() as folder:
            file = Path(folder) / "weights.safetensors"
            save_encoder(camera.encoder, file)
            store.write(camera.file, file.read_bytes())


def restore_encoders(
    cache: FeatureCache, encoder: Factories = None, cameras: Sequence[str] | None = None
) -> dict[str, ImageEncoder]:
    """Loads the encoder of each camera from the weights in the cache.

    Args:
        cache: the cache.
        encoder: the factories that the user names; a factory named only by the cache does not run.
        cameras: some of its cameras; default: all.

    Raises:
        EncoderError: the cache was made by a factory that is not named or has changed.
    """
    identities = {name: cache.cameras[name].identity for name in (cache.cameras if cameras is None else cameras)}
    structures = {camera: value["structure"] for camera, value in identities.items() if "structure" in value}
    encoders = load_encoders({camera: cache.encoder_file(camera) for camera in identities}, encoder, structures)
    for camera, made in encoders.items():
        made.cut = identities[camera]["cut"]
    return encoders
