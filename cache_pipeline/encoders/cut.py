"""Where a ResNet is cut: the trunk below gives the cached feature, the head above can be trained on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cache_pipeline.encoders.resnet import ResNet
from cache_pipeline.errors import EncoderError, available

CUTS = ("avgpool", "layer4", "layer3", "layer2", "layer1")
STAGES = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


def check_cut(cut: str) -> None:
    """Raises ``EncoderError`` for a cut that no ResNet has."""
    if cut not in CUTS:
        raise EncoderError(f"there is no cut {cut!r}; {available(CUTS, cut)}")


def trunk_stages(cut: str) -> tuple[str, ...]:
    """Names of the stages up to and with the cut; pooling apart."""
    return STAGES if cut == "avgpool" else STAGES[: STAGES.index(cut) + 1]


def head_stages(cut: str) -> tuple[str, ...]:
    """Names of the stages above the cut, pooling apart."""
    return STAGES[len(trunk_stages(cut)) :]


def run_stages(net: ResNet, x: Tensor, stages: Iterable[str], gradient_checkpointing: bool = False) -> Tensor:
    """Runs the named stages of ``net`` on images or feature maps.

    Args:
        net: the ResNet.
        x: images (B,3,H,W) or the output of the stage below the first named one.
        stages: names out of ``STAGES``, in order.
        gradient_checkpointing: keep only the blocks' inputs for the backward pass, and compute the rest again there.
    """
    for name in stages:
        stage = cast(nn.Module, getattr(net, name))
        if gradient_checkpointing and isinstance(stage, nn.Sequential) and torch.is_grad_enabled():
            for block in stage:
                x = cast(Tensor, checkpoint(block, x, use_reentrant=False))
        else:
            x = stage(x)
    return x
