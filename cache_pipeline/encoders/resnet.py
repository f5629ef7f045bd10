"""torchvision ResNets without classifier, as backbones of image encoders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

from cache_pipeline.encoders.found_resnet import architecture, choose_resnet, find_resnets, log_found, shapes_of
from cache_pipeline.encoders.preprocess import Triple
from cache_pipeline.encoders.weights import COUNTER, imagenet_state
from cache_pipeline.errors import EncoderError, available

RESNETS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
CHANNELS_PER_GROUP = 16


class ResNet(TorchvisionResNet):
    """torchvision's ResNet with ``fc = Identity()``: maps images (B,3,H,W) to features (B, 512 or 2048).

    ``load_state_dict`` also accepts the state dict of a whole torchvision ResNet and ignores its classifier ``fc.*``.

    Attributes:
        preprocess_mean, preprocess_std: normalisation that the weights were trained with, if it is known and not
            ImageNet's; see ``with_declared``.
    """

    preprocess_mean: Triple | None = None
    preprocess_std: Triple | None = None

    def __init__(self, name: str, use_group_norm: bool = False) -> None:
        block, layers = RESNETS[name]
        super().__init__(block, list(layers), norm_layer=group_norm if use_group_norm else None)
        self.name, self.use_group_norm = name, use_group_norm
        self.out_dim = 512 * block.expansion
        self.fc = nn.Identity()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads a state dict with or without classifier; otherwise as ``torch.nn.Module``."""
        backbone = {name: value for name, value in state_dict.items() if not name.startswith("fc.")}
        return super().load_state_dict(backbone, strict=strict, assign=assign)


def group_norm(channels: int) -> nn.GroupNorm:
    """Makes a GroupNorm with 16 channels per group, the replacement of BatchNorm in diffusion_policy and robomimic."""
    return nn.GroupNorm(channels // CHANNELS_PER_GROUP, channels)


def get_resnet(
    name: str, weights: str | Path | None = None, *, prefix: str | None = None, use_group_norm: bool = False
) -> ResNet:
    """Makes a ResNet whose output is the pooled feature.

    Args:
        name: ``resnet18``, ``resnet34`` or ``resnet50``.
        weights: ``None`` (random, from torch's global generator), ``"IMAGENET1K_V1"`` (also ``"imagenet"``),
            or a ``.pth`` or ``.safetensors`` file.
        prefix: beginning of the names of one of several ResNets in the file; see ``choose_resnet``.
        use_group_norm: GroupNorm instead of BatchNorm; an error for weights that were trained with BatchNorm.

    Raises:
        EncoderError: unknown name, or the weights cannot be loaded or do not fit.
    """
    if name not in RESNETS:
        raise EncoderError(
            f"there is no ResNet named {name!r}; {available(RESNETS, name)}; any other network: --encoder"
        )
    resnet = ResNet(name, use_group_norm)
    if weights is None:
        return resnet
    if str(weights) in ("IMAGENET1K_V1", "imagenet"):
        (found,) = find_resnets(imagenet_state(name))
        load_backbone(resnet, name, found.state, f"torchvision's {name} weights")
        return resnet
    found = choose_resnet(weights, prefix)
    load_backbone(resnet, name, found.state, str(weights))
    log_found(weights, found)
    if found.origin == "robomimic":
        resnet.preprocess_mean, resnet.preprocess_std = (0.0,) * 3, (1.0,) * 3
    return resnet


def load_backbone(resnet: ResNet, name: str, state: Mapping[str, Tensor], source: str) -> None:
    """Loads weights into ``resnet`` as float32.

    Args:
        resnet: the network.
        name: its architecture, for messages.
        state: state dict of a ResNet without classifier.
        source: origin of ``state``, for messages.

    Raises:
        EncoderError: names or shapes do not fit (the message names the architecture), values are not finite or not
            floating-point numbers, or ``state`` has BatchNorm and ``resnet`` has GroupNorm.
    """
    wanted = resnet.state_dict()
    if "bn1.running_mean" in state and "bn1.running_mean" not in wanted:
        raise EncoderError(
            f"{source} was trained with BatchNorm, so its features are meaningless with GroupNorm; "
            f"turn off use_group_norm, or start from random weights (--no-pretrained-encoder)"
        )
    values = {key: value for key, value in state.items() if not key.endswith(COUNTER)}
    counters = {key: value for key, value in wanted.items() if key.endswith(COUNTER)}
    wanted_shapes = shapes_of({key: value for key, value in wanted.items() if key not in counters})
    if shapes_of(values) != wanted_shapes:
        raise EncoderError(f"{source} {_misfit(name, shapes_of(values), wanted_shapes)}")
    for key, value in values.items():
        if not value.is_floating_point():
            raise EncoderError(f"{source} holds {value.dtype} in {key}; weights must be floating-point numbers")
    broken = [key for key, value in values.items() if not torch.isfinite(value.float()).all()]
    if broken:
        raise EncoderError(f"{source} holds values that are not finite in {broken[0]} ({len(broken)} tensors in all)")
    resnet.load_state_dict({**counters, **values})


def _misfit(name: str, shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
    """Returns what a file holds in place of the ``wanted`` tensors of a ``name``, and what to do."""
    found = architecture(shapes)
    if found in RESNETS and found != name:
        return f"holds the weights of a {found}, not of a {name}; use --rgb-model-name {found}"
    if found != name:
        return f"holds the weights of a {found}, but only {', '.join(RESNETS)} are built in; any other: --encoder"
    missing = sorted(key for key in wanted if key not in shapes)
    if "bn1.running_mean" in missing:
        return "holds no BatchNorm statistics, as with GroupNorm; in Python: get_resnet(…, use_group_norm=True)"
    extra = sorted(key for key in shapes if key not in wanted)
    other = [
        f"{key} is {shapes[key]}, not {wanted[key]}" for key in wanted if shapes.get(key, wanted[key]) != wanted[key]
    ]
    facts = [
        f"{len(keys)} {what} ({keys[0]})"
        for keys, what in ((missing, "missing"), (extra, "unknown"), (other, "of another shape"))
        if keys
    ]
    return f"looks like a {name}, but some of its tensors do not fit: {', '.join(facts)}; any other network: --encoder"


def backbone_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of the parameters of a ResNet without classifier."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in ResNet(name).named_parameters()}


def as_backbone(module: nn.Module) -> nn.Module:
    """Converts a torchvision ResNet to ``ResNet``, which can be cut; returns other modules unchanged."""
    if type(module) is not TorchvisionResNet:
        return module
    shapes = {key: tuple(value.shape) for key, value in module.named_parameters() if not key.startswith("fc.")}
    for name in RESNETS:
        if backbone_shapes(name) == shapes:
            resnet = ResNet(name)
            resnet.load_state_dict(module.state_dict())
            return resnet
    raise EncoderError(
        f"only {', '.join(RESNETS)} of torchvision's ResNets are supported; set fc = Identity() and wrap the module"
    )
