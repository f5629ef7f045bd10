"""Options of ``extract-features``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from cache_pipeline.encoders.view_spec import ViewSpec
from cache_pipeline.errors import ConfigError, OptionError, available
from cache_pipeline.extract.parts import Part
from cache_pipeline.options import DATA, ENCODER, OUTPUT, RUNNING, Option, check, names
from cache_pipeline.text import listed

if TYPE_CHECKING:
    from cache_pipeline.encoders.image_encoder import EncoderSpec
    from cache_pipeline.encoders.preprocess import Preprocess

Item = TypeVar("Item")

OTHERS = ""
ENGINES = ("local", "ray")
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
    workers: Annotated[
        int | None, Option("Processes that encode: here, or with Ray in the cluster.", RUNNING, least=1, most=1024)
    ] = None
    """Default: this process encodes; with Ray as many actors as the cluster has room for."""
    devices: Annotated[
        tuple[str, ...] | None,
        Option("Devices that encode, one process each, such as cuda:0,cuda:1.", RUNNING, typed=str, parse=names),
    ] = None
    part: Annotated[
        Part | None,
        Option("Only this part, such as 3/16, or auto in a job array.", RUNNING, typed=str, parse=Part.parse),
    ] = None
    """Parts are numbered from 1. Whichever part finds the units of all parts done completes the cache."""
    finish: Annotated[bool, Option("Encode nothing; complete a cache whose parts are all done.", RUNNING)] = False
    engine: Annotated[str, Option("local, or ray for a cluster.", RUNNING, choices=ENGINES)] = "local"
    ray_address: Annotated[str | None, Option("HOST:PORT of a Ray cluster; default: RAY_ADDRESS.", RUNNING)] = None
    """Default: the environment's ``RAY_ADDRESS``, else a cluster is started on this machine."""
    allow_other_device: Annotated[bool, Option("Add features of this device to those of another one.", RUNNING)] = False
    """Bits of features may differ between devices, so by default a cache keeps to those that it was made on."""

    def __post_init__(self) -> None:
        given = (self.datasets,) if isinstance(self.datasets, str | Path) else self.datasets
        object.__setattr__(self, "datasets", tuple(Path(path) for path in given))
        if not self.datasets:
            raise ConfigError("no dataset is given; type: extract-features DATASET.hdf5 --out NAME.zarr")
        if self.cameras == ():
            raise ConfigError("no cameras are given; name at least one with --cameras, or leave it out for all")
        if isinstance(self.part, str):
            object.__setattr__(self, "part", Part.parse(self.part))
        check(self)
        check_engine(self)

    @property
    def in_parts(self) -> bool:
        """Whether several processes write the cache, each with a lock of its own that they share."""
        return self.part is not None or self.finish or (self.engine == "ray" and not self.overwrite)

    @property
    def in_this_process(self) -> bool:
        """Whether this process encodes."""
        return self.engine == "local" and self.devices is None and (self.workers or 1) == 1

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


def check_engine(config: ExtractConfig) -> None:
    """Raises OptionError for options of engines that contradict each other."""
    if config.part is not None and config.finish:
        raise OptionError("--part and --finish contradict each other: --finish encodes nothing; leave one out")
    in_parts = config.part is not None or config.finish
    if config.overwrite and in_parts:
        raise OptionError(
            "--overwrite does not work in parts, which could not agree on the moment to replace the cache; remove the "
            "old cache first, or give another --out"
        )
    if config.engine == "ray" and (in_parts or config.devices):
        given = "--devices" if config.devices else "--part" if config.part else "--finish"
        raise OptionError(f"--engine ray hands out units and devices by itself; leave {given} out")
    if config.devices is not None and config.workers is not None:
        raise OptionError("--devices starts one process per device; leave --workers out")
    if config.devices is not None and len(set(config.devices)) < len(config.devices):
        raise OptionError(
            f"--devices names {listed(config.devices)}: name each device once, or give --device with --workers for "
            "several processes on one device"
        )
    if config.devices == ():
        raise OptionError("--devices names no device; name at least one, such as cpu or cuda:0")


def _of_camera(value: Item | Mapping[str, Item], camera: str, what: str) -> Item:
    if not isinstance(value, Mapping):
        return value
    if camera not in value and OTHERS not in value:
        raise ConfigError(f"no {what} is given for camera {camera}; {available(value, camera)}")
    return value[camera] if camera in value else value[OTHERS]
