"""What to extract, from where and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from cache_pipeline.cache.manifest import STORE_DTYPES
from cache_pipeline.encoders.image_encoder import EncoderSpec
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.encoders.views import ViewSpec
from cache_pipeline.errors import ConfigError, available

Item = TypeVar("Item")

OTHERS = ""
PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
PRECISION_BOUND = 0.05


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """One extraction."""

    datasets: tuple[Path, ...]
    """robomimic HDF5 files, read as one list of demos."""
    out: Path | str
    """Folder of the cache."""
    cameras: tuple[str, ...] | None = None
    """rgb obs keys; all that the files have by default. Those that the cache has already are kept too."""
    low_dim_keys: tuple[str, ...] | None = None
    filter_key: str | None = None
    """Take the demos of this filter key; every demo by default."""
    encoders: EncoderSpec | Mapping[str, EncoderSpec] = field(default_factory=EncoderSpec)
    """One encoder for all cameras, or camera → encoder; of a mapping, the key ``""`` is that of all other cameras."""
    preprocess: Preprocess | Mapping[str, Preprocess] = field(default_factory=Preprocess)
    views: int = 1
    """Views K of every frame; the first is the clean one. A cache that has more keeps them."""
    view_spec: ViewSpec = field(default_factory=ViewSpec)
    device: str = "auto"
    precision: str = "auto"
    """What the encoder computes in; ``auto``: the device's fastest whose features are within ``precision_bound``."""
    precision_bound: float = PRECISION_BOUND
    """Largest error of stored features against float32, as a share of their variation over frames."""
    store_dtype: str = "float16"
    batch_size: int | None = None
    """Frames per batch; by default that of the cache, else chosen for the device."""
    shard_rows: int | None = None
    """Rows of a unit of work; by default that of the cache, else chosen by size."""
    overwrite: bool = False
    """Make the cache anew; the old one stays until the new one is complete."""
    deep: bool = False
    """Read every frame again instead of trusting the size and time of source files."""

    def __post_init__(self) -> None:
        given = (self.datasets,) if isinstance(self.datasets, str | Path) else self.datasets
        object.__setattr__(self, "datasets", tuple(Path(path) for path in given))
        if not self.datasets:
            raise ConfigError("no dataset is given; type: extract-features DATASET.hdf5 --out NAME.zarr")
        if self.cameras == ():
            raise ConfigError("no cameras are left; name at least one with --cameras, or leave it out for all")
        for name, value in (("views", self.views), ("batch-size", self.batch_size), ("shard-rows", self.shard_rows)):
            if value is not None and value < 1:
                raise ConfigError(f"--{name} is {value}; it must be at least 1")
        if not self.precision_bound > 0:
            raise ConfigError(f"--precision-bound is {self.precision_bound}; it must be positive, such as 0.05")
        for name, text, choices in (
            ("precision", self.precision, PRECISIONS),
            ("store-dtype", self.store_dtype, STORE_DTYPES),
        ):
            if text not in choices:
                raise ConfigError(f"--{name} is {text!r}; {available(choices, text)}")

    def encoder_for(self, camera: str) -> EncoderSpec:
        """The encoder of one camera."""
        return _of_camera(self.encoders, camera, "encoder")

    def preprocess_for(self, camera: str) -> Preprocess:
        """The preprocessing of one camera."""
        return _of_camera(self.preprocess, camera, "preprocessing")


def _of_camera(value: Item | Mapping[str, Item], camera: str, what: str) -> Item:
    if not isinstance(value, Mapping):
        return value
    if camera not in value and OTHERS not in value:
        raise ConfigError(f"no {what} is given for camera {camera}; {available(value, camera)}")
    return value[camera] if camera in value else value[OTHERS]
