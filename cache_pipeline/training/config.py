"""Configs of training runs: frozen dataclasses, checked when created, saved as JSON with the run.

A field with an ``Option`` is also an option of ``train`` or ``finetune``; ``RunConfig`` holds the shared fields.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from cache_pipeline.encoders.view_spec import ViewSpec
from cache_pipeline.errors import ConfigError, OptionError, available
from cache_pipeline.files import location
from cache_pipeline.options import (
    DATA,
    ENCODER,
    LARGEST,
    MOST_STEPS,
    OPTIMISATION,
    OUTPUT,
    POLICY,
    RUNNING,
    Option,
    assignments,
    byte_count,
    check,
    check_text,
    from_json,
    names,
    number_or_none,
    options_of,
    slices,
    to_json,
)
from cache_pipeline.policies.robomimic.config import PREFIX as ROBOMIMIC_PREFIX
from cache_pipeline.policies.robomimic.config import check_name
from cache_pipeline.policies.spec import POLICIES

if TYPE_CHECKING:
    from cache_pipeline.encoders.image_encoder import EncoderSpec
    from cache_pipeline.encoders.preprocess import Preprocess

SourceName = Literal["auto", "resident", "streamed", "live"]
Order = Literal["auto", "full", "block"]
ActionNormalization = Literal["minmax", "gaussian", "none"]
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
Pooling = Literal["avg", "spatial_softmax"]

# Options of the groups Policy and Optimisation that robomimic's algorithms use too. All others of these groups are for
# flow, mlp and gmm; robomimic's algorithms take theirs from the JSON of --robomimic-config.
FOR_ROBOMIMIC = (
    "policy",
    "robomimic_config",
    "obs_horizon",
    "action_horizon",
    "augment",
    "steps",
    "batch_size",
    "encoder_lr",  # has a check of its own: these algorithms learn from frozen features
)
# Defaults of flow, mlp and gmm; for robomimic's algorithms the robomimic config gives these values.
DEFAULTS = {"batch_size": 64, "obs_horizon": 2, "action_horizon": 8}


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser: AdamW with linear warm-up, cosine decay, clipped gradients and averaged weights."""

    weight_decay: Annotated[
        float, Option("Decoupled decay of matrices and kernels; biases and norms have none.", OPTIMISATION, least=0)
    ] = 1e-4
    warmup_steps: Annotated[
        int, Option("Steps of linear warm-up, at most a tenth of the run.", OPTIMISATION, least=0)
    ] = 100
    min_lr_ratio: Annotated[
        float, Option("Learning rate at the end of the cosine, over the peak.", OPTIMISATION, least=0, most=1)
    ] = 0.0
    grad_clip: Annotated[
        float | None,
        Option("Largest norm of the gradient, or none.", OPTIMISATION, above=0, parse=number_or_none, typed=str),
    ] = 1.0
    ema: Annotated[
        float | None,
        Option(
            "Decay of the averaged weights that act, or none.",
            OPTIMISATION,
            least=0,
            most=1,
            parse=number_or_none,
            typed=str,
        ),
    ] = 0.995

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class SavingConfig:
    """Intervals of logging, held-out measurement and saving, in steps. An interval of 0 means once, at the end."""

    log_every: Annotated[int, Option("Steps between rows of metrics.csv.", OUTPUT, least=1)] = 50
    eval_every: Annotated[int, Option("Steps between held-out measurements; 0: at the end.", OUTPUT, least=0)] = 500
    save_every: Annotated[int, Option("Steps between checkpoints; 0: at the end.", OUTPUT, least=0)] = 1000
    keep_best: Annotated[int, Option("Best checkpoints kept beside the latest.", OUTPUT, least=0)] = 1
    rollout_every: Annotated[
        int,
        Option(
            "Steps between rollouts; 0: none. Best is then the highest success, ties by held-out error.",
            OUTPUT,
            least=0,
        ),
    ] = 0
    """Rollouts are also made at the last step. They run in the environment of the dataset, or in ``rollout_env``."""
    rollout_env: Annotated[
        str | None, Option("Their gymnasium environment, FILE.py:make; it runs only if named here.", OUTPUT)
    ] = None
    """Factory of an environment with gymnasium's interface, as ``rollout --env`` takes it; see ``sim/custom.py``."""
    rollout_episodes: Annotated[int, Option("Episodes of each of these rollouts.", OUTPUT, least=1)] = 10
    rollout_workers: Annotated[int, Option("Processes of these rollouts; the result is the same.", OUTPUT, least=1)] = 1
    eval_windows: Annotated[int, Option("Most held-out windows that are measured.", OUTPUT, least=1)] = 4096

    def __post_init__(self) -> None:
        check(self)


