"""robomimic's algorithms on cached features: their names, and their configs with cameras turned into low-dim keys.

robomimic 0.3.0 (https://robomimic.github.io) supplies config and training code. Only the obs change: a camera's obs is
its cached feature, flattened, under the camera's name with the modality ``low_dim``.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_pipeline.errors import ConfigError, MissingExtraError, available, install_command
from cache_pipeline.files import read_json
from cache_pipeline.options import LARGEST
from cache_pipeline.text import module_name

logger = logging.getLogger("cache_pipeline")

PREFIX = "robomimic:"

# Short name → robomimic's algorithm and the parts of its config that are enabled.
ALGORITHMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "bc": ("bc", ()),
    "bc_gmm": ("bc", ("gmm",)),
    "bc_rnn": ("bc", ("rnn",)),
    "bc_rnn_gmm": ("bc", ("rnn", "gmm")),
    "bc_transformer": ("bc", ("transformer",)),
    "bc_transformer_gmm": ("bc", ("transformer", "gmm")),
    "iql": ("iql", ()),
    "td3_bc": ("td3_bc", ()),
    "cql": ("cql", ()),
    "bcq": ("bcq", ()),
}
# torch's warning about a class of robomimic, at the first CQL step of a process; users cannot act on it.
KNOWN_WARNING = r".*TanhWrappedDistribution.* does not define `arg_constraints`"
BC_PARTS = ("rnn", "transformer", "gaussian", "gmm", "vae")
OBS_MODALITIES = ("rgb", "low_dim")

# robomimic evaluates names of backbone and pooling classes as Python (``eval`` in models/obs_core.py). Settings that
# end in ``_class`` may name only these classes of robomimic, which neither download nor unpickle anything.
CLASSES: dict[str, tuple[str, ...]] = {
    "core_class": ("VisualCore", "ScanCore"),
    "backbone_class": ("ResNet18Conv", "ShallowConv"),
    "pool_class": ("SpatialSoftmax", "SpatialMeanPool"),
    "obs_randomizer_class": ("CropRandomizer", "ColorRandomizer", "GaussianNoiseRandomizer"),
}

# Type of a robomimic default → accepted types, and the type in words.
TYPES: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "text"),
    list: ((list,), "a list"),
    dict: ((dict,), "an object"),
}
MOST = 10**7
"""Largest size of a network, batch or epoch; more would not fit any memory."""

# Exceptions of robomimic for configs that it cannot use; it has no error classes of its own.
ACTION_KEYS, ACTION_CONFIG = "action_keys", "action_config"
"""Settings of ``train`` in robomimic 0.4 and later: the arrays of the actions, and how each is normalised."""
NORMALIZATIONS = ("min_max", "gaussian")
CONFIG_ERRORS = (RuntimeError, NotImplementedError, AssertionError, KeyError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True, kw_only=True)
class RobomimicConfig:
    """A whole robomimic config as JSON, and its settings for the training loop."""

    json: dict[str, Any]

    def __post_init__(self) -> None:
        check_classes(self.json)
        _check_actions(self.json["train"])
        counts = {f"train.{name}": self.json["train"][name] for name in ("seq_length", "frame_stack", "batch_size")}
        if self.recurrent:
            counts["algo.rnn.horizon"] = self.json["algo"]["rnn"]["horizon"]
        if self.transformer:
            counts["algo.transformer.context_length"] = self.json["algo"]["transformer"]["context_length"]
        for name, value in counts.items():
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r} in the robomimic config; it must be at least 1")
        if self.transformer and self.window < self.context_length:
            raise ConfigError(
                f"the transformer's context_length is {self.context_length}, but windows have {self.window} steps "
                f"(frame_stack - 1 + seq_length); set train.frame_stack to {self.context_length}, or --obs-horizon"
            )

    @property
    def algorithm(self) -> str:
        """robomimic's name of the algorithm: bc, iql, td3_bc, cql or bcq."""
        return str(self.json["algo_name"])

    @property
    def name(self) -> str:
        """``robomimic:`` and the algorithm with its enabled parts, such as ``robomimic:bc_rnn_gmm``."""
        algo = self.json["algo"]
        parts = [part for part in BC_PARTS if self.algorithm == "bc" and algo.get(part, {}).get("enabled")]
        return PREFIX + "_".join([self.algorithm, *parts])

    @property
    def rl(self) -> bool:
        """Whether the algorithm learns from rewards, dones and next obs."""
        return self.algorithm != "bc"

    @property
    def recurrent(self) -> bool:
        return not self.rl and bool(self.json["algo"]["rnn"]["enabled"])

    @property
    def transformer(self) -> bool:
        return not self.rl and bool(self.json["algo"]["transformer"]["enabled"])

    @property
    def context_length(self) -> int:
        return int(self.json["algo"]["transformer"]["context_length"])

    @property
    def frame_stack(self) -> int:
        return int(self.json["train"]["frame_stack"])

    @property
    def seq_length(self) -> int:
        return int(self.json["train"]["seq_length"])

    @property
    def window(self) -> int:
        """Number of steps of a training window, both of obs and of actions."""
        return self.frame_stack - 1 + self.seq_length

    @property
    def obs_horizon(self) -> int:
        """Number of obs steps for acting."""
        return min(self.frame_stack, self.context_length) if self.transformer else 1

    @property
    def batch_size(self) -> int:
        return int(self.json["train"]["batch_size"])

    @property
    def pads(self) -> tuple[bool, bool]:
        """Whether windows are padded at a demo's start and at its end."""
        return bool(self.json["train"]["pad_frame_stack"]), bool(self.json["train"]["pad_seq_length"])

    @property
    def normalize_obs(self) -> bool:
        return bool(self.json["train"]["hdf5_normalize_obs"])

    @property
    def epoch_steps(self) -> int | None:
        """Updates per epoch of learning-rate schedules; None: one pass over the windows."""
        steps = self.json["experiment"]["epoch_every_n_steps"]
        return None if steps is None else int(steps)

    @property
    def filter_keys(self) -> tuple[str | None, str | None]:
        """Filter keys of the training demos and the held-out demos; None if the config has none."""
        train = self.json["train"]
        return train["hdf5_filter_key"], train["hdf5_validation_filter_key"]

    @property
    def action_keys(self) -> tuple[str, ...] | None:
        """The arrays of the actions, side by side; None if the config does not name them."""
        keys = self.json["train"].get(ACTION_KEYS)
        return None if keys is None else tuple(keys)

    @property
    def action_normalization(self) -> str | None:
        """``min_max`` (to ±1), ``gaussian`` or None."""
        return next(iter(_normalizations(self.json["train"])), None)

    @property
    def library_json(self) -> dict[str, Any]:
        """The config without the settings that robomimic 0.3 does not have."""
        train = {key: value for key, value in self.json["train"].items() if key not in (ACTION_KEYS, ACTION_CONFIG)}
        return {**self.json, "train": train}

    @property
    def cameras(self) -> tuple[str, ...]:
        """The rgb keys; empty after ``on_features``."""
        return tuple(self.json["observation"]["modalities"]["obs"].get("rgb", ()))

    @property
    def low_dim(self) -> tuple[str, ...]:
        return tuple(self.json["observation"]["modalities"]["obs"].get("low_dim", ()))

    def on_features(self, cameras: Sequence[str], low_dim: Sequence[str]) -> RobomimicConfig:
        """Returns the config with these obs keys, all of them low-dim."""
        changed = json.loads(json.dumps(self.json))
        keys = [module_name(key) for key in (*low_dim, *cameras)]
        changed["observation"]["modalities"]["obs"] |= {"low_dim": keys, "rgb": []}
        return RobomimicConfig(json=changed)


