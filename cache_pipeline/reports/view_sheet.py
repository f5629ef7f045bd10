"""``inspect --views``: a contact sheet of preprocessed frames, one row per camera and view."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.encoders.preprocess import Preprocess, augment
from cache_pipeline.encoders.view_spec import ViewSpec
from cache_pipeline.encoders.views import view_parameters
from cache_pipeline.errors import CacheError, CachePipelineError
from cache_pipeline.extract.freshness import open_sources
from cache_pipeline.files import PNG, Location, check_output, output_file
from cache_pipeline.progress import logger
from cache_pipeline.reports import plots

COLUMNS = 6
SHOWN_ROWS = 10


def write_view_sheet(cache_path: Location, out: Path, *, overwrite: bool = False) -> Path:
    """Draws frames of the first demos of a cache in every view, as a PNG.

    Raises:
        CacheError: the cache or its source files cannot be read.
        ConfigError: ``out`` is taken and may not be replaced.
    """
    check_output(out, PNG, overwrite=overwrite)
    cache = FeatureCache(cache_path)
    try:
        dataset = open_sources(cache)
    except CachePipelineError as error:
        raise CacheError(f"the frames of {cache_path} cannot be read, so its views cannot be drawn: {error}") from error
    rows: dict[str, list[NDArray[np.uint8]]] = {}
    views = max(entry.views for entry in cache.cameras.values())
    shown = dict(list(cache.cameras.items())[: max(1, SHOWN_ROWS // views)])
    if len(shown) < len(cache.cameras):
        logger.info("the first %d of %d cameras are drawn", len(shown), len(cache.cameras))
    for camera, entry in shown.items():
        spec = ViewSpec.from_json(entry.view_spec or {})
        preprocess = Preprocess.from_json(entry.identity["preprocess"])
        for view in range(entry.views):
            title = f"{camera}, view {view}" + (" (clean)" if view == 0 else "")
            rows[title] = [_frame(cache, dataset, camera, number, preprocess, spec, view) for number in _demos(cache)]
    with output_file(out, PNG, overwrite=overwrite) as partial:
        partial.write_bytes(plots.contact_sheet(rows))
    return out


def _demos(cache: FeatureCache) -> list[int]:
    return list(range(min(COLUMNS, len(cache.demos))))


def _frame(
    cache: FeatureCache,
    dataset: Dataset,
    camera: str,
    number: int,
    preprocess: Preprocess,
    spec: ViewSpec,
    view: int,
) -> NDArray[np.uint8]:
    demo = cache.demos[number]
    source = next(i for i, other in enumerate(dataset.demos) if (other.file, other.name) == (demo.file, demo.name))
    frame = torch.from_numpy(dataset.frames(source, camera, demo.length // 2, demo.length // 2 + 1))
    drawn = view_parameters(spec, demo.view_key, camera, view)
    pixels: NDArray[np.uint8] = (augment(frame, preprocess, drawn)[0] * 255).round().byte().permute(1, 2, 0).numpy()
    return pixels