Steps = Annotated[
    int, Option("Optimiser steps; with --resume more steps extend a run.", OPTIMISATION, least=1, most=MOST_STEPS)
]
PeakRate = Annotated[float, Option("Peak learning rate of projection and policy.", OPTIMISATION, above=0)]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Fields that ``train`` and ``finetune`` share."""

    cache: Annotated[
        Path | str | None,
        Option("A cache made by extract-features: a folder or a URL.", DATA, "--from-cache", typed=str, parse=location),
    ] = None
    """A finished feature cache."""
    datasets: Annotated[
        tuple[Path, ...],
        Option("An HDF5 file or LeRobot folder; may be repeated.", DATA, "--dataset", typed=list[Path], parse=tuple),
    ] = ()
    filter_key: Annotated[str | None, Option("Filter key of the demos to train on; train by default.", DATA)] = None
    """Filter key of the demos to train on; ``train`` if the data have it and ``valid``, else a seeded split by demo."""
    valid_key: Annotated[str | None, Option("Filter key of the held-out demos.", DATA)] = None
    deep: Annotated[bool, Option("Compare every frame with its source instead of trusting size and time.", DATA)] = (
        False
    )
    encoder_factory: str | None = None
    """``file.py:factory``: the factory of the encoder of the cache or run. It runs only if it is named here."""
    share_rgb_model: Annotated[
        bool,
        Option("One encoder for all cameras, or one each.", ENCODER, "--share-rgb-model/--no-share-rgb-model"),
    ] = False
    steps: Steps = 4000
    batch_size: Annotated[
        int | None, Option("Windows per step; 64, or what the robomimic config says.", OPTIMISATION, least=1)
    ] = None
    lr: PeakRate = 1e-3
    encoder_lr: Annotated[
        float | None,
        Option("Peak learning rate of the encoder; 1e-5, less where features vary little.", OPTIMISATION, above=0),
    ] = None
    """By default 1e-5, reduced in proportion if features vary by less than their mean: there the same weight update
    changes a feature more, in units of its variation."""
    source: Annotated[
        SourceName, Option("auto, resident, streamed or live.", RUNNING, choices=get_args(SourceName), typed=str)
    ] = "auto"
    """Source of the features; ``auto`` means resident if the cache fits ``max_memory``, else streamed."""
    order: Annotated[
        Order,
        Option("Order of samples: full, block (reads far less), or auto.", RUNNING, choices=get_args(Order), typed=str),
    ] = "auto"
    """Order of samples. A ``full`` shuffle gives the same samples per seed with every source. A ``block`` shuffle reads
    each part of a cache once per epoch, in pools sized by ``max_memory``; ``auto`` uses it for streamed caches many
    times larger than ``max_memory``. Live runs have no block order."""
    max_memory: Annotated[
        int | None,
        Option(
            "Memory for features or frames on the device, such as 2GiB.", RUNNING, least=1, parse=byte_count, typed=str
        ),
    ] = None
    """Bytes that features or frames may take on the device; by default half of the free memory."""
    device: Annotated[str, Option("auto, cpu or cuda:0.", RUNNING)] = "auto"
    precision: Annotated[
        Precision, Option("auto, fp32, tf32, bf16 or fp16.", RUNNING, choices=get_args(Precision), typed=str)
    ] = "auto"
    """Precision of encoder, projection and action head in a step; weights, sums and the optimiser stay in float32.
    ``auto`` in training is the device's fastest: bf16, fp16 on CUDA below 8.0, fp32 on CPUs without bfloat16
    multiplication. ``auto`` in fine-tuning is the precision of the run's features if the device has it. Cached features
    keep theirs.
    robomimic's algorithms compute in fp32 or tf32."""
    seed: Annotated[int, Option("Seed of everything that is random.", RUNNING, least=0, most=LARGEST)] = 0
    out: Annotated[Path | None, Option("The run folder; by default named after what it is made from.", OUTPUT)] = None
    wandb: Annotated[str | None, Option("Log to this Weights & Biases project too.", OUTPUT)] = None
    resume: Annotated[bool, Option("Continue from the latest checkpoint of --out.", OUTPUT)] = False
    overwrite: Annotated[bool, Option("Replace the run once the new one has a checkpoint.", OUTPUT)] = False
    augmentation: ViewSpec = field(default_factory=ViewSpec)
    """Parameters of the augmentation by ``augment``."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    saving: SavingConfig = field(default_factory=SavingConfig)

    def __post_init__(self) -> None:
        for name in ("cache", "checkpoint", "out", "robomimic_config"):
            if isinstance(getattr(self, name, None), str):
                check_text(name, getattr(self, name))
                read = location if name == "cache" else Path
                object.__setattr__(self, name, read(getattr(self, name)))
        given = (self.datasets,) if isinstance(self.datasets, str | Path) else self.datasets
        object.__setattr__(self, "datasets", tuple(Path(path) for path in given))
        check(self)
        if self.cache is None and self.source in ("resident", "streamed"):
            raise OptionError(f"source {self.source} reads a cache: give --from-cache CACHE")
        if self.order == "block" and (self.cache is None or self.source == "live"):
            raise OptionError("order block is for reading a cache in pieces; leave it out with live encoding")
        if self.resume and self.overwrite:
            raise OptionError("--resume continues the run and --overwrite replaces it: give one of them")

    def to_json(self) -> dict[str, Any]:
        return to_json(self)

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Reads what ``to_json`` wrote; raises CheckpointError on anything else.

        A config names the code that training runs (``encoder_factory``, ``encoder.factory``, ``saving.rollout_env``).
        Look at these fields before you train with somebody else's file; ``train --config`` runs none of them.
        """
        return from_json(cls, value, NESTED)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """One training run. Data come from ``cache`` or, encoded live at every step, from ``datasets``.

    Beside a cache, ``datasets`` must hold just what it was made from.
    """

    cameras: Annotated[
        tuple[str, ...] | None, Option("Cameras, comma-separated; all by default.", DATA, typed=str, parse=names)
    ] = None
    low_dim_keys: Annotated[
        tuple[str, ...] | None,
        Option("Low-dim obs keys, comma-separated, or none; all by default.", DATA, typed=str, parse=names),
    ] = None
    """An empty tuple means none."""
    action_key: Annotated[
        tuple[str, ...] | None,
        Option(
            "Arrays of the actions, comma-separated, side by side; those of the cache, else actions.",
            DATA,
            typed=str,
            parse=names,
        ),
    ] = None
    encoder: "EncoderSpec | None" = None
    """The image encoder of a live run; pretrained resnet18 by default."""
    preprocess: "Preprocess | None" = None
    """Preprocessing of a live run; by default no resize or crop, and ImageNet normalisation with pretrained weights."""
    freeze_encoder: Annotated[
        bool, Option("With --dataset: keep or train the encoder.", ENCODER, "--freeze-encoder/--no-freeze-encoder")
    ] = True
    encoder_lr: Annotated[float, Option("Peak learning rate of an encoder that learns.", OPTIMISATION, above=0)] = 1e-5
    pooling: Annotated[
        Pooling,
        Option(
            "Of maps (--cut layer4 or below): avg or spatial_softmax.", POLICY, choices=get_args(Pooling), typed=str
        ),
    ] = "avg"
    policy: Annotated[str, Option(f"{', '.join(POLICIES)} or robomimic:ALGORITHM.", POLICY)] = "flow"
    policy_options: Annotated[
        dict[str, Any],
        Option(
            "NAME=VALUE of the policy, such as hidden=[512,512]; may be repeated.",
            POLICY,
            "--policy-option",
            typed=list[str],
            parse=assignments,
        ),
    ] = field(default_factory=dict)
    robomimic_config: Annotated[Path | None, Option("A robomimic JSON config; trains its algorithm.", POLICY)] = None
    emb_dim: Annotated[int, Option("Width of the projection of one obs step.", POLICY, least=1, most=65536)] = 256
    obs_horizon: Annotated[
        int | None, Option("Obs steps that the policy sees (frame_stack); 2 for ours.", POLICY, least=1, most=1000)
    ] = None
    action_horizon: Annotated[
        int | None, Option("Action steps it predicts (seq_length); 8 for ours.", POLICY, least=1, most=1000)
    ] = None
    action_normalization: Annotated[
        ActionNormalization,
        Option("minmax, gaussian or none.", POLICY, choices=get_args(ActionNormalization), typed=str),
    ] = "minmax"
    rotation_6d: Annotated[
        tuple[tuple[int, int], ...],
        Option(
            "Axis-angle part of the action, such as 3:6, for the policy to see in 6d.", POLICY, typed=str, parse=slices
        ),
    ] = ()
    """Slices of the action vector that are axis-angle rotations in radians, such as ``((3, 6),)``. The policy predicts
    each as six numbers and returns axis-angle."""
    augment: Annotated[
        bool | None,
        Option("Draw a view per window; on when the cache has several.", POLICY, "--augment/--no-augment"),
    ] = None
    """Draw a view for each window in training; on by default if the cache has several views. In a live run: random
    crop and colour jitter of frames, the same within a window; off by default."""
    feature_noise: Annotated[float, Option("Noise on features, in deviations.", POLICY, least=0)] = 0.0
    """Standard deviation of Gaussian noise on features in training, in units of each camera's feature deviation."""
    feature_dropout: Annotated[float, Option("Fraction of features set to their mean.", POLICY, least=0, most=0.99)] = (
        0.0
    )
    """Fraction of features set to their mean in training; the others are scaled up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.robomimic:
            self._check_robomimic()
        else:
            for name, value in DEFAULTS.items():
                object.__setattr__(self, name, value if getattr(self, name) is None else getattr(self, name))
            if self.policy not in POLICIES:
                raise ConfigError(f"policy {self.policy!r} is unknown; {available(POLICIES, self.policy)}")
        if self.cache is None and not self.datasets:
            raise ConfigError("nothing to train on; give --from-cache CACHE, or --dataset FILE for live encoding")
        if self.cache is not None and self.source == "live" and not self.datasets:
            raise ConfigError("source live reads frames from HDF5: give --dataset FILE")
        self._check_encoder_options()

    @property
    def robomimic(self) -> bool:
        """Whether the policy is one of robomimic's algorithms."""
        return self.robomimic_config is not None or self.policy.startswith(ROBOMIMIC_PREFIX)

    @property
    def named_factory(self) -> str | None:
        """The factory that the user names; only this one may run."""
        return self.encoder_factory or (None if self.encoder is None else self.encoder.factory)

    @property
    def live(self) -> bool:
        """Whether frames are encoded at every step."""
        return self.cache is None or self.source == "live"

    def _check_encoder_options(self) -> None:
        """Raises OptionError for encoder options without effect: a cache fixes the encoder, or it does not learn."""
        if not self.freeze_encoder and not self.live:
            raise OptionError("a cache holds frozen features; to train the encoder give only --dataset FILE")
        if self.cache is not None and (self.encoder is not None or self.preprocess is not None):
            raise OptionError("the cache fixes encoder and preprocess; leave them out")
        if not self.freeze_encoder:
            return
        for name in ("share_rgb_model", "encoder_lr"):
            if getattr(self, name) != getattr(TrainConfig, name):
                raise OptionError(
                    f"{name} has no effect: the encoder is frozen, and the same for all cameras; "
                    "--no-freeze-encoder (with only --dataset) trains it"
                )

    def _check_robomimic(self) -> None:
        """Raises OptionError for options that robomimic's algorithms do not have."""
        if self.policy.startswith(ROBOMIMIC_PREFIX):
            check_name(self.policy)
        elif self.policy != TrainConfig.policy:
            raise OptionError(f"policy {self.policy!r} is not one of robomimic's; give either it or --robomimic-config")
        plain = TrainConfig(cache=self.cache, datasets=self.datasets)
        for name in OWN_POLICY_OPTIONS:
            if getattr(self, name) != getattr(plain, name):
                raise OptionError(
                    f"{name} is for the policies {', '.join(POLICIES)}; robomimic's algorithms take it from the JSON "
                    f"of --robomimic-config, such as algo.optim_params"
                )
        if self.precision in ("bf16", "fp16"):
            raise ConfigError(
                f"--precision {self.precision} does not work with robomimic's algorithms, which compute in float32; "
                f"give fp32, tf32 or auto; cached features keep their precision"
            )
        if not self.freeze_encoder:
            raise OptionError("robomimic's algorithms learn from frozen features; leave --no-freeze-encoder out")
        if self.live and self.augment:
            raise OptionError("robomimic's algorithms do not augment frames; leave --augment out")


