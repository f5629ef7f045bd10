"""The frozen encoder of each camera; cameras with the same encoder and preprocessing share one."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_pipeline.cache.manifest import CameraEntry, Manifest
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.encoders.device import resolve_device
from cache_pipeline.encoders.factory import Factories
from cache_pipeline.encoders.frozen import FrozenEncoder
from cache_pipeline.encoders.identity import collapse_warning, feature_statistics
from cache_pipeline.encoders.image_encoder import EncoderSpec, ImageEncoder, build_encoder
from cache_pipeline.encoders.precision import error_over_variation, nearest_precision, resolve_precision
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.encoders.saving import load_encoders, save_encoder
from cache_pipeline.errors import ConfigError, EncoderError, OptionError, available
from cache_pipeline.extract.config import OTHERS, ExtractConfig
from cache_pipeline.extract.encode import DTYPES, BatchEncoder
from cache_pipeline.files import digest

logger = logging.getLogger("cache_pipeline")

# Frames on which a precision is judged. On Lift the error over their variation then scatters by 2 to 4 % of itself from
# sample to sample; with 16 frames it is 4 to 8 %.
SAMPLE = 64
FLAGS = {
    "factory": "--encoder",
    "weights": "--weights or --no-pretrained-encoder",
    "rgb_model_name": "--rgb-model-name",
}


class CameraEncoder(NamedTuple):
    """A camera's encoder as built, as it runs, and what it leaves in the manifest.

    Attributes:
        frozen: computes in the precision of ``entry``; where the device lacks that precision, in the nearest one.
        file: where its weights lie inside a cache, those above the cut too.
    """

    encoder: ImageEncoder
    frozen: FrozenEncoder
    entry: CameraEntry
    file: str

    @property
    def missing_precision(self) -> str | None:
        """The precision of the cached features, if the device lacks it: more of them cannot be made."""
        recorded: str = self.entry.identity["precision"]["compute"]
        return recorded if recorded != self.frozen.precision else None


def build_encoders(config: ExtractConfig) -> dict[EncoderSpec, ImageEncoder]:
    """Every encoder that is asked for, once."""
    specs = config.encoders.values() if isinstance(config.encoders, Mapping) else (config.encoders,)
    return {spec: build_encoder(spec) for spec in dict.fromkeys(specs)}


def for_cameras(
    built: Mapping[EncoderSpec, ImageEncoder], config: ExtractConfig, dataset: Dataset, cached: Manifest | None
) -> dict[str, CameraEncoder]:
    """What encodes each camera.

    ``precision="auto"`` takes that of the cache where it has the camera, so that a cache begun on one machine can be
    extended on another; else the device's fastest whose features, as stored, are within ``config.precision_bound`` of
    float32 on the dataset's own frames.

    Args:
        built: by ``build_encoders``.
        config: what is asked for.
        dataset: whose cameras are encoded.
        cached: the manifest so far.
    """
    device = resolve_device(config.device)
    files: dict[EncoderSpec, str] = {}

    @functools.cache
    def runs_in(spec: EncoderSpec, preprocess: Preprocess, precision: str) -> FrozenEncoder:
        return FrozenEncoder(built[spec], preprocess, device, precision)

    found = {}
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
            frozen, measured = _measure(frozen, exact, frames, camera, config, free=free)
            precision = frozen.precision if free else precision
        identity = _as_json({**frozen.identity(image_shape), "precision": {"compute": precision}})
        views = max(config.views, entry.views if entry else 1)
        shape = frozen.feature_shape(image_shape)
        made = CameraEntry(shape, image_shape, identity, views, _view_spec(config, entry, views), measured)
        if spec not in files:
            above = next(built[spec].head_parameters(), None)
            whole = identity["weights"]["digest"] if above is None else built[spec].weights_digest()
            files[spec] = f"encoder/{whole}.safetensors"
        found[camera] = CameraEncoder(built[spec], frozen, made, files[spec])
    return found


def check_precisions(encoders: Mapping[str, CameraEncoder], cameras: Iterable[str]) -> None:
    """Raises EncoderError if features of one of ``cameras`` were made in a precision that the device lacks."""
    for camera in cameras:
        missing = encoders[camera].missing_precision
        if missing is not None:
            raise EncoderError(
                f"{camera}: the cached features were computed in {missing}, which {encoders[camera].frozen.device} "
                f"lacks, so no more of them can be made here; extend the cache on a device that has {missing}, or make "
                f"it anew with --overwrite --precision auto"
            )


def check_names(config: ExtractConfig, dataset: Dataset) -> None:
    """Raises ConfigError if something is given for a camera that the dataset does not have."""
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
                    f"{flag} ({getattr(others, name)}) has no effect: every camera has an encoder of its own "
                    f"({', '.join(dataset.cameras)}); leave it out"
                )


def _sample(dataset: Dataset, camera: str) -> NDArray[np.uint8]:
    """Up to ``SAMPLE`` frames, drawn from all demos alike; of one dataset always the same ones."""
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
    camera: str,
    config: ExtractConfig,
    *,
    free: bool,
) -> tuple[FrozenEncoder, dict[str, float]]:
    """The encoder to use, and on real frames the error of its features, as stored, and their spread.

    Args:
        exact: the same encoder in float32.
        free: whether to take ``exact`` where ``frozen`` errs by more than the bound.
    """
    encode, stored = BatchEncoder(SAMPLE // 2, "float32"), DTYPES[config.store_dtype]
    wanted = torch.from_numpy(encode(exact, frames))

    def error_of(features: Tensor) -> float:
        return error_over_variation(features.to(stored), wanted)

    found = wanted if frozen is exact else torch.from_numpy(encode(frozen, frames))
    error, statistics = error_of(found), feature_statistics(wanted)
    if not error <= config.precision_bound and free and frozen is not exact:
        logger.info("%s: %s errs by %s, so fp32 is taken", camera, frozen.precision, _of_bound(error, config))
        frozen, error = exact, error_of(wanted)
    warning = collapse_warning(statistics, camera)
    if warning is None and not error <= config.precision_bound:
        mend = "--store-dtype float32" if frozen is exact else "--precision fp32"
        done = f"features in {frozen.precision}, stored as {config.store_dtype}, err by {_of_bound(error, config)}"
        warning = f"{camera}: {done}; {mend} is more exact"
    if warning is not None:
        logger.warning("%s", warning)
    return frozen, {"error_over_variation": _figure(error), "spread": _figure(statistics.spread)}


def _of_bound(error: float, config: ExtractConfig) -> str:
    return f"{error:.2g} of the features' variation over frames ({config.precision_bound:g} is the bound)"


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


def save_weights(path: Path, cameras: Mapping[str, CameraEncoder], known: Mapping[str, str]) -> None:
    """Writes the weights of every encoder, once each, unless they are there as ``known``: file → digest."""
    for camera in {camera.file: camera for camera in cameras.values()}.values():
        file = path / camera.file
        if not file.is_file() or digest(file.read_bytes()) != known.get(camera.file):
            file.parent.mkdir(parents=True, exist_ok=True)
            save_encoder(camera.encoder, file)


def restore_encoders(
    cache: FeatureCache, encoder: Factories = None, cameras: Sequence[str] | None = None
) -> dict[str, ImageEncoder]:
    """The encoder of each camera, as it made the features, from the weights that the cache carries.

    Args:
        cache: the cache.
        encoder: the factories that the user names; one that the cache names alone is not run.
        cameras: some of its cameras; all by default.

    Raises:
        EncoderError: the cache was made by a factory that is not named, or that has changed.
    """
    identities = {name: cache.cameras[name].identity for name in (cache.cameras if cameras is None else cameras)}
    structures = {camera: value["structure"] for camera, value in identities.items() if "structure" in value}
    encoders = load_encoders({camera: cache.encoder_file(camera) for camera in identities}, encoder, structures)
    for camera, made in encoders.items():
        made.cut = identities[camera]["cut"]
    return encoders