def default_config(policy: str) -> RobomimicConfig:
    """Returns robomimic's defaults for a short name such as ``robomimic:bc_rnn_gmm``, without obs keys.

    Windows have the length of an RNN's horizon or a transformer's context. Obs are normalised.

    Raises:
        ConfigError: unknown algorithm. MissingExtraError: robomimic is not installed.
    """
    check_name(policy)
    algorithm, parts = ALGORITHMS[policy.removeprefix(PREFIX)]
    config = _defaults(algorithm)
    for part in parts:
        config["algo"][part]["enabled"] = True
    if "rnn" in parts:
        config["train"]["seq_length"] = config["algo"]["rnn"]["horizon"]
    if "transformer" in parts:
        config["train"]["frame_stack"] = config["algo"]["transformer"]["context_length"]
    config["train"]["hdf5_normalize_obs"] = True
    return RobomimicConfig(json=config)


def read_config(path: Path) -> RobomimicConfig:
    """Reads a robomimic JSON; its settings override robomimic's defaults, as in robomimic's ``train.py``.

    Raises:
        ConfigError: the file is missing or not JSON, or has unsupported settings.
    """
    try:
        given = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read the robomimic config {path} ({error})") from error
    check_classes(given)
    algorithm = given.get("algo_name") if isinstance(given, dict) else None
    known = sorted({name for name, _ in ALGORITHMS.values()})
    if algorithm not in known:
        raise ConfigError(f"{path} is for the algorithm {algorithm!r}; {available(known)}")
    given, actions = _without_actions(given)
    try:
        _check_types(given, _defaults(algorithm), path)
        whole = _defaults(algorithm, given)
        config = RobomimicConfig(json={**whole, "train": {**whole["train"], **actions}})
        _check_obs(config, path)
    except CONFIG_ERRORS as error:
        if isinstance(error, ConfigError | MissingExtraError):
            raise
        raise ConfigError(f"{path} is not a config of robomimic 0.3 for {algorithm}: {_one_line(error)}") from error
    return config


