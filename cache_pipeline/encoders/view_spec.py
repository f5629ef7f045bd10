"""Distribution of augmented views."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Self

from cache_pipeline.errors import ConfigError, EncoderError
from cache_pipeline.files import typed
from cache_pipeline.options import ENCODER, Option, check


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """Distribution of views 1, 2, …; colour ranges as in torchvision's ``ColorJitter``.

    Brightness, contrast and saturation are multiplied by factors from [1 - x, 1 + x]; the hue rotates by [-x, x] turns.
    """

    seed: int = 0
    random_crop: Annotated[
        bool, Option("Crop at random in augmented views.", ENCODER, "--random-crop/--no-random-crop")
    ] = True
    """Whether the crop position is random; ``crop_shape`` of the preprocessing sets its size."""
    brightness: Annotated[float, Option("Jitter of the brightness.", ENCODER, least=0, most=1)] = 0.3
    contrast: Annotated[float, Option("Jitter of the contrast.", ENCODER, least=0, most=1)] = 0.3
    saturation: Annotated[float, Option("Jitter of the saturation.", ENCODER, least=0, most=1)] = 0.3
    hue: Annotated[float, Option("Jitter of the hue, in turns.", ENCODER, least=0, most=0.5)] = 0.05

    def __post_init__(self) -> None:
        check(self)
        if not self.random_crop and not any((self.brightness, self.contrast, self.saturation, self.hue)):
            raise ConfigError("views: without random crop and colour jitter all views are equal to the clean view")

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object, which is part of a cache's identity."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Inverts ``to_json``; raises EncoderError for any other value."""
        try:
            made: Self = typed(value, cls)
        except ValueError as error:
            raise EncoderError(f"the recorded augmentation cannot be read: {error}") from error
        return made
