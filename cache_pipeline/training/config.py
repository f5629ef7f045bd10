"""What a run is asked to do: frozen dataclasses, checked when made, kept as JSON with the run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from cache_pipeline.errors import CheckpointError, ConfigError, OptionError, available
from cache_pipeline.policies.robomimic.config import PREFIX, check_name

if TYPE_CHECKING:
    from cache_pipeline.encoders.image_encoder import EncoderSpec
    from cache_pipeline.encoders.preprocess import Preprocess

SourceName = Literal["auto", "resident", "streamed", "live"]
Order = Literal["auto", "full", "block"]
ActionNormalization = Literal["minmax", "gaussian", "none"]
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
POLICIES = ("flow", "mlp", "gmm")
ROBOMIMIC_PREFIX = PREFIX

OWN_POLICY_OPTIONS = (
    "policy_options",
    "lr",
    "emb_dim",
    "action_normalization",
    "feature_noise",
    "feature_dropout",
    "rotation_6d",
    "optim",
)
# What the options mean for our own policies where nothing is given; a robomimic config says it for its algorithm.
DEFAULTS = {"batch_size": 64, "obs_horizon": 2, "action_horizon": 8}


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser: AdamW with linear warm-up, cosine decay, clipped gradients and averaged weights."""

    weight_decay: float = 1e-4
    """Decoupled decay of matrices and kernels; biases and normalisation weights have none."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from zero, at most a tenth of the run."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end of the cosine, as a share of the peak."""
    grad_clip: float | None = 1.0
    """Largest global norm of the gradient; None leaves it as it is."""
    ema: float | None = 0.995
    """Decay of the exponential moving average of the weights that evaluation and rollouts use; None keeps none."""

    def __post_init__(self) -> None:
        _at_least("weight_decay", self.weight_decay, 0)
        _at_least("warmup_steps", self.warmup_steps, 0)
        _within("min_lr_ratio", self.min_lr_ratio, 0, 1)
        if self.grad_clip is not None and not 0 < self.grad_clip < math.inf:
            raise ConfigError(f"grad_clip is {self.grad_clip}; give a positive norm, or none for no clipping")
        if self.ema is not None:
            _within("ema", self.ema, 0, 1)


