"""Options of ``extract-features``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from cache_pipeline.encoders.view_spec import ViewSpec
from cache_pipeline.errors import ConfigError, available
from cache_pipeline.options import DATA, ENCODER, OUTPUT, RUNNING, Option, check, names

if TYPE_CHECKING:
    from cache_pipeline.encoders.image_encoder import EncoderSpec
    from cache_pipeline.encoders.preprocess import Preprocess

Item = TypeVar("Item")

OTHERS = ""
PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
PRECISION_BOUND = 0.05
STORE_DTYPES = ("float16", "float32")


def _encoder_spec() -> Any:
    from cache_pipeline.encoders.image_encoder import EncoderSpec

    return EncoderSpec()


def _preprocess() -> Any:
    from cache_pipeline.encoders.preprocess import Preprocess

    return Preprocess()


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """One extraction."""

    datasets: tuple[Path, ...]
    """HDF5 files or LeRobot folders, read as one list of demos."""
    out: Path | str
    """Folder of the cache."""
    cameras: Annotated[
        tuple[str, ...] | None, Option("Cameras, comma-separated; all by default.", DATA, typed=str, parse=names)
    ] = None
    """rgb obs keys. Cameras that the cache already has are kept."""
    low_dim_keys: Annotated[
        tuple[str, ...] | None,
        Option("Low-dim obs keys, comma-separated, or none; proprioception by default.", DATA, typed=str, parse=names),
    ] = None
    action_key: Annotated[
        tuple[str, ...] | None,
        Option(
            "Arrays of the actions, comma-separated, side by side; actions by default.", DATA, typed=str, parse=names
        ),
    ] = None
    filter_key: Annotated[str | None, Option("Only the demos of this filter key; all by default.", DATA)] = None
    deep: Annotated[bool, Option("Read every frame again instead of trusting size and time.", DATA)] = False
    encoders: "EncoderSpec | Mapping[str, EncoderSpec]" = field(default_factory=_encoder_spec)
    """One encoder for all cameras, or camera → encoder, where the key ``""`` stands for all other cameras."""
    preprocess: "Preprocess | Mapping[str, Preprocess]" = field(default_factory=_preprocess)
    views: Annotated[int, Option("Fixed views of every frame; the first is clean.", ENCODER, least=1, most=10000)] = 1
    """A cache with more views keeps them."""
    view_spec: ViewSpec = field(default_factory=ViewSpec)
    device: Annotated[str, Option("auto, cpu or cuda:0.", RUNNING)] = "auto"
    precision: Annotated[str, Option("auto, fp32, tf32, bf16 or fp16.", RUNNING, choices=PRECISIONS)] = "auto"
    """Precision of the encoder; ``auto``: the fastest of the device whose error is within ``precision_bound``."""
    precision_bound: Annotated[
        float,
        Option("Largest error of features, over their variation, that auto accepts.", RUNNING, above=0),
    ] = PRECISION_BOUND
    """Largest error of stored features relative to float32, as a fraction of their variation over frames."""
    batch_size: Annotated[int | None, Option("Images per batch.", RUNNING, least=1)] = None
    """Default: as in the cache, else chosen for the device."""
    store_dtype: Annotated[str, Option("float16 or float32.", OUTPUT, choices=STORE_DTYPES)] = "float16"
    shard_rows: Annotated[int | None, Option("Rows per unit of work.", OUTPUT, least=1, most=1 << 20)] = None
    """Default: as in the cache, else chosen by size."""
    overwrite: Annotated[bool, Option("Replace the cache once the new one is complete.", OUTPUT)] = False

    def __post_init__(self) -> None:
        given = (self.datasets,) if isinstance(self.datasets, str | Path) else self.datasets
        object.__setattr__(self, "datasets", tuple(Path(path) for path in given))
        if not self.datasets:
            raise ConfigError("no dataset is given; type: extract-features DATASET.hdf5 --out NAME.zarr")
        if self.cameras == ():
            raise ConfigError("no cameras are given; name at least one with --cameras, or leave it out for all")
        check(self)

    def encoders_of_cameras(self) -> "tuple[EncoderSpec, ...]":
        """Returns the encoders that are used whatever cameras there are: not one for all cameras without their own."""
        if not isinstance(self.encoders, Mapping):
            return (self.encoders,)
        return tuple(spec for camera, spec in self.encoders.items() if camera != OTHERS)

    def encoder_for(self, camera: str) -> "EncoderSpec":
        """Returns the encoder of one camera."""
        return _of_camera(self.encoders, camera, "encoder")

    def preprocess_for(self, camera: str) -> "Preprocess":
        """Returns the preprocessing of one camera."""
        return _of_camera(self.preprocess, camera, "preprocessing")


def _of_camera(value: Item | Mapping[str, Item], camera: str, what: str) -> Item:
    if not isinstance(value, Mapping):
        return value
    if camera not in value and OTHERS not in value:
        raise ConfigError(f"no {what} is given for camera {camera}; {available(value, camera)}")
    return value[camera] if camera in value else value[OTHERS]
