"""Unfreezes encoder layers, each from its step on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from typing import NamedTuple

from torch import nn

from cache_pipeline.encoders.cut import CUTS, STAGES, head_stages
from cache_pipeline.encoders.image_encoder import ImageEncoder
from cache_pipeline.errors import ConfigError, OptionError, available
from cache_pipeline.policies.visuomotor import VisuomotorPolicy

ALL = "all"


class Unfreezing(NamedTuple):
    """From ``step`` on ``layers`` learn, besides those that learn already."""

    step: int
    layers: tuple[str, ...]


def parse_unfreezing(unfreeze: str, schedule: str | None, steps: int) -> tuple[Unfreezing, ...]:
    """Reads ``layer4,layer3`` (all from the first step) or ``layer4@0,layer3@2000,all@5000``, in the order of steps.

    Args:
        steps: of the whole run.

    Raises:
        ConfigError: it is not of that form, or a layer would begin to learn when the run has ended.
    """
    if schedule is None:
        return (Unfreezing(0, _names(unfreeze)),)
    begins: dict[int, tuple[str, ...]] = {}
    for item in _names(schedule):
        layer, mark, step = item.partition("@")
        if not mark or not layer or not step.isdecimal():
            raise ConfigError(f"unfreeze schedule: {item!r} is not LAYER@STEP; write layer4@0,layer3@2000")
        if int(step) >= steps:
            raise ConfigError(
                f"--unfreeze-schedule has {item}, but training ends after --steps {steps}; give more steps, or begin "
                f"{layer} earlier"
            )
        begins[int(step)] = (*begins.get(int(step), ()), layer)
    return tuple(Unfreezing(step, begins[step]) for step in sorted(begins))


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise ConfigError("nothing is to be unfrozen; name layers such as layer4,layer3, or all")
    return names


def check_layers(policy: VisuomotorPolicy, unfreezing: tuple[Unfreezing, ...]) -> None:
    """Raises ConfigError for a layer that the encoder does not have."""
    for encoder in policy.obs_encoder.key_model_map.distinct():
        known = (ALL, *encoder.layers)
        for layer in (layer for item in unfreezing for layer in item.layers):
            if layer not in known:
                raise ConfigError(
                    f"{encoder.architecture} has no layer {layer!r} to unfreeze; {available(known, layer)}"
                )


def check_freeze(policy: VisuomotorPolicy, unfreezing: tuple[Unfreezing, ...], freeze: str | None) -> None:
    """Raises OptionError if a pattern freezes nothing, or if the patterns freeze all that would learn."""
    layers = {layer for item in unfreezing for layer in item.layers}
    names = dict.fromkeys(_inner(name) for name, _ in policy.encoder_parameters())
    learning = [name for name in names if ALL in layers or name.split(".")[0] in layers]
    patterns = _names(freeze) if freeze else ()
    if freeze and not patterns:
        raise OptionError(f"--freeze {freeze} names no parameter; {available(learning)}")
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in learning):
            raise OptionError(
                f"--freeze {pattern} has no effect: it matches no parameter that is to learn; {available(learning)}"
            )
    if learning and all(any(fnmatch(name, pattern) for pattern in patterns) for name in learning):
        raise OptionError(f"--freeze {freeze} leaves nothing of the encoder to learn; take train --from-cache for that")


def above_cut(encoders: Iterable[ImageEncoder], layers: tuple[str, ...], cut: str) -> bool:
    """Whether features cached at ``cut`` stay valid while ``layers`` learn: all of them are above the cut."""
    return not layers or all(encoder.is_resnet and set(layers) <= set(head_stages(cut)) for encoder in encoders)


def frozen_cut(encoders: Iterable[ImageEncoder], layers: tuple[str, ...], cut: str) -> str | None:
    """Returns the highest cut below which nothing learns while ``layers`` do: ``cut`` if no layer learns, None if the
    lowest one does."""
    if not layers:
        return cut
    if ALL in layers or not all(encoder.is_resnet for encoder in encoders):
        return None
    below = STAGES[: min(STAGES.index(layer) for layer in layers)]
    return below[-1] if below and below[-1] in CUTS else None


def unfreeze(
    policy: VisuomotorPolicy, layers: tuple[str, ...], freeze: str | None
) -> Iterator[tuple[str, nn.Parameter]]:
    """Unfreezes ``layers`` except parameters that match a pattern of ``freeze``; returns all that learn."""
    for encoder in policy.obs_encoder.key_model_map.distinct():
        for module in [encoder] if ALL in layers else [encoder.layers[layer] for layer in layers]:
            module.requires_grad_(True)
    patterns = _names(freeze) if freeze else ()
    for name, parameter in policy.encoder_parameters():
        if any(fnmatch(_inner(name), pattern) for pattern in patterns):
            parameter.requires_grad_(False)
        elif parameter.requires_grad:
            yield name, parameter
    policy.train(policy.training)


def _inner(name: str) -> str:
    """A parameter's name within its encoder."""
    return name.split(".net.", 1)[-1]