@dataclass(frozen=True, kw_only=True)
class SavingConfig:
    """How often the run is logged, measured and saved. An interval of 0 means once, at the end."""

    log_every: int = 50
    """Steps between rows of metrics.csv; each row carries the mean loss since the last one."""
    eval_every: int = 500
    """Steps between measurements of the held-out action error."""
    save_every: int = 1000
    """Steps between checkpoints that can be resumed."""
    keep_best: int = 1
    """How many checkpoints with the least held-out action error are kept beside the latest."""
    eval_windows: int = 4096
    """Largest number of held-out windows that are measured; more are thinned evenly."""

    def __post_init__(self) -> None:
        _at_least("log_every", self.log_every, 1)
        for name in ("eval_every", "save_every", "keep_best"):
            _at_least(name, getattr(self, name), 0)
        _at_least("eval_windows", self.eval_windows, 1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Data come from ``cache`` or, encoded live at every step, from ``datasets``."""

    cache: Path | None = None
    """A finished feature cache. Cameras, encoder and preprocessing are those that it was made with."""
    datasets: tuple[Path, ...] = ()
    """robomimic HDF5 files; needed for live encoding. Beside a cache they must hold just what it was made from."""
    cameras: tuple[str, ...] | None = None
    """rgb obs keys; all by default."""
    low_dim_keys: tuple[str, ...] | None = None
    """Low-dim obs keys; all that the data hold by default. An empty tuple means none."""
    filter_key: str | None = None
    """Filter key of the demos to train on; ``train`` if the data have it and ``valid``, else a seeded split by demo."""
    valid_key: str | None = None
    """Filter key of the held-out demos."""
    encoder: EncoderSpec | None = None
    """The image encoder of a live run; pretrained resnet18 by default."""
    preprocess: Preprocess | None = None
    """Preprocessing of a live run; by default no resize or crop, and ImageNet normalisation with pretrained weights."""
    encoder_factory: str | None = None
    """``file.py:factory``: the factory that may run to make the encoder of the cache or of the resumed run again."""
    freeze_encoder: bool = True
    """Keep the encoder as it is. False trains it in a live run, at ``encoder_lr``."""
    share_rgb_model: bool = False
    """One encoder for all cameras when it learns; a frozen encoder is the same for all cameras anyway."""
    policy: str = "flow"
    """``flow``, ``mlp`` or ``gmm``, or ``robomimic:ALGORITHM``; see docs/robomimic.md."""
    policy_options: dict[str, Any] = field(default_factory=dict)
    """Options of the policy, such as ``{"hidden": [512, 512]}``; see the policy's config."""
    robomimic_config: Path | None = None
    """A robomimic JSON config, whose algorithm is trained with its settings."""
    steps: int = 4000
    batch_size: int | None = None
    """Windows per step; 64, or what the robomimic config says."""
    lr: float = 1e-3
    """Peak learning rate of projection and policy."""
    encoder_lr: float = 1e-5
    """Peak learning rate of an encoder that learns."""
    emb_dim: int = 256
    """Width of the projection of one obs step."""
    obs_horizon: int | None = None
    """Obs steps that the policy sees, robomimic's ``frame_stack``; 2, or what the robomimic config says."""
    action_horizon: int | None = None
    """Action steps that the policy predicts, robomimic's ``seq_length``; 8, or what the robomimic config says."""
    action_normalization: ActionNormalization = "minmax"
    augment: bool | None = None
    """Draw a view for each window in training. By default wherever the cache has more than the clean view."""
    feature_noise: float = 0.0
    """Standard deviation of Gaussian noise on features in training, in units of each camera's feature deviation."""
    feature_dropout: float = 0.0
    """Share of features set to their mean in training, the others scaled up."""
    rotation_6d: tuple[tuple[int, int], ...] = ()
    """Slices of the action vector that are axis-angle rotations in radians, such as ``((3, 6),)``; the policy predicts
    six numbers for each and acts in axis-angle."""
    source: SourceName = "auto"
    """Where features come from; ``auto`` takes resident if the cache fits ``max_memory``, else streamed."""
    order: Order = "auto"
    """Order of samples. In a ``full`` shuffle all sources see the same samples of one seed. The ``block`` shuffle,
    whose pools follow from ``max_memory``, reads each part of a cache once per epoch; ``auto`` takes it for streamed
    caches many times larger than ``max_memory``. Live runs have no block order."""
    max_memory: int | None = None
    """Bytes that features (or frames) may take on the device; by default half of what is free."""
    device: str = "auto"
    precision: Precision = "auto"
    """What a step computes encoder, projection and action head in; weights, sums and the optimiser stay in float32.
    ``auto`` is the fastest of the device: bf16, fp16 on CUDA below 8.0, fp32 on CPUs that do not multiply bfloat16.
    Cached features keep the precision that they were made in. robomimic's algorithms compute in fp32, or in tf32."""
    seed: int = 0
    wandb: str | None = None
    """A Weights & Biases project that gets the figures too."""
    out: Path | None = None
    """The run folder; ``runs/<name of the data>`` by default."""
    deep: bool = False
    """Read the source files again, to compare them with the cache, instead of trusting their size and time."""
    resume: bool = False
    overwrite: bool = False
    optim: OptimConfig = field(default_factory=OptimConfig)
    saving: SavingConfig = field(default_factory=SavingConfig)

    def __post_init__(self) -> None:
        _as_paths(self)
        if self.robomimic:
            _check_robomimic(self)
        else:
            for name, value in DEFAULTS.items():
                object.__setattr__(self, name, value if getattr(self, name) is None else getattr(self, name))
            _one_of("policy", self.policy, POLICIES)
        _check_shared(self)
        if self.cache is None and not self.datasets:
            raise ConfigError("nothing to train on: give --from-cache CACHE, or --dataset FILE to encode live")
        if self.cache is not None and self.source == "live" and not self.datasets:
            raise ConfigError("source live reads frames from HDF5: give --dataset FILE")
        if self.cache is None and self.source in ("resident", "streamed"):
            raise OptionError(f"source {self.source} reads a cache: give --from-cache CACHE")
        if not self.freeze_encoder and self.live is False:
            raise OptionError("a cache holds frozen features: to train the encoder give --dataset FILE alone")
        _check_encoder_options(self)
        for name in ("emb_dim", "obs_horizon", "action_horizon"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        _at_least("feature_noise", self.feature_noise, 0)
        _within("feature_dropout", self.feature_dropout, 0, 0.99)

    @property
    def robomimic(self) -> bool:
        """Whether one of robomimic's algorithms is trained."""
        return self.robomimic_config is not None or self.policy.startswith(ROBOMIMIC_PREFIX)

    @property
    def named_factory(self) -> str | None:
        """The factory that the user names, and that may therefore run."""
        return self.encoder_factory or (None if self.encoder is None else self.encoder.factory)

    @property
    def live(self) -> bool:
        """Whether frames are encoded at every step."""
        return self.cache is None or self.source == "live"

    def to_json(self) -> dict[str, Any]:
        return _to_json(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TrainConfig:
        """Reads what ``to_json`` wrote; raises CheckpointError on anything else."""
        return _from_json(cls, value)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Goes on from a run with the encoder live and unfrozen, wholly, by layers, or by a schedule."""

    checkpoint: Path
    """A run folder (its best checkpoint is taken) or one checkpoint folder."""
    datasets: tuple[Path, ...] = ()
    """robomimic HDF5 files; those of the run by default."""
    cache: Path | None = None
    """A frontier cache, cut where the unfrozen part begins: everything below is read from it."""
    encoder_factory: str | None = None
    """``file.py:factory``: the factory that may run to make the run's encoder again."""
    filter_key: str | None = None
    valid_key: str | None = None
    unfreeze: str = "all"
    """Layers that learn from the first step: ``all``, or names such as ``layer4,layer3``."""
    unfreeze_schedule: str | None = None
    """``layer4@0,layer3@2000,all@5000``: layers and the step at which each begins to learn; overrides ``unfreeze``."""
    freeze: str | None = None
    """Comma-separated name patterns (as in fnmatch) of encoder parameters that stay frozen whatever is unfrozen."""
    batchnorm: Literal["frozen", "update"] = "frozen"
    """Whether BatchNorm keeps its statistics or follows the batches in unfrozen layers."""
    share_rgb_model: bool = False
    steps: int = 2000
    batch_size: int = 64
    lr: float = 1e-4
    """Peak learning rate of projection and policy."""
    encoder_lr: float | None = None
    """Peak learning rate of the encoder; by default 1e-5, and less in proportion where features vary by less than their
    mean: there the same step of the weights moves a feature farther in units of its variation."""
    augment: bool = False
    """Random crop and colour jitter of live frames on the device, the same within a window."""
    accumulate: int = 1
    """Parts into which each batch is split to save memory."""
    checkpointing: bool = False
    """Recompute the encoder's activations in the backward pass to save memory."""
    source: SourceName = "auto"
    order: Order = "auto"
    max_memory: int | None = None
    device: str = "auto"
    precision: Precision = "auto"
    """As in TrainConfig, but ``auto`` is the precision in which the run's features were made."""
    seed: int = 0
    wandb: str | None = None
    """A Weights & Biases project that gets the figures too."""
    out: Path | None = None
    """The run folder; ``<run>_finetune`` by default."""
    deep: bool = False
    """Read the source files again, to compare them with cache and run, instead of trusting their size and time."""
    resume: bool = False
    overwrite: bool = False
    optim: OptimConfig = field(default_factory=OptimConfig)
    saving: SavingConfig = field(default_factory=SavingConfig)

    def __post_init__(self) -> None:
        _as_paths(self)
        _check_shared(self)
        _at_least("accumulate", self.accumulate, 1)
        if self.batch_size % self.accumulate:
            raise ConfigError(f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}")
        if self.cache is None and self.source in ("resident", "streamed"):
            raise OptionError(f"source {self.source} reads a frontier cache: give --from-cache CACHE")
        if self.cache is not None and self.source == "live":
            raise OptionError(
                "source live encodes every frame, and --from-cache is not read: give --live-encoder alone"
            )
        if self.unfreeze_schedule is not None and self.unfreeze != FinetuneConfig.unfreeze:
            raise OptionError(
                "unfreeze has no effect beside unfreeze_schedule, which says which layers learn from when"
            )
        _one_of("batchnorm", self.batchnorm, ("frozen", "update"))

    def to_json(self) -> dict[str, Any]:
        return _to_json(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> FinetuneConfig:
        """Reads what ``to_json`` wrote; raises CheckpointError on anything else."""
        return _from_json(cls, value)


Config = TypeVar("Config", TrainConfig, FinetuneConfig)


def _as_paths(config: TrainConfig | FinetuneConfig) -> None:
    """Lets paths be given as text, and one dataset without a tuple around it."""
    for name in ("cache", "checkpoint", "out", "robomimic_config"):
        if isinstance(getattr(config, name, None), str):
            object.__setattr__(config, name, Path(getattr(config, name)))
    given = (config.datasets,) if isinstance(config.datasets, str | Path) else config.datasets
    object.__setattr__(config, "datasets", tuple(Path(path) for path in given))


def _check_shared(config: TrainConfig | FinetuneConfig) -> None:
    _at_least("steps", config.steps, 1)
    if config.batch_size is not None:
        _at_least("batch_size", config.batch_size, 1)
    for name in ("lr", "encoder_lr"):
        if getattr(config, name) is not None and not 0 < getattr(config, name) < math.inf:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be positive")
    _one_of("source", config.source, get_args(SourceName))
    _one_of("order", config.order, get_args(Order))
    _one_of("precision", config.precision, get_args(Precision))
    if isinstance(config, TrainConfig):
        _one_of("action_normalization", config.action_normalization, get_args(ActionNormalization))
    if config.order == "block" and (config.cache is None or config.source == "live"):
        raise OptionError("order block is for reading a cache in pieces; leave it out with live encoding")
    if config.max_memory is not None:
        _at_least("max_memory", config.max_memory, 1)
    if config.resume and config.overwrite:
        raise OptionError("--resume continues the run and --overwrite replaces it: give one of them")


def _check_encoder_options(config: TrainConfig) -> None:
    """Raises OptionError for options of an encoder that a cache has made already, or that does not learn."""
    if config.cache is not None and (config.encoder is not None or config.preprocess is not None):
        raise OptionError("encoder and preprocess are those that the cache was made with: leave them out")
    if config.live and config.augment:
        raise OptionError("views are drawn from a cache: extract with --views K and train --from-cache")
    if not config.freeze_encoder:
        return
    for name in ("share_rgb_model", "encoder_lr"):
        if getattr(config, name) != getattr(TrainConfig, name):
            raise OptionError(
                f"{name} has no effect: the encoder is frozen, and the same for all cameras; "
                "--no-freeze-encoder (with --dataset alone) trains it"
            )


def _check_robomimic(config: TrainConfig) -> None:
    """Raises OptionError for options of our own policies and encoders, which robomimic's algorithms do not have."""
    if config.policy.startswith(ROBOMIMIC_PREFIX):
        check_name(config.policy)
    elif config.policy != TrainConfig.policy:
        raise OptionError(f"policy {config.policy!r} is not robomimic's: give it, or --robomimic-config, not both")
    plain = TrainConfig(cache=config.cache, datasets=config.datasets)
    for name in OWN_POLICY_OPTIONS:
        if getattr(config, name) != getattr(plain, name):
            raise OptionError(
                f"{name} is for the policies {', '.join(POLICIES)}; robomimic's algorithms have theirs in the JSON of "
                f"--robomimic-config, such as algo.optim_params"
            )
    if config.precision in ("bf16", "fp16"):
        raise ConfigError(
            f"--precision {config.precision} with one of robomimic's algorithms, which compute in float32: give fp32, "
            f"tf32 or auto; cached features keep the precision that they were made in"
        )
    if not config.freeze_encoder:
        raise OptionError("robomimic's algorithms learn from frozen features: leave --no-freeze-encoder out")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} {value!r} is unknown; {available(choices, value)}")


def _at_least(name: str, value: float, least: float) -> None:
    if not least <= value < math.inf:
        raise ConfigError(f"{name} is {value}; it must be at least {least}")


def _within(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ConfigError(f"{name} is {value}; it must lie between {least} and {most}")


def _to_json(config: TrainConfig | FinetuneConfig) -> dict[str, Any]:
    return {item.name: _plain(getattr(config, item.name)) for item in fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _from_json(cls: type[Config], value: dict[str, Any]) -> Config:
    names = {item.name for item in fields(cls)}
    if not isinstance(value, dict) or not names.issuperset(value):
        unknown = sorted(set(value) - names) if isinstance(value, dict) else value
        raise CheckpointError(f"the saved config is not a {cls.__name__}: {unknown!r} is unknown to this version")
    try:
        return cls(**{name: _revive(name, item) for name, item in value.items()})
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"the saved config is not a valid {cls.__name__}: {error}") from error


def _revive(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name in ("cache", "checkpoint", "out", "robomimic_config"):
        return Path(value)
    if name == "datasets":
        return tuple(Path(item) for item in value)
    if name in ("cameras", "low_dim_keys"):
        return tuple(value)
    if name == "rotation_6d":
        return tuple((start, stop) for start, stop in value)
    if name == "optim":
        return OptimConfig(**value)
    if name == "saving":
        return SavingConfig(**value)
    if name == "encoder":
        from cache_pipeline.encoders.image_encoder import EncoderSpec

        return EncoderSpec.from_json(value)
    if name == "preprocess":
        from cache_pipeline.encoders.preprocess import Preprocess

        return Preprocess.from_json(value)
    return value
