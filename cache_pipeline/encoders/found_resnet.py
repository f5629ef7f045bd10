"""Finds ResNets among the tensors of weights files, at any nesting and under any prefix."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cache_pipeline.encoders.weights import state_digest
from cache_pipeline.encoders.weights_file import dotted, read_weights
from cache_pipeline.errors import EncoderError, counted
from cache_pipeline.progress import logger
from cache_pipeline.text import listed

STAGES = ("layer1", "layer2", "layer3", "layer4")
# First convolution and its normalisation in a network whose stages are named; in an nn.Sequential all have numbers.
STEMS = (("conv1", "bn1"), ("layer0.0", "layer0.1"), ("stem.0", "stem.1"))
FIRST_BLOCK = re.compile(r"(?:(?P<prefix>.*)\.)?(?P<stage>layer1|[0-9]{1,4})\.0\.conv1\.weight")
BASIC = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34"}
BOTTLENECK = {(3, 4, 6, 3): "50", (3, 4, 23, 3): "101", (3, 8, 36, 3): "152"}
# Shape of layer1.0.conv2.weight without its kernel → what stands before and after the depth in torchvision's name.
WIDTHS = {
    (64, 64): ("resnet", ""),
    (128, 128): ("wide_resnet", "_2"),
    (128, 4): ("resnext", "_32x4d"),
    (256, 8): ("resnext", "_32x8d"),
    (256, 4): ("resnext", "_64x4d"),
}
# Who trained the weights → what is known of the normalisation of their frames. R3M: r3m/models/models_r3m.py,
# VIP: vip/models/model_vip.py, robomimic: process_frame in robomimic/utils/obs_utils.py.
NORMALIZED = {
    "R3M or VIP": "R3M and VIP take 0-255 and normalise with ImageNet's mean and std in their own code; "
    "the same is the default here",
    "robomimic": "robomimic trains on pixels on 0-1 without normalisation; the same is the default here; "
    "else: --imagenet-norm, or --image-mean and --image-std",
    "unknown": "the file does not say how its frames were normalised; ImageNet's mean and std are the default; "
    "else: --no-imagenet-norm, or --image-mean and --image-std",
}
MOST_NAMED = 6
MOST_SIGNS = 44  # with an architecture, below the length from which messages shorten a name
TOP = "."


class FoundResNet(NamedTuple):
    """A ResNet in a weights file.

    Attributes:
        prefix: what its names begin with in the file, without the last dot; empty at the top level.
        state: its tensors under torchvision's names, without a classifier.
        beside: part of the file that does not belong to it → number of tensors.
    """

    prefix: str
    state: dict[str, Tensor]
    beside: dict[str, int]

    @property
    def origin(self) -> str:
        """Who trained it, as far as its prefix shows: a key of ``NORMALIZED``."""
        if self.prefix.split(".")[-1] == "convnet":
            return "R3M or VIP"
        return "robomimic" if "obs_nets" in self.prefix.split(".") else "unknown"


def choose_resnet(path: str | Path, prefix: str | None = None) -> FoundResNet:
    """Reads the ResNet of a weights file.

    Args:
        path: the file.
        prefix: what its names begin with, or some parts of that in their order; ``.`` is the top level. ``None``: the
            file holds one ResNet, or equal copies of one.

    Raises:
        EncoderError: as ``read_weights``; or the file holds no ResNet, several, or none under ``prefix``.
    """
    tensors = read_weights(path)
    found = find_resnets(tensors)
    if not found:
        names = listed(tensors, limit=MOST_NAMED)
        raise EncoderError(
            f"{path} holds no ResNet with torchvision's layers; its tensors are named {names}; "
            f"any other network: --encoder FILE.py:FACTORY"
        )
    chosen = found if prefix is None else _matching(found, prefix)
    if not chosen:
        raise EncoderError(
            f"{path} holds no ResNet under {prefix!r}; --weights-prefix takes one of: {_options(found, found)}"
        )
    if len(chosen) > 1:
        said = f"{path} holds several ResNets: {_options(chosen, found)}; "
        if len({state_digest(one.state) for one in chosen}) > 1:
            raise EncoderError(f"{said}choose one, for example with --weights-prefix {_typable(chosen[0], found)}")
        logger.info("%sall are equal, and the first is used; --weights-prefix chooses another", said)
    return chosen[0]


def _matching(found: list[FoundResNet], prefix: str) -> list[FoundResNet]:
    """Returns those with exactly this prefix, else those that have its parts side by side, else in this order."""
    wanted = dotted(prefix)
    exact = [one for one in found if one.prefix == wanted]
    beside = [one for one in found if f".{wanted}." in f".{one.prefix}."]
    return exact or beside or [one for one in found if _in_order(wanted.split("."), one.prefix.split("."))]


def _in_order(some: list[str], parts: list[str]) -> bool:
    rest = iter(parts)
    return all(part in rest for part in some)


def _options(shown: list[FoundResNet], found: list[FoundResNet]) -> str:
    return listed(f"{_typable(one, found)} ({architecture(shapes_of(one.state))})" for one in shown)


def _typable(one: FoundResNet, found: list[FoundResNet]) -> str:
    """Returns a prefix that chooses ``one``: the whole, or a few of its parts if messages would shorten the whole."""
    parts = one.prefix.split(".")
    few = (".".join(reversed(some)) for count in (1, 2, 3) for some in combinations(parts[::-1], count))
    chosen = (some for some in few if [other.prefix for other in _matching(found, some)] == [one.prefix])
    return (one.prefix if len(one.prefix) <= MOST_SIGNS else next(chosen, one.prefix)) or TOP


def log_found(path: str | Path, found: FoundResNet) -> None:
    """Logs where a ResNet was found in a file, what else the file holds, and how frames are normalised for it."""
    parts = [f"{part} ({counted(count, 'tensor')})" for part, count in found.beside.items()]
    place = f"under {found.prefix}" if found.prefix else "at the top level"
    rest = f"; not used: {listed(parts, limit=MOST_NAMED)}" if parts else ""
    logger.info("%s: %s %s%s", Path(path).name, architecture(shapes_of(found.state)), place, rest)
    logger.info("%s: %s", Path(path).name, NORMALIZED[found.origin])


def find_resnets(tensors: Mapping[str, Tensor]) -> list[FoundResNet]:
    """Returns every ResNet among tensors, in their order."""
    stages: dict[str, list[str]] = {}
    for name in tensors:
        if match := FIRST_BLOCK.fullmatch(name):
            stages.setdefault(match["prefix"] or "", []).append(match["stage"])
    found = []
    for prefix, names in stages.items():
        start = f"{prefix}." if prefix else ""
        under = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
        parts = _named_parts(under) if "layer1" in names else _numbered_parts(names, under)
        if parts:
            own = {name: torchvisions for name in under if (torchvisions := _renamed(name, parts))}
            state = {torchvisions: under[name] for name, torchvisions in own.items()}
            beside = [name for name in tensors if name.removeprefix(start) not in own or not name.startswith(start)]
            found.append(FoundResNet(prefix, state, _grouped(beside, prefix)))
    return found


def _named_parts(under: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns part of the network in the file → torchvision's name of it; nothing if its stem is unknown."""
    for conv, norm in STEMS:
        if f"{conv}.weight" in under and f"{norm}.weight" in under:
            return {conv: "conv1", norm: "bn1", **dict(zip(STAGES, STAGES, strict=True))}
    return {}