OWN_POLICY_OPTIONS = (
    *(
        item.name
        for item, option in options_of(TrainConfig)
        if option.group in (POLICY, OPTIMISATION) and item.name not in FOR_ROBOMIMIC
    ),
    "optim",
)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """Config of fine-tuning: continues from a run with encoder layers unfrozen, all, some or by a schedule.

    ``cache`` is a frontier cache, cut below the layers that learn; it replaces all layers below. ``datasets`` are
    those of the run by default.
    """

    checkpoint: Annotated[Path, Option("The run to continue from, or one of its checkpoints.", DATA)]
    """A run folder, whose best checkpoint is used, or one checkpoint folder."""
    encoder_factory: Annotated[
        str | None, Option("The encoder's factory; it runs only if it is named here.", ENCODER, "--encoder")
    ] = None
    unfreeze: Annotated[str, Option("all, or layers such as layer4,layer3.", ENCODER)] = "all"
    """Layers that learn from the first step."""
    unfreeze_schedule: Annotated[str | None, Option("Such as layer4@0,layer3@2000,all@5000.", ENCODER)] = None
    """Layers and the step at which each begins to learn, instead of ``unfreeze``."""
    freeze: Annotated[
        str | None, Option("Patterns of encoder parameters that stay frozen, comma-separated.", ENCODER)
    ] = None
    """Comma-separated name patterns (as in fnmatch) of encoder parameters that stay frozen in unfrozen layers."""
    batchnorm: Annotated[
        Literal["frozen", "update"],
        Option(
            "Let BatchNorm statistics follow the batches.",
            ENCODER,
            "--update-batchnorm",
            choices=("frozen", "update"),
            typed=bool,
            parse=lambda update: "update" if update else "frozen",
        ),
    ] = "frozen"
    """Whether BatchNorm in unfrozen layers keeps its statistics or updates them from the batches."""
    steps: Steps = 2000
    batch_size: Annotated[int, Option("Windows per step.", OPTIMISATION, least=1)] = 64
    lr: PeakRate = 1e-4
    augment: Annotated[bool, Option("Random crop and colour jitter of frames.", POLICY)] = False
    """Random crop and colour jitter of live frames on the device, the same within a window."""
    accumulate: Annotated[int, Option("Parts into which a batch is split to save memory.", RUNNING, least=1)] = 1
    checkpointing: Annotated[bool, Option("Less memory for more arithmetic.", RUNNING, "--gradient-checkpointing")] = (
        False
    )
    """Recompute the encoder's activations in the backward pass to save memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.accumulate:
            raise ConfigError(f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}")
        if self.cache is not None and self.source == "live":
            raise OptionError(
                "source live encodes every frame and does not read --from-cache; give only --live-encoder"
            )
        if self.unfreeze_schedule is not None and self.unfreeze != FinetuneConfig.unfreeze:
            raise OptionError(
                "unfreeze has no effect beside unfreeze_schedule, which sets the layers and their first steps"
            )


def _encoder_spec(value: Any) -> "EncoderSpec":
    from cache_pipeline.encoders.image_encoder import EncoderSpec

    return EncoderSpec.from_json(value)


def _preprocess(value: Any) -> "Preprocess":
    from cache_pipeline.encoders.preprocess import Preprocess

    return Preprocess.from_json(value)


# Readers of the fields whose JSON is not a config of this kind.
NESTED = {"encoder": _encoder_spec, "preprocess": _preprocess}