def _without_actions(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Takes the settings of actions, which robomimic 0.3 does not have, out of a config."""
    train = given.get("train")
    if not isinstance(train, dict):
        return given, {}
    actions = {key: train[key] for key in (ACTION_KEYS, ACTION_CONFIG) if train.get(key) is not None}
    rest = {key: value for key, value in train.items() if key not in (ACTION_KEYS, ACTION_CONFIG)}
    return {**given, "train": rest}, actions


def _check_actions(train: Mapping[str, Any]) -> None:
    """Raises ConfigError for action settings that cannot be used."""
    keys, settings = train.get(ACTION_KEYS), train.get(ACTION_CONFIG, {})
    if keys is not None and not (isinstance(keys, list) and keys and all(isinstance(key, str) for key in keys)):
        raise ConfigError(f"train.{ACTION_KEYS} is {str(keys)[:60]!r} in the robomimic config; give a list of names")
    if not isinstance(settings, dict) or not all(isinstance(item, dict) for item in settings.values()):
        raise ConfigError(f"train.{ACTION_CONFIG} of the robomimic config must be an object per action key")
    for key, item in settings.items():
        if key in (keys or ("actions",)) and item.get("convert_at_runtime") is not None:
            raise ConfigError(
                f"train.{ACTION_CONFIG} converts the rotation of {key}; store actions in the form that the robot takes"
            )
    used = _normalizations(train)
    if len(used) > 1 or not set(used) <= {None, *NORMALIZATIONS}:
        raise ConfigError(
            f"train.{ACTION_CONFIG} normalises action keys by {', '.join(map(str, used))}; give all of them one of "
            f"{', '.join(NORMALIZATIONS)}, or null"
        )


def _normalizations(train: Mapping[str, Any]) -> list[Any]:
    """Returns the distinct normalisations of the action keys."""
    settings = train.get(ACTION_CONFIG) or {}
    found = [settings.get(key, {}).get("normalization") for key in train.get(ACTION_KEYS) or ("actions",)]
    return list(dict.fromkeys(found))


def _check_types(given: Mapping[str, Any], defaults: Mapping[str, Any], path: Path, place: str = "") -> None:
    """Compares the types of settings with those of robomimic's defaults. A setting may always be null.

    Raises:
        ConfigError: a setting has another type, is not finite, or is larger than any sensible size.
    """
    for key in given.keys() & defaults.keys():
        value, default, here = given[key], defaults[key], f"{place}{key}"
        if value is None:
            continue
        if isinstance(default, dict) and isinstance(value, dict):
            _check_types(value, default, path, f"{here}.")
            continue
        for kind, (accepted, words) in TYPES.items():
            if isinstance(default, kind):
                if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
                    raise ConfigError(f"{path}: {here} is {str(value)[:60]!r}, but robomimic expects {words}")
                break
        for number in value if isinstance(value, list) else (value,):
            if isinstance(number, int | float) and not abs(number) <= (LARGEST if key == "seed" else MOST):
                raise ConfigError(f"{path}: {here} is {number:.6g}; give a number between -{MOST} and {MOST}")
            if isinstance(default, list) and default and type(number) is not type(default[0]):
                raise ConfigError(f"{path}: {here} holds {str(number)[:60]!r}; robomimic's default is {default}")


def check_classes(value: Any, place: str = "") -> None:
    """Checks that a config names only classes of ``CLASSES``, because robomimic executes class names as code.

    Raises:
        ConfigError: a setting names another class.
    """
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        here = f"{place}.{key}" if place else str(key)
        known = CLASSES.get(str(key), ())
        if str(key).endswith("_class") and item is not None and item not in known:
            raise ConfigError(f"{here} is {str(item)[:60]!r}: robomimic would execute it as code; {available(known)}")
        check_classes(item, here)


def with_horizons(
    config: RobomimicConfig, *, frame_stack: int | None, seq_length: int | None, batch_size: int | None
) -> RobomimicConfig:
    """Returns the config with the given values; also sets a transformer's context and an RNN's horizon."""
    changed = json.loads(json.dumps(config.json))
    asked = {"frame_stack": frame_stack, "seq_length": seq_length, "batch_size": batch_size}
    changed["train"] |= {name: value for name, value in asked.items() if value is not None}
    if frame_stack is not None and config.transformer:
        changed["algo"]["transformer"]["context_length"] = frame_stack
    if seq_length is not None and config.recurrent:
        changed["algo"]["rnn"]["horizon"] = seq_length
    return RobomimicConfig(json=changed)


def check_name(policy: str) -> None:
    """Raises ConfigError unless ``policy`` is ``robomimic:`` and one of ``ALGORITHMS``."""
    short = policy.removeprefix(PREFIX)
    if short not in ALGORITHMS:
        raise ConfigError(f"there is no policy {policy!r}; {available([PREFIX + name for name in ALGORITHMS], policy)}")


def require_robomimic() -> None:
    """Imports robomimic; raises MissingExtraError if it is not installed."""
    try:
        with quiet(), warnings.catch_warnings():
            for package in ("robomimic", "torchvision"):
                warnings.filterwarnings("ignore", module=rf"{package}\b")
            for module in ("robomimic.algo", "robomimic.config", "robomimic.utils.obs_utils"):
                importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"robomimic's algorithms need robomimic 0.3 ({error}): {install_command('robomimic')}"
        ) from error
    warnings.filterwarnings("ignore", message=KNOWN_WARNING)


@contextmanager
def quiet() -> Iterator[None]:
    """Redirects robomimic's prints from stdout, which may hold one JSON object, to the debug log."""
    said = io.StringIO()
    with redirect_stdout(said):
        yield
    if said.getvalue().strip():
        logger.debug("robomimic: %s", said.getvalue().strip())


def _defaults(algorithm: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    require_robomimic()
    from robomimic.config import config_factory

    config = config_factory(algorithm)
    if given is not None:
        with config.values_unlocked():
            config.update(given)
    value: dict[str, Any] = json.loads(config.dump())
    return value


def _check_obs(config: RobomimicConfig, path: Path) -> None:
    modalities = config.json["observation"]["modalities"]
    for modality, keys in modalities["obs"].items():
        if keys and modality not in OBS_MODALITIES:
            raise ConfigError(f"{path} has obs of modality {modality}; {available(OBS_MODALITIES)}")
    if any(modalities["goal"].values()) or config.json["train"]["goal_mode"] is not None:
        raise ConfigError(f"{path} conditions on goals, which a cache does not hold; remove goal_mode and goal keys")
    if not config.cameras:
        raise ConfigError(f"{path} names no cameras; list cameras of the cache under observation.modalities.obs.rgb")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
