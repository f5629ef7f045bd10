"""Options that several commands share, and the parsers of their values."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache_pipeline.errors import ConfigError, OptionError

if TYPE_CHECKING:
    from cache_pipeline.encoders.image_encoder import EncoderSpec
    from cache_pipeline.encoders.preprocess import Preprocess

BYTE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def names(text: str | None) -> tuple[str, ...] | None:
    """``"a,b"`` as ``("a", "b")``; nothing given is ``None``."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def shape(text: str | None) -> tuple[int, int] | None:
    """``"76,76"`` (or ``76x76``) as (height, width) in pixels."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)[,x](\d+)", text.strip())
    if match is None or "0" in match.groups():
        raise ConfigError(f"{text!r} is no image shape; write height and width in pixels, such as 76,76")
    return int(match[1]), int(match[2])


def byte_count(text: str | None) -> int | None:
    """``"512MiB"``, ``"2g"`` or ``"1000000"`` as a number of bytes."""
    if text is None:
        return None
    match = re.fullmatch(r"([\d.]+)\s*([kmg]?i?)b?", text.strip().lower())
    if match is None or match[2] not in BYTE_UNITS:
        raise ConfigError(f"{text!r} is no size; write bytes or a unit, such as 800MB or 2GiB")
    return int(float(match[1]) * BYTE_UNITS[match[2]])


def encoder_spec(
    *, rgb_model_name: str, pretrained: bool, weights: Path | None, encoder: str | None, cut: str, seed: int
) -> EncoderSpec:
    """The encoder that the flags describe; ``--weights`` beats ``--pretrained-encoder``."""
    from cache_pipeline.encoders.image_encoder import EncoderSpec

    source = str(weights) if weights is not None else ("imagenet" if pretrained else "random")
    return EncoderSpec(rgb_model_name=rgb_model_name, weights=source, seed=seed, cut=cut, factory=encoder)


def preprocessing(
    *, resize_shape: str | None, crop_shape: str | None, imagenet_norm: bool | None, spec: EncoderSpec
) -> Preprocess:
    """The preprocessing that the flags describe; ImageNet normalisation is on unless the weights are random."""
    from cache_pipeline.encoders.preprocess import Preprocess

    norm = spec.weights != "random" if imagenet_norm is None else imagenet_norm
    return Preprocess(resize_shape=shape(resize_shape), crop_shape=shape(crop_shape), imagenet_norm=norm)


def camera_encoders(
    chosen: list[str] | None, spec: EncoderSpec, preprocess: Preprocess, imagenet_norm: bool | None, cut: str
) -> tuple[EncoderSpec | dict[str, EncoderSpec], Preprocess | dict[str, Preprocess]]:
    """``CAMERA=MODEL[@WEIGHTS]`` for some cameras, ``spec`` and ``preprocess`` for all others.

    ``WEIGHTS`` is a file, ``imagenet`` or ``random``; without it, ``imagenet``.
    """
    from dataclasses import replace

    if not chosen:
        return spec, preprocess
    specs, preprocesses = {"": spec}, {"": preprocess}
    for text in chosen:
        match = re.fullmatch(r"([^=]+)=([^@]+)(?:@(.+))?", text)
        if match is None:
            raise ConfigError(f"--camera-encoder {text!r}: write CAMERA=MODEL or CAMERA=MODEL@WEIGHTS")
        camera, model, weights = match.groups()
        if camera in specs:
            raise OptionError(f"--camera-encoder names {camera} twice and only one would count: give it once")
        specs[camera] = replace(spec, rgb_model_name=model, weights=weights or "imagenet", cut=cut, factory=None)
        norm = specs[camera].weights != "random" if imagenet_norm is None else imagenet_norm
        preprocesses[camera] = replace(preprocess, imagenet_norm=norm)
    return specs, preprocesses


def emit(as_json: bool, value: dict[str, Any], lines: list[str]) -> None:
    """Prints one JSON object, or the lines for a person, to stdout."""
    if as_json:
        typer.echo(json.dumps(value, allow_nan=False))
    else:
        for line in lines:
            typer.echo(line)


Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else there.")]
Datasets = Annotated[list[Path] | None, typer.Option("--dataset", help="A robomimic HDF5 file; may be repeated.")]
Cameras = Annotated[str | None, typer.Option("--cameras", help="Cameras, comma-separated; all by default.")]
LowDimKeys = Annotated[
    str | None, typer.Option("--low-dim-keys", help="Low-dim obs keys, comma-separated; proprioception by default.")
]
FilterKey = Annotated[str | None, typer.Option("--filter-key", help="Only the demos of this filter key.")]
ValidKey = Annotated[str | None, typer.Option("--valid-key", help="Filter key of the held-out demos.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda:0.")]
Precision = Annotated[str, typer.Option("--precision", help="auto, fp32, tf32, bf16 or fp16.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything that is random.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there once the new is complete.")]

RgbModelName = Annotated[str, typer.Option("--rgb-model-name", help="resnet18, resnet34 or resnet50.")]
Pretrained = Annotated[
    bool, typer.Option("--pretrained-encoder/--no-pretrained-encoder", help="ImageNet weights, or seeded random ones.")
]
Weights = Annotated[Path | None, typer.Option("--weights", help="Encoder weights from a .pth or .safetensors file.")]
Encoder = Annotated[
    str | None, typer.Option("--encoder", help="Any encoder: module_or_file.py:factory returning an nn.Module.")
]
StoredEncoder = Annotated[
    str | None,
    typer.Option("--encoder", help="The encoder's factory, for those made by one: it runs only if it is named here."),
]
ImagenetNorm = Annotated[
    bool | None,
    typer.Option("--imagenet-norm/--no-imagenet-norm", help="ImageNet mean and std; on unless the weights are random."),
]
Cut = Annotated[str, typer.Option("--cut", help="Cached layer: avgpool, layer4, layer3, layer2 or layer1.")]
CropShape = Annotated[str | None, typer.Option("--crop-shape", help="Height,width of the crop, in pixels.")]
ResizeShape = Annotated[str | None, typer.Option("--resize-shape", help="Height,width after resizing, in pixels.")]
ShareRgbModel = Annotated[
    bool, typer.Option("--share-rgb-model/--no-share-rgb-model", help="One encoder for all cameras, or one each.")
]
