"""A policy from raw images or cached features: obs encoder, normalisation and action head."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cache_pipeline.encoders.frozen import FrozenEncoder
from cache_pipeline.encoders.image_encoder import ImageEncoder
from cache_pipeline.encoders.obs import acting_obs, camera_frames, is_frames
from cache_pipeline.encoders.obs_encoder import MultiImageObsEncoder
from cache_pipeline.encoders.precision import autocast_dtype, computing_in
from cache_pipeline.encoders.preprocess import Preprocess, preprocess
from cache_pipeline.encoders.view_spec import ViewSpec
from cache_pipeline.errors import CheckpointError, ConfigError
from cache_pipeline.policies.augment import draw_views
from cache_pipeline.policies.batch import Batch
from cache_pipeline.policies.draws import Draws, normal, uniform
from cache_pipeline.policies.normalizer import ROUNDING, ActionNormalizer, Normalization, Normalizer
from cache_pipeline.policies.rotations import RotationSlices
from cache_pipeline.text import module_name

ENCODERS = "obs_encoder.key_model_map."


class VisuomotorPolicy(nn.Module):
    """Maps obs of To steps to actions: encoder, normalisation and projection per step, then the action head.

    Features and low-dim obs are normalised as one vector to mean 0 and deviation 1. Without this, a projection of
    features of random weights learns slowly, because they vary by a few percent of their mean.

    Args:
        obs_encoder: cameras, encoders and projection.
        policy: ``loss(cond, actions, mask, generator)`` and ``act(cond, generator)`` in normalised action units.
        shape: (To, Ta, A).
        clip_actions: whether normalised actions are clipped to [-1, 1] when acting.
        rotations: slices of the action that are axis-angle rotations; the policy predicts six numbers for each.

    Attributes:
        augmentation: augmentation of frames in training, one draw per window; ``None``: off.
        feature_noise: standard deviation of noise on normalised features in training.
        feature_dropout: fraction of normalised features set to 0 in training; the others are scaled up.
        precision: precision of encoders, projection and action head in :meth:`loss`: ``fp32``, ``tf32``, ``bf16`` or
            ``fp16``. Weights, normalisation and sums stay in float32. :meth:`act` uses it only for encoders that are
            being trained, and float32 otherwise.
        frozen_trunks: camera → fast path of the layers below the cut, if these are all frozen.
    """

    def __init__(
        self,
        obs_encoder: MultiImageObsEncoder,
        policy: nn.Module,
        shape: tuple[int, int, int],
        *,
        clip_actions: bool,
        rotations: tuple[tuple[int, int], ...] = (),
    ) -> None:
        super().__init__()
        self.obs_encoder = obs_encoder
        self.policy: Any = policy
        self.obs_horizon, self.action_horizon, self.action_dim = shape
        self.clip_actions = clip_actions
        self.inputs = Normalizer((cast(nn.Linear, obs_encoder.projection[0]).in_features,))
        self.actions = ActionNormalizer(RotationSlices(rotations, self.action_dim))
        self.feature_noise = self.feature_dropout = 0.0
        self.augmentation: ViewSpec | None = None
        self.frozen_trunks: Mapping[str, FrozenEncoder] = {}
        self.precision = "fp32"
        self.carries_encoder = False
        self.env_args: dict[str, Any] | None = None
        self.action_keys: tuple[str, ...] = ("actions",)
        self.render_flags: dict[str, Any] | None = None

    @property
    def cameras(self) -> dict[str, tuple[int, int]]:
        """Camera → (H, W) of its frames."""
        return self.obs_encoder.shapes.cameras

    @property
    def low_dim(self) -> dict[str, tuple[int, ...]]:
        """Low-dim key → shape of one row."""
        return self.obs_encoder.shapes.low_dim

    @property
    def encoders(self) -> dict[str, ImageEncoder]:
        """Camera → its encoder, as it is now."""
        return dict(self.obs_encoder.key_model_map.items())

    @property
    def preprocessing(self) -> dict[str, Preprocess]:
        """Camera → what happens to its frames before the encoder."""
        return self.obs_encoder.preprocessing

    @property
    def device(self) -> torch.device:
        return self.actions.scale.device

    @property
    def noise_shape(self) -> tuple[int, ...] | None:
        """Shape without B of the standard normal ``noise`` of ``act``; ``None`` for a deterministic policy."""
        return getattr(self.policy, "noise_shape", None)

    @torch.no_grad()
    def fit(
        self,
        features: Mapping[str, Tensor],
        low_dim: Mapping[str, NDArray],
        actions: NDArray,
        normalization: Normalization,
    ) -> None:
        """Computes the normalisation statistics of the train split.

        Args:
            features: camera → (n, …) features at the cut of a sample of rows.
            low_dim: key → (N, …) of all rows. actions: (N, A) of all rows.
            normalization: normalisation of the actions.
        """
        parts = []
        for camera, width in self.obs_encoder.pooled_widths.items():
            if module_name(camera) in self.obs_encoder.pooling:
                # keypoints lie on -1 to 1 and change as they are trained
                parts.append(Normalizer((width,)))
                continue
            encoder, split = self.obs_encoder.key_model_map[camera], torch.split(features[camera], 256)
            with computing_in("fp32", self.device):
                rows = torch.cat([encoder.head(part.to(self.device).float()) for part in split]).cpu().numpy()
            parts.append(Normalizer(rows.shape[1:]).fit(rows, "gaussian", ROUNDING["float16"]))
        for key, shape in self.low_dim.items():
            parts.append(Normalizer(shape).fit(np.asarray(low_dim[key]), "gaussian"))
        self.inputs.join(parts)
        self.actions.fit(actions, normalization)

    def feature_variation(self) -> float | None:
        """Returns the RMS deviation of the features divided by the RMS of their mean: the smallest of all cameras.

        About 0.05 for random ResNets and above 1 for ImageNet weights. Only cameras whose features are normalised
        count; None if there are none, as with spatial softmax.
        """
        found, start = [], 0
        for camera, width in self.obs_encoder.pooled_widths.items():
            part = slice(start, start + width)
            start += width
            if module_name(camera) not in self.obs_encoder.pooling:
                deviation, mean = self.inputs.spread[part], self.inputs.offset[part]
                found.append(float(deviation.norm() / mean.norm().clamp_min(torch.finfo(torch.float32).tiny)))
        return min(found, default=None)

    def condition(self, obs: Mapping[str, Tensor], generator: Draws = None) -> Tensor:
        """Computes the condition (B, To·emb_dim) from uint8 images or features at the cut, and low-dim obs.

        Args:
            generator: generator of augmentation, feature noise and feature dropout in training.

        Raises:
            EncoderError: a key is missing or has a wrong shape.
        """
        rows, (batch, steps) = self._rows(obs, generator)
        return self.obs_encoder.projection(rows).view(batch, steps * self.obs_encoder.out_dim)

    def loss(self, batch: Batch, generator: Draws = None) -> Tensor:
        """Computes the scalar loss of a batch in normalised action units, in ``precision``."""
        rows, (size, steps) = self._rows(batch.obs, generator)
        actions = self.actions(batch.actions)
        with self._autocast():
            cond = self.obs_encoder.projection(rows).view(size, steps * self.obs_encoder.out_dim)
            return self.policy.loss(cond, actions, batch.mask, generator)

    @torch.no_grad()
    def act(
        self, obs: Mapping[str, Any], generator: torch.Generator | None = None, *, noise: Tensor | None = None
    ) -> Tensor:
        """Returns actions (B,Ta,A) in dataset units; the first one belongs to the last obs.

        Args:
            obs: NumPy arrays or tensors: per camera images (B,To,H,W,3) or (B,To,3,H,W), uint8 or float on 0–1, or
                features at the cut; per low-dim key (B,To,…) of any number type. Other keys are ignored.
            generator: generator of the policy's noise; default: torch's global generator.
            noise: (B, *noise_shape) instead of drawn noise; the actions then depend only on ``obs`` and ``noise``.

        Raises:
            ConfigError: wrong number of obs steps, or noise of a wrong shape or for a deterministic policy.
            EncoderError: a key is missing, or has a wrong shape, dtype or range.
        """
        obs = acting_obs(obs, self.cameras, self.obs_encoder.feature_shapes, self.low_dim, self.obs_horizon)
        if noise is not None and tuple(noise.shape[1:]) != self.noise_shape:
            wanted = "none" if self.noise_shape is None else f"(B, {', '.join(map(str, self.noise_shape))})"
            raise ConfigError(f"noise has the shape {tuple(noise.shape)}; this policy takes {wanted}")
        with computing_in("fp32", self.device):
            condition = self.condition(obs)
            drawn = {"generator": generator} if noise is None else {"noise": noise}
            actions = self.policy.act(condition, **drawn)
        if self.clip_actions:
            actions = actions.clamp(-1, 1)
        return self.actions.invert(actions)

    @torch.no_grad()
    def encode(self, camera: str, frames: Any) -> Tensor:
        """Returns the features at the cut (M, …) of frames of one camera; :meth:`act` takes them in place of frames.

        Args:
            frames: (M,H,W,3) or (M,3,H,W), uint8 or float on 0–1.

        Raises:
            EncoderError: wrong shape, dtype or range.
        """
        with computing_in("fp32", self.device):
            return self._encoded(camera, {camera: frames}, None)

    def policy_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Returns named parameters of projection and action head."""
        return ((name, p) for name, p in self.named_parameters() if not name.startswith(ENCODERS))

    def encoder_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Returns named parameters of the image encoders."""
        return ((name, p) for name, p in self.named_parameters() if name.startswith(ENCODERS))

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors of a checkpoint: all tensors except those of frozen encoders."""
        state = self.state_dict()
        return {name: value for name, value in state.items() if self.carries_encoder or not name.startswith(ENCODERS)}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads the tensors of ``tensors``; raises CheckpointError if names or shapes do not fit."""
        own = self.state_dict()
        missing = [name for name in own if name not in tensors and not name.startswith(ENCODERS)]
        unknown = [name for name in tensors if name not in own]
        if missing or unknown:
            what = f"lacks {missing[0]}" if missing else f"has the unknown tensor {unknown[0]}"
            raise CheckpointError(f"the checkpoint does not fit the run's policy: it {what}")
        for name, value in tensors.items():
            if own[name].shape != value.shape:
                raise CheckpointError(
                    f"the checkpoint does not fit the run's policy: {name} has the shape {tuple(value.shape)}, "
                    f"not {tuple(own[name].shape)}"
                )
        self.load_state_dict(dict(tensors), strict=False)

    def _rows(self, obs: Mapping[str, Tensor], draws: Draws) -> tuple[Tensor, tuple[int, ...]]:
        """Returns normalised features and low-dim obs (B·To, n), and (B, To)."""
        features = self._features(obs, draws)
        with self._autocast():
            rows, leading = self.obs_encoder.join(features, obs, torch.float32)
        return self._disturbed(self.inputs(rows), draws), leading

    def _features(self, obs: Mapping[str, Tensor], draws: Draws) -> Mapping[str, Tensor]:
        shapes = self.obs_encoder.feature_shapes
        seen = [camera for camera in self.cameras if camera in obs and is_frames(obs[camera], shapes[camera])]
        return {**obs, **{camera: self._encoded(camera, obs, draws) for camera in seen}} if seen else obs

    def _encoded(self, camera: str, obs: Mapping[str, Tensor], draws: Draws) -> Tensor:
        frames, leading = camera_frames(obs, camera, self.cameras[camera])
        frames = frames.to(self.device, non_blocking=True)
        view = None
        if self.training and self.augmentation is not None:
            view = draw_views(self.augmentation, leading, draws, self.device)
        if camera in self.frozen_trunks:
            # A tensor of inference mode cannot take part in a backward pass; its copy can.
            features = self.frozen_trunks[camera](frames, view).clone()
        else:
            with self._autocast():
                images = preprocess(frames, self.obs_encoder.preprocessing[camera], view)
                features = self.obs_encoder.key_model_map[camera].trunk(images)
        return features.reshape(*leading, *features.shape[1:])

    def _disturbed(self, joined: Tensor, draws: Draws) -> Tensor:
        """Applies noise and dropout to the feature columns of normalised rows, in training."""
        if not (self.training and (self.feature_noise or self.feature_dropout)):
            return joined
        width = joined.shape[1] - sum(math.prod(shape) for shape in self.low_dim.values())
        features = joined[:, :width]
        if self.feature_noise:
            features = features + self.feature_noise * normal(tuple(features.shape), draws, joined.device)
        if self.feature_dropout:
            kept = uniform(tuple(features.shape), draws, joined.device) >= self.feature_dropout
            features = features * kept / (1 - self.feature_dropout)
        return torch.cat((features, joined[:, width:]), dim=1)

    def _autocast(self) -> Any:
        dtype = autocast_dtype(self.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)
