"""Image encoders: ResNets and custom networks, preprocessing, views, and the fast path of frozen encoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cache_pipeline.encoders.obs_encoder import MultiImageObsEncoder as MultiImageObsEncoder
    from cache_pipeline.encoders.resnet import get_resnet as get_resnet

__all__ = ["MultiImageObsEncoder", "get_resnet"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import cache_pipeline

    return getattr(cache_pipeline, name)
