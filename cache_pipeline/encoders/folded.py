"""A ResNet trunk for inference: BatchNorm folded into convolutions; oneDNN fuses ReLU and shortcut."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models.resnet import Bottleneck

from cache_pipeline.encoders.cut import trunk_stages
from cache_pipeline.encoders.resnet import ResNet

# Rounding errors of the stem and the first bottleneck block grow in later layers. In bfloat16, features of an
# ImageNet-trained ResNet-50 err by 3.5e-2; with these few percent of the work in float32, by 8e-3.
EXACT_BLOCKS = 1


class FoldedConv:
    """One convolution with optional residual and ReLU: ``relu(conv(x) + residual)``.

    Args:
        weight: (C',C,kh,kw). bias: (C').
        geometry: padding, stride, dilation, groups.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, geometry: tuple[Any, ...], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.dtype = dtype
        self.weight = weight.detach().to(device, dtype, memory_format=torch.channels_last)
        self.bias = bias.detach().to(device, dtype)
        self.geometry = geometry
        self.fused = device.type == "cpu" and onednn_fuses(dtype)
        self._packed: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, x: Tensor, relu: bool, residual: Tensor | None = None) -> Tensor:
        """Maps (B,C,h,w) in ``dtype``, channels-last; ``residual`` has the shape of the output."""
        if self.fused:
            size = tuple(x.shape[1:])
            packed = self._packed.get(size)
            if packed is None:
                packed = self._packed[size] = _pack(self.weight, self.geometry, x.shape)
            return _fused(x, packed, self.bias, self.geometry, relu, residual)
        padding, stride, dilation, groups = self.geometry
        y = torch.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)
        if residual is not None:
            y += residual
        return y.relu_() if relu else y


def folded_conv(conv: nn.Conv2d, norm: nn.BatchNorm2d, device: torch.device, dtype: torch.dtype) -> FoldedConv:
    """Folds a BatchNorm into its convolution."""
    geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
    return FoldedConv(*_fold(conv, norm), geometry, device, dtype)


class FoldedBlock:
    """A residual block of folded convolutions."""

    def __init__(self, block: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype
        count = 3 if isinstance(block, Bottleneck) else 2
        pairs = [(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in range(1, count + 1)]
        *self.body, self.last = [folded_conv(conv, norm, device, dtype) for conv, norm in pairs]
        shortcut = cast("nn.Sequential | None", block.downsample)
        self.shortcut = None
        if shortcut is not None:
            conv, norm = cast(nn.Conv2d, shortcut[0]), cast(nn.BatchNorm2d, shortcut[1])
            self.shortcut = folded_conv(conv, norm, device, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Maps (B,C,h,w) to (B,C',h',w') in the block's dtype."""
        x = x.to(self.dtype)
        residual = x if self.shortcut is None else self.shortcut(x, False)
        for conv in self.body:
            x = conv(x, True)
        return self.last(x, True, residual)


class FoldedTrunk:
    """A ResNet with BatchNorm up to its cut: maps normalised float32 images (B,3,H,W) to float32 features.

    Args:
        net: the ResNet; not modified.
        cut: one of ``cut.CUTS``.
        device: device to run on.
        dtype: dtype of computing; with bfloat16, stem and first block of a bottleneck ResNet stay in float32.
    """

    def __init__(self, net: ResNet, cut: str, device: torch.device, dtype: torch.dtype) -> None:
        layers = [getattr(net, stage) for stage in trunk_stages(cut) if stage.startswith("layer")]
        blocks = [block for layer in layers for block in layer]
        exact = EXACT_BLOCKS if dtype == torch.bfloat16 and isinstance(blocks[0], Bottleneck) else 0
        self.cut = cut
        norm = cast(nn.BatchNorm2d, net.bn1)
        self.stem = folded_conv(net.conv1, norm, device, torch.float32 if exact else dtype)
        self.blocks = [
            FoldedBlock(block, device, torch.float32 if index < exact else dtype) for index, block in enumerate(blocks)
        ]

    def __call__(self, images: Tensor) -> Tensor:
        """Maps (B,3,H,W) to (B,D) or (B,D,h,w)."""
        x = self.stem(images.to(self.stem.dtype, memory_format=torch.channels_last), True)
        x = torch.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        for block in self.blocks:
            x = block(x)
        x = x.float()
        return x.mean((2, 3)) if self.cut == "avgpool" else x


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    return fuse_conv_bn_weights(conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias)


def can_fold(net: nn.Module) -> bool:
    """Whether a network is a ResNet with BatchNorm."""
    return isinstance(net, ResNet) and isinstance(net.bn1, nn.BatchNorm2d)


@functools.cache
def onednn_fuses(dtype: torch.dtype) -> bool:
    """Whether torch's fused oneDNN convolution exists and is correct for ``dtype``.

    ``torch.compile`` emits this operator on CPUs, but it is not public: it is tested once, and not used if it fails.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    cells = torch.arange(8 * 8 * 3 * 3).reshape(8, 8, 3, 3)
    weight = cells.remainder(7).sub(3).to(dtype).contiguous(memory_format=torch.channels_last)
    x = torch.arange(8 * 36).reshape(1, 8, 6, 6).remainder(5).to(dtype).contiguous(memory_format=torch.channels_last)
    bias, geometry = torch.ones(8, dtype=dtype), ((1, 1), (1, 1), (1, 1), 1)
    try:
        fused = _fused(x, _pack(weight, geometry, x.shape), bias, geometry, True, x)
    except (AttributeError, TypeError, RuntimeError):
        return False
    plain = (torch.conv2d(x.float(), weight.float(), bias.float(), padding=1) + x).relu()
    return torch.allclose(fused.float(), plain, rtol=0.02, atol=1.0)


def _pack(weight: Tensor, geometry: tuple[Any, ...], size: Sequence[int]) -> Tensor:
    """Returns the weights in oneDNN's format for inputs of a size; without it each call may convert them slowly."""
    if not hasattr(torch.ops.mkldnn, "_reorder_convolution_weight"):
        return weight
    return cast(Tensor, torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(size)))


def _fused(
    x: Tensor, weight: Tensor, bias: Tensor, geometry: tuple[Any, ...], relu: bool, residual: Tensor | None
) -> Tensor:
    convolve = torch.ops.mkldnn._convolution_pointwise
    after = "relu" if relu else "none"
    if residual is None:
        return cast(Tensor, convolve(x, weight, bias, *geometry, after, [], ""))
    end = after if relu else None
    return cast(Tensor, convolve.binary(x, residual, weight, bias, *geometry, "add", None, end, [], None))
