"""When a cache has paid for its extraction."""

from __future__ import annotations

import math

from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.errors import CachePipelineError
from cache_pipeline.files import typed
from cache_pipeline.runs.record import RunRecord


def break_even(record: RunRecord) -> int | None:
    """Returns the training step at which the cache of a run has paid for its extraction.

    By then, live encoding would have encoded as many images as the extraction: a live step encodes ``batch_size`` × To
    images of each camera. The time of the cached steps themselves is left out; it is small beside that of encoding.
    None if the run has no cache, its cache cannot be read any more, or its record has no batch size.
    """
    if record.kind != "train" or record.data.cache is None:
        return None
    try:
        cache = FeatureCache(record.data.cache)
        extracted = sum(int(cache.lengths.sum()) * cache.cameras[camera].views for camera in record.policy.cameras)
        batch_size = typed(record.config["batch_size"], int)
    except (CachePipelineError, KeyError, ValueError):
        return None
    return math.ceil(extracted / max(1, batch_size * record.policy.obs_horizon * len(record.policy.cameras)))
