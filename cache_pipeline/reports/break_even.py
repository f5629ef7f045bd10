"""When a cache has paid for its extraction."""

from __future__ import annotations

import math

from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.errors import CachePipelineError
from cache_pipeline.runs.record import RunRecord


def break_even(record: RunRecord) -> int | None:
    """Returns the training step at which the cache of a run has paid for its extraction.

    By then, live encoding would have encoded as many images as the extraction: a live step encodes ``batch_size`` × To
    images of each camera. The time of the cached steps themselves is left out; it is small beside that of encoding.
    None if the run has no cache, or if its cache cannot be read any more.
    """
    if record.kind != "train" or record.data.cache is None:
        return None
    try:
        cache = FeatureCache(record.data.cache)
        extracted = sum(int(cache.lengths.sum()) * cache.cameras[camera].views for camera in record.policy.cameras)
    except (CachePipelineError, KeyError):
        return None
    per_step = int(record.config["batch_size"]) * record.policy.obs_horizon * len(record.policy.cameras)
    return math.ceil(extracted / per_step)
