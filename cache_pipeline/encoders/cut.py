"""The cut of a ResNet: the trunk below it computes the cached feature; the head above it can be trained."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import Bottleneck

from cache_pipeline.encoders.convolution import convolve
from cache_pipeline.encoders.resnet import ResNet
from cache_pipeline.errors import EncoderError, available

CUTS = ("avgpool", "layer4", "layer3", "layer2", "layer1")
STAGES = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


def check_cut(cut: str) -> None:
    """Raises ``EncoderError`` for a cut that no ResNet has."""
    if cut not in CUTS:
        raise EncoderError(f"there is no cut {cut!r}; {available(CUTS, cut)}")


def trunk_stages(cut: str) -> tuple[str, ...]:
    """Returns the names of the stages up to and including the cut, without pooling."""
    return STAGES if cut == "avgpool" else STAGES[: STAGES.index(cut) + 1]


def head_stages(cut: str) -> tuple[str, ...]:
    """Returns the names of the stages above the cut, without pooling."""
    return STAGES[len(trunk_stages(cut)) :]


def run_stages(net: ResNet, x: Tensor, stages: Iterable[str], gradient_checkpointing: bool = False) -> Tensor:
    """Runs the named stages of ``net`` on images or feature maps.

    Args:
        net: the ResNet.
        x: images (B,3,H,W) or the output of the stage below the first named one.
        stages: names from ``STAGES``, in order.
        gradient_checkpointing: keep only the inputs of blocks for the backward pass, which recomputes the rest.
    """
    learning = torch.is_grad_enabled()
    for name in stages:
        stage = cast(nn.Module, getattr(net, name))
        if not learning:
            x = stage(x)
        elif name == "conv1":
            x = conv_norm(net.conv1, net.bn1, x)
        elif isinstance(stage, nn.Sequential):
            for block in stage:
                run = partial(run_block, block)
                x = checkpoint(run, x, use_reentrant=False) if gradient_checkpointing else run(x)
        elif name != "bn1":
            x = stage(x)
    return x


def run_block(block: nn.Module, x: Tensor) -> Tensor:
    """Computes ``block(x)`` of a residual block with ``conv_norm``, for training."""
    count = 3 if isinstance(block, Bottleneck) else 2
    residual = x
    if block.downsample is not None:
        conv, norm = cast(nn.Sequential, block.downsample)
        residual = conv_norm(cast(nn.Conv2d, conv), norm, x)
    for number in range(1, count + 1):
        x = conv_norm(getattr(block, f"conv{number}"), getattr(block, f"bn{number}"), x)
        if number < count:
            x = functional.relu(x, inplace=True)
    return functional.relu(x + residual, inplace=True)


def conv_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """Computes ``norm(conv(x))``.

    BatchNorm with frozen statistics is folded into the convolution. Gradients are the same, and two passes over every
    map (forward and backward) are saved.
    """
    if not isinstance(norm, nn.BatchNorm2d) or norm.training:
        return cast(Tensor, norm(conv(x)))
    scale = norm.weight * torch.rsqrt(cast(Tensor, norm.running_var) + norm.eps)
    shift = norm.bias - cast(Tensor, norm.running_mean) * scale
    weight = conv.weight * scale[:, None, None, None]
    return convolve(x, weight, shift, conv)
