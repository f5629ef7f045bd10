"""A policy of a robomimic algorithm: frozen encoders, normalisation, and actions from raw images."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cache_pipeline.encoders.frozen import FrozenEncoder, frozen_encoders
from cache_pipeline.encoders.image_encoder import ImageEncoder
from cache_pipeline.encoders.obs import acting_obs, is_frames
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.errors import CheckpointError, ConfigError, available
from cache_pipeline.policies.robomimic.config import (
    CONFIG_ERRORS,
    RobomimicConfig,
    quiet,
    require_robomimic,
)
from cache_pipeline.policies.spec import PolicySpec
from cache_pipeline.text import module_name

NETS, MEAN, STD, ACTION = "nets.", "obs_mean/", "obs_std/", "action/"
CONFIG = "config"

# Added to deviations by robomimic's SequenceDataset.normalize_obs.
STD_FLOOR = 1e-3


class RobomimicPolicy:
    """Maps obs to actions in dataset units: frozen features, flattened, then robomimic's networks.

    A recurrent policy has a hidden state: call ``start_episode`` at every reset, then ``act`` once per step.

    Args:
        algo: robomimic's algorithm object, on its device.
        config: the config of ``algo``.
        spec: cameras, low-dim keys and their shapes.
        encoders: camera → encoder, cut.
        features: camera → shape of a feature at the cut.

    Attributes:
        encoders: camera → its frozen encoder.
        frozen_trunks: camera → the fast path of its encoder, for frames; made in fp32 when frames come first.
        mean, std: key → statistics of one row; empty without normalisation.
        action_center, action_scale: (A,) of normalised actions; 0 and 1 without normalisation.
    """

    def __init__(
        self,
        algo: Any,
        config: RobomimicConfig,
        spec: PolicySpec,
        encoders: Mapping[str, ImageEncoder],
        features: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.algo, self.config, self._spec = algo, config, spec
        self.encoders, self._features = dict(encoders), dict(features)
        self.frozen_trunks: dict[str, FrozenEncoder] = {}
        self._last_batch = 0
        self.mean: dict[str, Tensor] = {}
        self.std: dict[str, Tensor] = {}
        self.env_args: dict[str, Any] | None = None
        self.action_keys: tuple[str, ...] = ("actions",)
        self.render_flags: dict[str, Any] | None = None
        self.action_center = torch.zeros(spec.action_dim, device=self.device)
        self.action_scale = torch.ones(spec.action_dim, device=self.device)
        if config.normalize_obs:
            for key, shape in self.shapes.items():
                self.mean[key] = torch.zeros(shape, device=self.device)
                self.std[key] = torch.ones(shape, device=self.device)

    @property
    def cameras(self) -> dict[str, tuple[int, int]]:
        """Camera → (H, W) of its frames."""
        return {camera: (shape[0], shape[1]) for camera, shape in self._spec.cameras.items()}

    @property
    def low_dim(self) -> dict[str, tuple[int, ...]]:
        """Low-dim key → shape of one row."""
        return self._spec.low_dim

    @property
    def preprocessing(self) -> dict[str, Preprocess]:
        """Camera → what happens to its frames before the encoder."""
        return {camera: Preprocess.from_json(value) for camera, value in self._spec.preprocess.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Obs key → shape of one row in the input of the networks; features are flat."""
        return obs_shapes(self._spec, self._features)

    @property
    def obs_horizon(self) -> int:
        """To: the context length of a transformer, else 1."""
        return self._spec.obs_horizon

    @property
    def action_horizon(self) -> int:
        return 1

    @property
    def action_dim(self) -> int:
        return self._spec.action_dim

    @property
    def device(self) -> torch.device:
        return torch.device(self.algo.device)

    def start_episode(self) -> None:
        """Resets the hidden state."""
        self._last_batch = 0
        self.algo.reset()

    def for_episode(self) -> RobomimicPolicy:
        """Returns a policy with the same networks and a hidden state of its own, for an episode among others."""
        other = copy.copy(self)
        other.algo = copy.copy(self.algo)
        other.start_episode()
        return other

    def eval(self) -> None:
        self.algo.set_eval()

    def train(self) -> None:
        self.algo.set_train()

    @torch.no_grad()
    def act(self, obs: Mapping[str, Any], generator: torch.Generator | None = None) -> Tensor:
        """Returns the action (B,1,A) for the last obs step.

        Args:
            obs: NumPy arrays or tensors: per camera images (B,To,H,W,3) or (B,To,3,H,W), uint8 or float on 0–1, or
                features at the cut; per low-dim key (B,To,…) of any number type. Other keys are ignored.
            generator: generator of the policy's samples; default: torch's global generator.

        Raises:
            ConfigError: wrong number of steps.
            EncoderError: a key is missing, or has a wrong shape, dtype or range.
        """
        obs = acting_obs(obs, self.cameras, self._features, self.low_dim, self.obs_horizon)
        seen = self.prepare(obs, self.obs_horizon)
        batch = len(next(iter(seen.values())))
        if batch != self._last_batch:
            self.start_episode()
            self._last_batch = batch
        with self._drawing(generator):
            return self._ask(seen, -1).unsqueeze(1)

    @torch.no_grad()
    def encode(self, camera: str, frames: Tensor) -> Tensor:
        """Returns the features at the cut (M, …) of frames (M,H,W,3); :meth:`act` takes them in place of frames."""
        return self._encoded(camera, frames.to(self.device).unsqueeze(0))[0]

    @torch.no_grad()
    def predict(self, obs: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Predicts actions in windows of a demo, each from a fresh state: (B,T,A) if recurrent, else (B,1,A).

        A recurrent policy gets the demo's obs step by step. The hidden state is reset before and after.
        """
        steps = next(iter(obs.values())).shape[1]
        seen = self.prepare(obs, steps)
        self.start_episode()
        with self._drawing(generator):
            asked = range(steps) if self.config.recurrent else [-1]
            actions = [self._ask(seen, step) for step in asked]
        self.start_episode()
        return torch.stack(actions, dim=1)

    def prepare(self, obs: Mapping[str, Tensor], steps: int) -> dict[str, Tensor]:
        """Converts obs to the input of the networks, key → (B,T,…): encodes frames, flattens features, normalises."""
        seen = {}
        for key, shape in self.shapes.items():
            if key not in obs:
                raise ConfigError(f"the policy needs the obs {key!r}; {available(obs, key)}")
            if obs[key].shape[1] != steps:
                raise ConfigError(f"{key} has {obs[key].shape[1]} obs steps; this policy takes {steps}")
            values = self._encoded(key, obs[key].to(self.device))
            values = values.float().reshape(*values.shape[:2], *shape)
            seen[module_name(key)] = (values - self.mean[key]) / self.std[key] if self.mean else values
        return seen

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors of a checkpoint: networks and statistics, without the frozen encoders."""
        return {
            **{NETS + name: value.detach() for name, value in self._own().items()},
            **{MEAN + key: value for key, value in self.mean.items()},
            **{STD + key: value for key, value in self.std.items()},
            **self._action_tensors(),
        }

    def _action_tensors(self) -> dict[str, Tensor]:
        if self.config.action_normalization is None:
            return {}
        return {ACTION + "center": self.action_center, ACTION + "scale": self.action_scale}

    def normalized(self, actions: Tensor) -> Tensor:
        """Returns actions (…,A) of the dataset as the networks predict them."""
        return (actions - self.action_center) / self.action_scale if self._action_tensors() else actions

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads the tensors of ``tensors``; raises CheckpointError if names or shapes do not fit."""
        own = self.tensors()
        if odd := sorted(own.keys() ^ tensors.keys()):
            raise CheckpointError(f"the checkpoint does not fit the run's policy: {odd[0]} is in one of them only")
        for name, value in own.items():
            if tensors[name].shape != value.shape:
                raise CheckpointError(
                    f"the checkpoint does not fit the run's policy: {name} has the shape "
                    f"{tuple(tensors[name].shape)}, not {tuple(value.shape)}"
                )
        for key in self.mean:
            self.mean[key] = tensors[MEAN + key].to(self.device)
            self.std[key] = tensors[STD + key].to(self.device)
        with torch.no_grad():
            for name, value in self._action_tensors().items():
                value.copy_(tensors[name])
            for name, value in self._own().items():
                value.copy_(tensors[NETS + name])

    def _own(self) -> dict[str, Tensor]:
        """Returns the tensors of the networks; a tensor with several names in robomimic only under the first."""
        named: dict[int, tuple[str, Tensor]] = {}
        for name, value in self.algo.nets.state_dict(keep_vars=True).items():
            named.setdefault(id(value), (name, value))
        return dict(named.values())

    def _ask(self, seen: Mapping[str, Tensor], step: int) -> Tensor:
        """Returns (B,A) for one step, or for the whole context of a transformer."""
        obs = dict(seen) if self.config.transformer else {key: values[:, step] for key, values in seen.items()}
        actions: Tensor = self.algo.get_action(obs_dict=obs)
        return actions * self.action_scale + self.action_center if self._action_tensors() else actions

    def _encoded(self, key: str, values: Tensor) -> Tensor:
        if key not in self._features or not is_frames(values, self._features[key]):
            return values
        if not self.frozen_trunks:
            self.frozen_trunks = frozen_encoders(self.encoders, self.preprocessing, self.device, "fp32")
        # A tensor of inference mode cannot be used in other modes; its copy can.
        features = self.frozen_trunks[key](values.flatten(0, 1)).clone()
        return features.view(*values.shape[:2], *features.shape[1:])

    @contextmanager
    def _drawing(self, generator: torch.Generator | None) -> Iterator[None]:
        """Seeds torch's global generator, which robomimic uses, from ``generator``, and restores it afterwards."""
        if generator is None:
            yield
            return
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(int(seed))
            yield


def obs_shapes(spec: PolicySpec, features: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Returns obs key → shape of one row, in the order in which robomimic concatenates them."""
    flat = {camera: (int(torch.Size(shape).numel()),) for camera, shape in features.items()}
    return dict(sorted({**spec.low_dim, **flat}.items()))


def build_robomimic_policy(
    spec: PolicySpec, encoders: Mapping[str, ImageEncoder], device: torch.device, seed: int = 0
) -> RobomimicPolicy:
    """Builds the algorithm of ``spec.options["config"]``; its weights depend only on ``seed``.

    Raises:
        ConfigError: robomimic does not accept the config. MissingExtraError: robomimic is not installed.
    """
    require_robomimic()
    features = {}
    for camera, (height, width, _) in spec.cameras.items():
        size = Preprocess.from_json(spec.preprocess[camera]).output_shape(height, width)
        features[camera] = encoders[camera].feature_shape(*size)
    try:
        config = RobomimicConfig(json=spec.options[CONFIG])
        algo = _algo(config, obs_shapes(spec, features), spec.action_dim, device, seed)
    except CONFIG_ERRORS as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"robomimic does not accept the config of {spec.name}: {' '.join(str(error).split())}"
        ) from error
    return RobomimicPolicy(algo, config, spec, encoders, features)


def _algo(
    config: RobomimicConfig, shapes: Mapping[str, tuple[int, ...]], action_dim: int, device: torch.device, seed: int
) -> Any:
    from robomimic.algo import algo_factory
    from robomimic.config import config_factory
    from robomimic.utils import obs_utils

    with quiet(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        theirs = config_factory(config.algorithm)
        with theirs.values_unlocked():
            theirs.update(config.library_json)
        obs_utils.initialize_obs_utils_with_config(theirs)
        algo = algo_factory(
            algo_name=config.algorithm,
            config=theirs,
            obs_key_shapes=OrderedDict((module_name(key), list(shape)) for key, shape in shapes.items()),
            ac_dim=action_dim,
            device=device,
        )
    algo.set_train()
    return algo
