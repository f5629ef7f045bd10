"""Options of an image encoder, and the encoders that they define."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cache_pipeline.errors import ConfigError, OptionError
from cache_pipeline.options import ENCODER, Channels, Option, channels, image_shape

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
    weights_prefix: Annotated[
        str | None, Option("Beginning of the names of one of several ResNets in the file of --weights.", ENCODER)
    ] = None
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
    image_mean: Annotated[
        Channels | None,
        Option("R,G,B mean of pixels on 0-1, instead of ImageNet's.", ENCODER, typed=str, parse=channels),
    ] = None
    image_std: Annotated[
        Channels | None,
        Option("R,G,B standard deviation; 1/255,1/255,1/255 gives 0-255.", ENCODER, typed=str, parse=channels),
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

    def __post_init__(self) -> None:
        if (self.image_mean is None) != (self.image_std is None):
            raise OptionError("--image-mean and --image-std belong together; give both")
        if self.image_std is not None and min(self.image_std) <= 0:
            raise OptionError(f"--image-std {','.join(map(str, self.image_std))} must be above 0")

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
            rgb_model_name=self.rgb_model_name,
            weights=source,
            weights_prefix=self.weights_prefix,
            seed=seed,
            cut=self.cut,
            factory=self.encoder,
        )

    def preprocess(self, spec: "EncoderSpec") -> "Preprocess":
        """Returns the preprocessing of an encoder.

        Without an option for it, normalisation is what the encoder declares, else ImageNet's; it is off for random
        weights.
        """
        from cache_pipeline.encoders.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess

        mean, std = self.image_mean, self.image_std
        if mean is None and self.imagenet_norm and spec.factory is None:
            mean, std = IMAGENET_MEAN, IMAGENET_STD
        norm = spec.weights != "random" if self.imagenet_norm is None else self.imagenet_norm
        return Preprocess(self.resize_shape, self.crop_shape, norm, mean, std, flip=self.flip)

    def for_cameras(
        self, chosen: list[str] | None, seed: int
    ) -> "tuple[EncoderSpec | dict[str, EncoderSpec], Preprocess | dict[str, Preprocess]]":
        """Reads ``CAMERA=MODEL[@WEIGHTS[#PREFIX]]`` for some cameras; all others get the encoder of the options.

        ``WEIGHTS`` is a file, ``imagenet`` or ``random``; the default is ``imagenet``. ``PREFIX`` is as
        ``weights_prefix``.
        """
        spec = self.spec(seed)
        preprocess = self.preprocess(spec)
        if not chosen:
            return spec, preprocess
        specs, preprocesses = {"": spec}, {"": preprocess}
        for text in chosen:
            match = re.fullmatch(r"([^=]+)=([^@]+)(?:@(.+?)(?:#([^#/]+))?)?", text)
            if match is None:
                forms = "CAMERA=MODEL, CAMERA=MODEL@WEIGHTS or CAMERA=MODEL@WEIGHTS#PREFIX"
                raise ConfigError(f"--camera-encoder {text!r}: write {forms}")
            camera, model, weights, prefix = match.groups()
            if camera in specs:
                raise OptionError(f"--camera-encoder names {camera} twice, but only one counts; give it once")
            specs[camera] = replace(
                spec,
                rgb_model_name=model,
                weights=weights or "imagenet",
                weights_prefix=prefix,
                cut=self.cut,
                factory=None,
            )
            preprocesses[camera] = self.preprocess(specs[camera])
        return specs, preprocesses