def _numbered_parts(stages: list[str], under: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the same for an ``nn.Sequential`` of the layers of a ResNet, whose names are numbers."""
    numbers = sorted(map(int, stages))
    stem = {number: under.get(f"{number}.weight", torch.empty(())) for number in range(numbers[0])}
    convs, norms = ([str(number) for number, value in stem.items() if value.dim() == dims] for dims in (4, 1))
    if len(numbers) != len(STAGES) or len(convs) != 1 or len(norms) != 1:
        return {}
    return {convs[0]: "conv1", norms[0]: "bn1", **dict(zip(map(str, numbers), STAGES, strict=True))}


def _renamed(name: str, parts: Mapping[str, str]) -> str | None:
    for part, torchvisions in parts.items():
        if name.startswith(f"{part}."):
            return torchvisions + name.removeprefix(part)
    return None


def _grouped(names: list[str], prefix: str) -> dict[str, int]:
    """Counts names by their beginning up to the first part in which they differ from ``prefix``."""
    counts: Counter[str] = Counter()
    own = prefix.split(".") if prefix else []
    for name in names:
        parts = name.split(".")
        shared = next((at for at, (a, b) in enumerate(zip(own, parts, strict=False)) if a != b), len(own))
        counts[".".join(parts[: shared + 1])] += 1
    return dict(counts)


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Returns name → shape of each tensor."""
    return {name: tuple(value.shape) for name, value in state.items()}


def architecture(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Returns torchvision's name of the ResNet with tensors of these names and shapes, or a description."""
    blocks = Counter(name.split(".")[0] for name in shapes if re.fullmatch(r"layer[1-4]\.\d+\.conv1\.weight", name))
    depths = (blocks["layer1"], blocks["layer2"], blocks["layer3"], blocks["layer4"])
    if "layer1.0.conv3.weight" not in shapes:
        return BASIC.get(depths) or f"ResNet of {depths} basic blocks"
    out, into, *_ = *shapes.get("layer1.0.conv2.weight", ()), 0, 0
    width = WIDTHS.get((out, into))
    if width is None or depths not in BOTTLENECK:
        return f"ResNet of {depths} bottleneck blocks"
    return f"{width[0]}{BOTTLENECK[depths]}{width[1]}"
