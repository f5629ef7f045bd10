"""Rejects options that have no effect beside other options, before any work, with the reason.

``RULES`` lists the cases of each command. ``CheckedCommand`` checks the options on the command line, even those whose
value equals the default. The configs check conflicts between values, for Python callers too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from typer.core import TyperCommand

from cache_pipeline.cli.generated import parameter_names, was_typed
from cache_pipeline.cli.options import results_alone_on_stdout
from cache_pipeline.cli.terminal import DELETED_FOLDER, folder_is_deleted
from cache_pipeline.encoders.view_spec import ViewSpec
from cache_pipeline.errors import ConfigError, OptionError
from cache_pipeline.options import GROUPS, LARGEST, check_text
from cache_pipeline.sim.collect_config import CollectConfig, RerenderConfig
from cache_pipeline.training.config import OWN_POLICY_OPTIONS, TrainConfig

Values = Mapping[str, Any]


class Rule(NamedTuple):
    """``options`` (parameter names) have no effect if ``when`` is true of the values; ``why`` is the reason."""

    options: tuple[str, ...]
    when: Callable[[Values], Any]
    why: str


NETWORK = ("rgb_model_name", "pretrained_encoder", "weights", "weights_prefix")
PREPROCESSING = ("imagenet_norm", "image_mean", "image_std", "resize_shape", "crop_shape", "flip")
OWN_POLICIES = tuple(parameter_names(TrainConfig, OWN_POLICY_OPTIONS))
VIEWS = tuple(parameter_names(ViewSpec))
SCRIPTED = tuple(parameter_names(CollectConfig) - parameter_names(RerenderConfig))
ENGINES = ("workers", "part", "finish", "engine", "ray_address")


def _robomimic(values: Values) -> bool:
    return values["robomimic_config"] is not None or values["policy"].startswith("robomimic:")


ROLLOUTS = Rule(
    ("rollout_env", "rollout_episodes", "rollout_workers"),
    lambda v: not v["rollout_every"],
    "no rollouts are made without --rollout-every",
)
NO_FILE = Rule(
    ("weights_prefix",), lambda v: not v["weights"], "it chooses among the ResNets of a file, which --weights names"
)
ENCODER = (
    Rule(NETWORK, lambda v: v["encoder"], "--encoder brings its own network and weights"),
    Rule(("cut",), lambda v: v["encoder"] and v["cut"] != "output", "only ResNets are cut; --encoder gives its output"),
    Rule(
        ("pretrained_encoder",),
        lambda v: v["weights"] and not v["pretrained_encoder"],
        "--weights takes the weights of a file",
    ),
    NO_FILE,
    Rule(("imagenet_norm",), lambda v: v["image_mean"], "--image-mean and --image-std set the normalisation"),
)

RULES: dict[str, tuple[Rule, ...]] = {
    "quickstart": (NO_FILE,),
    "extract-features": (
        Rule(
            (*NETWORK, *PREPROCESSING, "camera_encoder"),
            lambda v: v["encoder_from"],
            "--encoder-from takes encoder and preprocessing from a run",
        ),
        *ENCODER,
        Rule(("deep",), lambda v: v["overwrite"], "--overwrite reads every frame anyway"),
        Rule(ENGINES, lambda v: v["dry_run"], "--dry-run plans all units and starts no other process"),
        Rule(("ray_address",), lambda v: v["engine"] != "ray", "only --engine ray uses a Ray cluster"),
        Rule(("device",), lambda v: v["devices"], "--devices names the devices"),
        Rule(VIEWS, lambda v: v["views"] == 1, "only views beyond the first are augmented; --views 4 adds three"),
    ),
    "verify": (
        Rule(
            ("dataset", "rows", "device", "seed", "encoder"),
            lambda v: v["integrity"],
            "--integrity reads every stored byte and encodes nothing",
        ),
    ),
    "train": (
        Rule(
            (*NETWORK, *PREPROCESSING, "cut"),
            lambda v: v["from_cache"],
            "a cache holds the output of the frozen encoder that extract-features was given; "
            "encode live with only --dataset, or extract again",
        ),
        *ENCODER,
        Rule(
            ("share_rgb_model", "encoder_lr"),
            lambda v: v["freeze_encoder"],
            "the encoder is frozen and the same for all cameras; --no-freeze-encoder trains it",
        ),
        Rule(
            VIEWS,
            lambda v: v["from_cache"] and v["source"] != "live",
            "a cache holds the views that it was made with",
        ),
        Rule(VIEWS, lambda v: not v["augment"], "frames are changed with --augment only"),
        Rule(
            ("augment",),
            lambda v: v["augment"] is False and (not v["from_cache"] or v["source"] == "live"),
            "live frames are changed with --augment only",
        ),
        Rule(
            OWN_POLICIES,
            _robomimic,
            "robomimic's algorithms take it from the JSON of --robomimic-config",
        ),
        ROLLOUTS,
        Rule(
            ("precision",),
            lambda v: _robomimic(v) and v["from_cache"] and v["precision"] not in ("auto", "fp32"),
            "robomimic's networks compute in fp32, and a cache needs no encoding",
        ),
    ),
    "finetune": (
        Rule(
            ("live_encoder",),
            lambda v: v["from_cache"],
            "--from-cache reads features from a cache as far as possible; give one of the two",
        ),
        Rule(VIEWS, lambda v: not v["augment"], "frames are changed with --augment only"),
        ROLLOUTS,
        Rule(("unfreeze",), lambda v: v["unfreeze_schedule"], "--unfreeze-schedule sets layers and first steps"),
    ),
    "bench": (
        Rule(
            ("batch_size",),
            lambda v: v["cases"] and not {"train", "finetune", "frontier"} & set(v["cases"]),
            "only train, finetune and frontier train on windows",
        ),
        Rule(("overwrite",), lambda v: not v["out"], "no file is written without --out FILE"),
    ),
    # ``cache inspect`` has the same name and draws nothing.
    "inspect": (Rule(("overwrite",), lambda v: not v.get("views"), "no file is written without --views FILE"),),
    "probe": (Rule(("overwrite",), lambda v: not v["out"], "no file is written without --out FILE"),),
    "collect": (
        Rule(
            SCRIPTED,
            lambda v: v["from_states"],
            "--from-states renders the demos of a file and simulates none",
        ),
        Rule(("env_args",), lambda v: not v["from_states"], "the task describes the environment of new demos"),
    ),
    "rollout": (
        Rule(("videos", "overwrite"), lambda v: not v["video"], "no video is written without --video FOLDER"),
        Rule(("env_args",), lambda v: v["env"], "--env makes the environment"),
    ),
}


class CheckedCommand(TyperCommand):
    """A command that rejects duplicate options and options without effect, and lists options by group in its help."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {group: [] for group in ("Arguments", *GROUPS, "Options")}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                kind = "Options" if parameter.param_type_name == "option" else "Arguments"
                groups[getattr(parameter, "rich_help_panel", None) or kind].append(record)
        for group, records in groups.items():
            if records:
                with formatter.section(group):
                    formatter.write_dl(records)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        counts = Counter(parameter for parameter in order if not _repeatable(parameter))
        for parameter, count in counts.items():
            if count > 1:
                raise OptionError(f"{parameter.opts[0]} is given {count} times, but only one counts; give it once")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        if folder_is_deleted():  # torch ends the process there
            raise ConfigError(DELETED_FOLDER)
        check_values(ctx)
        refuse_without_effect(ctx)
        with results_alone_on_stdout():
            return super().invoke(ctx)


