"""Options of an image encoder, and the encoders that they define."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cache_pipeline.errors import ConfigError, OptionError
from cache_pipeline.options import ENCODER, Option, image_shape

if TYPE_CHECKING:
    from cache_pipeline.encoders.image_encoder import EncoderSpec
    from cache_pipeline.encoders.preprocess import Preprocess


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """One image encoder for all cameras, and the preprocessing of its frames."""

    rgb_model_name: Annotated[str, Option("resnet18, resnet34 or resnet50.", ENCODER)] = "resnet18"
    pretrained_encoder: Annotated[
        bool,
        Option("ImageNet weights, or seeded random ones.", ENCODER, "--pretrained-encoder/--no-pretrained-encoder"),
    ] = True
    weights: Annotated[Path | None, Option("Weights from a .pth or .safetensors file.", ENCODER)] = None
    encoder: Annotated[
        str | None, Option("Any encoder: module_or_file.py:factory returning an nn.Module.", ENCODER)
    ] = None
    cut: Annotated[str, Option("Cached layer: avgpool, layer4, layer3, layer2 or layer1.", ENCODER)] = "avgpool"
    imagenet_norm: Annotated[
        bool | None,
        Option(
            "ImageNet mean and std; on unless the weights are random.", ENCODER, "--imagenet-norm/--no-imagenet-norm"
        ),
    ] = None
    resize_shape: Annotated[
        tuple[int, int] | None,
        Option("Height,width after resizing, in pixels.", ENCODER, typed=str, parse=image_shape),
    ] = None
    crop_shape: Annotated[
        tuple[int, int] | None, Option("Height,width of the crop, in pixels.", ENCODER, typed=str, parse=image_shape)
    ] = None

    flip: Annotated[
        bool,
        Option("Turn frames upside down; inspect says when a dataset stores them so.", ENCODER, "--flip/--no-flip"),
    ] = False

    def spec(self, seed: int) -> "EncoderSpec":
        """Returns the encoder; ``weights`` overrides ``pretrained_encoder``.

        Args:
            seed: seed of random weights.
        """
        from cache_pipeline.encoders.image_encoder import EncoderSpec

        source = (
            str(self.weights) if self.weights is not None else ("imagenet" if self.pretrained_encoder else "random")
        )
        return EncoderSpec(
            rgb_model_name=self.rgb_model_name, weights=source, seed=seed, cut=self.cut, factory=self.encoder
        )

    def preprocess(self, spec: "EncoderSpec") -> "Preprocess":
        """Returns the preprocessing of an encoder; ImageNet normalisation is on unless its weights are random."""
        from cache_pipeline.encoders.preprocess import Preprocess

        norm = spec.weights != "random" if self.imagenet_norm is None else self.imagenet_norm
        return Preprocess(
            resize_shape=self.resize_shape, crop_shape=self.crop_shape, imagenet_norm=norm, flip=self.flip
        )

    def for_cameras(
        self, chosen: list[str] | None, seed: int
    ) -> "tuple[EncoderSpec | dict[str, EncoderSpec], Preprocess | dict[str, Preprocess]]":
        """Reads ``CAMERA=MODEL[@WEIGHTS]`` for some cameras; all others get the encoder of the options.

        ``WEIGHTS`` is a file, ``imagenet`` or ``random``; the default is ``imagenet``.
        """
        spec = self.spec(seed)
        preprocess = self.preprocess(spec)
        if not chosen:
            return spec, preprocess
        specs, preprocesses = {"": spec}, {"": preprocess}
        for text in chosen:
            match = re.fullmatch(r"([^=]+)=([^@]+)(?:@(.+))?", text)
            if match is None:
                raise ConfigError(f"--camera-encoder {text!r}: write CAMERA=MODEL or CAMERA=MODEL@WEIGHTS")
            camera, model, weights = match.groups()
            if camera in specs:
                raise OptionError(f"--camera-encoder names {camera} twice, but only one counts; give it once")
            specs[camera] = replace(
                spec, rgb_model_name=model, weights=weights or "imagenet", cut=self.cut, factory=None
            )
            preprocesses[camera] = self.preprocess(specs[camera])
        return specs, preprocesses