def check_values(ctx: Any) -> None:
    """Raises OptionError for a value that no option can have: not finite, beyond 64 bits, empty, or too long a name."""
    for parameter in ctx.command.params:
        value = ctx.params.get(parameter.name)
        if value is None or not was_typed(ctx, parameter.name):
            continue
        name = parameter.opts[0] if parameter.param_type_name == "option" else str(parameter.name).upper()
        if isinstance(value, float) and not math.isfinite(value):
            raise OptionError(f"{name} is {value}; give a finite number")
        if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
            raise OptionError(f"{name} is {value}; give a number of at most {LARGEST}")
        check_text(name, value)
        if name == "--out" and not _is_text(str(value)):
            raise OptionError(f"{name} {value} is not valid UTF-8, which safetensors needs; choose another name")


def _is_text(value: str) -> bool:
    """Whether a path is valid UTF-8; other bytes are lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def refuse_without_effect(ctx: Any) -> None:
    """Raises OptionError for the first option on the command line that has no effect beside the others."""
    for rule in RULES.get(ctx.command.name, ()):
        if not rule.when(ctx.params):
            continue
        for parameter in ctx.command.params:
            if parameter.name in rule.options and was_typed(ctx, parameter.name):
                flag = _flag(parameter, ctx.params[parameter.name])
                raise OptionError(f"{flag} has no effect: {rule.why}; leave {flag} out")


def _repeatable(parameter: Any) -> bool:
    return parameter.multiple if parameter.param_type_name == "option" else True


def _flag(parameter: Any, value: Any) -> str:
    """Returns the flag as typed, such as ``--no-augment`` for a switch that is off."""
    flags = parameter.secondary_opts if value is False and parameter.secondary_opts else parameter.opts
    return str(flags[0])
