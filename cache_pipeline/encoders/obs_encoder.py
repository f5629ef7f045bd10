"""Observation encoder: one image encoder per camera, low-dim obs, and a small trainable projection."""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

from cache_pipeline.encoders.image_encoder import (
    EncoderSpec,
    ImageEncoder,
    build_encoder,
    make_preprocess,
    with_declared,
)
from cache_pipeline.encoders.obs import camera_frames, feature_rows, low_dim_rows, one_lead, parse_shape_meta
from cache_pipeline.encoders.pooling import SpatialSoftmax
from cache_pipeline.encoders.preprocess import Preprocess, preprocess
from cache_pipeline.encoders.resnet import as_backbone
from cache_pipeline.encoders.views import ViewBatch
from cache_pipeline.errors import EncoderError, available
from cache_pipeline.text import by_name, listed, module_name

logger = logging.getLogger("cache_pipeline")

Shape = tuple[int, int]
Model = str | nn.Module | EncoderSpec
Value = TypeVar("Value")
PerCamera: TypeAlias = Value | Mapping[str, Value] | None


class Projection(nn.Sequential):
    """Maps (B, features of all cameras + low-dim obs) to (B, emb_dim): Linear → LeakyReLU → Linear."""

    def __init__(self, in_dim: int, emb_dim: int) -> None:
        super().__init__(nn.Linear(in_dim, emb_dim), nn.LeakyReLU(), nn.Linear(emb_dim, emb_dim))


class CameraEncoders(nn.ModuleDict):
    """Camera → encoder. A shared encoder is stored, saved and counted once."""

    def __init__(self, encoders: Mapping[str, ImageEncoder], shared: bool) -> None:
        self._slots = {camera: "shared" if shared else module_name(camera) for camera in encoders}
        super().__init__({self._slots[camera]: encoder for camera, encoder in encoders.items()})

    def __getitem__(self, key: str) -> ImageEncoder:
        if key not in self._slots:
            raise KeyError(f"there is no camera {key!r}; {available(self._slots, key)}")
        return self._modules[self._slots[key]]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: object) -> bool:
        return key in self._slots

    def distinct(self) -> list[ImageEncoder]:
        """Returns every encoder once."""
        return cast("list[ImageEncoder]", list(self._modules.values()))

    def keys(self) -> Any:
        """Returns the cameras."""
        return self._slots.keys()

    def values(self) -> Any:
        """Returns one encoder per camera."""
        return [self[camera] for camera in self._slots]

    def items(self) -> Any:
        """Returns (camera, encoder) pairs."""
        return [(camera, self[camera]) for camera in self._slots]


class MultiImageObsEncoder(nn.Module):
    """Maps observations to (B[,T], emb_dim): image features of each camera and low-dim obs, then a projection.

    Args:
        shape_meta: ``{'obs': {key: {'shape': …, 'type': 'rgb' | 'low_dim'}}}``; features of cameras, then low-dim
            obs, are concatenated in this order.
        rgb_model_name: the name of a ResNet, ``file.py:factory``, an ``EncoderSpec``, a module, or a dict from camera
            to one of these. A module keeps its weights; unless shared, each camera gets a copy.
        emb_dim: width of the output.
        pretrained: load ImageNet weights or the file in ``weights``; if false, draw random weights from ``seed``.
        freeze_rgb_encoder: do not train the encoders; see ``unfreeze_rgb_encoder``.
        share_rgb_model: use one encoder for all cameras.
        imagenet_norm: ImageNet normalisation; ``None``: as the encoder declares, else on with pretrained weights.
        weights: a ``.pth`` or ``.safetensors`` file instead of the ImageNet weights.
        seed: seed of random weights.
        resize_shape, crop_shape: (H, W) in pixels, for all cameras or per camera.
        random_crop: in training, one random crop position per window; in eval, the centre.
        use_group_norm: GroupNorm instead of BatchNorm; only with random weights.
        cut: layer of ``features``; see ``docs/encoders.md``.
        pooling: of the last feature map: ``avg``, or ``spatial_softmax`` (trainable, for cuts below avgpool).
        gradient_checkpointing: recompute activations in the backward pass of the encoders to save memory.
        train_batch_norm: update BatchNorm statistics of trained layers; ``None``: only for random weights that are not
            frozen.
        preprocess: one ``Preprocess``, or one per camera, instead of the options above.
        verbose: log the encoders, their weights, and how many parameters are trainable.

    Attributes:
        key_model_map: camera → ``ImageEncoder``, with torchvision's parameter names under ``net.``.
        preprocessing: camera → ``Preprocess``.
        feature_shapes: camera → shape of a feature at the cut.
        pooled_widths: camera → width of its pooled feature in the input of the projection.
        projection: the trainable MLP.

    Raises:
        EncoderError: inconsistent options, or weights that cannot be loaded.
    """

    def __init__(
        self,
        shape_meta: Mapping[str, Any],
        rgb_model_name: Model | Mapping[str, Model] = "resnet18",
        emb_dim: int = 256,
        pretrained: bool = True,
        freeze_rgb_encoder: bool = True,
        share_rgb_model: bool = False,
        imagenet_norm: bool | None = None,
        *,
        weights: str | None = None,
        seed: int = 0,
        resize_shape: PerCamera[Shape] = None,
        crop_shape: PerCamera[Shape] = None,
        random_crop: bool = False,
        use_group_norm: bool = False,
        cut: str = "avgpool",
        pooling: Literal["avg", "spatial_softmax"] = "avg",
        gradient_checkpointing: bool = False,
        train_batch_norm: bool | None = None,
        preprocess: PerCamera[Preprocess] = None,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        self.shapes = parse_shape_meta(shape_meta)
        cameras = list(self.shapes.cameras)
        if weights is not None and not pretrained:
            raise EncoderError(f"weights {weights} contradicts pretrained=False: leave out one of the two")
        source = (weights or "imagenet") if pretrained else "random"
        options = {"weights": source, "seed": seed, "cut": cut, "use_group_norm": use_group_norm}
        self.key_model_map = CameraEncoders(_build(rgb_model_name, cameras, share_rgb_model, options), share_rgb_model)
        self.random_crop = random_crop
        if preprocess is not None and any(x is not None for x in (resize_shape, crop_shape, imagenet_norm)):
            raise EncoderError(
                "preprocess sets resize, crop and normalisation: leave out resize_shape, crop_shape and imagenet_norm"
            )
        given = _per_camera("preprocess", preprocess, cameras)
        sizes = _per_camera("resize_shape", resize_shape, cameras)
        crops = _per_camera("crop_shape", crop_shape, cameras)
        self.preprocessing = {
            camera: with_declared(encoder, given[camera])
            if given[camera] is not None
            else make_preprocess(
                encoder, resize_shape=sizes[camera], crop_shape=crops[camera], imagenet_norm=imagenet_norm
            )
            for camera, encoder in self.key_model_map.items()
        }
        self._check_crops()
        self.feature_shapes: dict[str, tuple[int, ...]] = {}
        self.pooling = nn.ModuleDict()
        self.pooled_widths = {camera: self._add_camera(camera, pooling) for camera in cameras}
        low_dim = sum(math.prod(shape) for shape in self.shapes.low_dim.values())
        self.projection = Projection(sum(self.pooled_widths.values()) + low_dim, emb_dim)
        self.out_dim = emb_dim
        scratch = not (pretrained or freeze_rgb_encoder)
        self._set_training_options(gradient_checkpointing, scratch if train_batch_norm is None else train_batch_norm)
        if freeze_rgb_encoder:
            self.freeze_rgb_encoder()
        if verbose:
            self._log_start(freeze_rgb_encoder)

    @classmethod
    def from_config(cls, shape_meta: Mapping[str, Any], config: Mapping[str, Any]) -> MultiImageObsEncoder:
        """Builds the encoder from a config; also accepts the names ``pretrained_encoder`` and ``freeze_encoder``.

        Raises:
            EncoderError: unknown option.
        """
        names = {"pretrained_encoder": "pretrained", "freeze_encoder": "freeze_rgb_encoder"}
        options = {names.get(key, key): value for key, value in config.items() if (key, value) != ("encoder", "image")}
        known = [name for name in inspect.signature(cls).parameters if name != "shape_meta"]
        for key in options:
            if key not in known:
                raise EncoderError(f"the encoder has no option {key!r}; {available([*names, *known], key)}")
        return cls(shape_meta, **options)

    def forward(self, obs: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        """Maps observations (B[,T],…) to (B[,T], emb_dim).

        Args:
            obs: per camera images (B[,T],3,H,W) or (B[,T],H,W,3), uint8 or float on 0–1; low-dim obs (B[,T],…).
            generator: generator of random crops in training.

        Raises:
            EncoderError: a missing key, or a wrong shape, dtype or range.
        """
        return self.project(self.features(obs, generator=generator), obs)

    def features(self, obs: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Returns camera → features at the cut, (B[,T],D) or (B[,T],D,h,w), as a cache holds them."""
        features = {}
        for camera, size in self.shapes.cameras.items():
            frames, leading = camera_frames(obs, camera, size)
            frames = frames.to(self.device, non_blocking=True)
            view = self._random_view(leading, generator) if self.training and self.random_crop else None
            images = preprocess(frames, self.preprocessing[camera], view)
            features[camera] = _split(self.key_model_map[camera].trunk(images), leading)
        return features

    def project(self, features: Mapping[str, Tensor], low_dim: Mapping[str, Tensor]) -> Tensor:
        """Maps features at the cut (live or cached) and low-dim obs to (B[,T], emb_dim). Arguments as in ``join``."""
        rows, leading = self.join(features, low_dim)
        return _split(self.projection(rows), leading)

    def join(
        self, features: Mapping[str, Tensor], low_dim: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> tuple[Tensor, tuple[int, ...]]:
        """Returns the input of the projection (pooled features, then low-dim obs) and its leading shape (B,) or (B,T).

        Args:
            features: camera → (B[,T],D) or (B[,T],D,h,w), any float dtype.
            low_dim: key → (B[,T],…); other keys are ignored.
            dtype: dtype of the result; default: that of the projection's weights.
        """
        device, dtype = self.device, dtype or self._weight.dtype
        parts: list[Tensor] = []
        leads: dict[str, tuple[int, ...]] = {}
        for camera, shape in self.feature_shapes.items():
            rows, leads[camera] = feature_rows(features, camera, shape)
            parts.append(self._pooled(camera, rows.to(device, dtype)))
        for key, shape in self.shapes.low_dim.items():
            rows, leads[key] = low_dim_rows(low_dim, key, shape)
            parts.append(rows.to(device))
        leading = one_lead(leads)
        return torch.cat([part.to(dtype) for part in parts], dim=-1), leading

    def cut_at(self, cut: str) -> None:
        """Moves the cut of all encoders.

        Raises:
            EncoderError: an encoder is not a ResNet, or the cut does not exist.
        """
        for encoder in self.key_model_map.distinct():
            encoder.cut_at(cut)
        for camera, encoder in self.key_model_map.items():
            size = self.preprocessing[camera].output_shape(*self.shapes.cameras[camera])
            self.feature_shapes[camera] = encoder.feature_shape(*size)

    def freeze_rgb_encoder(self) -> None:
        """Freezes all encoders; projection and spatial softmax stay trainable."""
        self.key_model_map.requires_grad_(False)
        self.train(self.training)

    def unfreeze_rgb_encoder(self, layers: Sequence[str] | None = None) -> None:
        """Unfreezes all layers of the encoders, or only the named layers.

        Add the parameters to your optimiser. BatchNorm statistics stay constant; see ``train_batch_norm``.

        Args:
            layers: for a ResNet ``conv1``, ``bn1``, ``layer1`` … ``layer4``; for other modules names of children.

        Raises:
            EncoderError: an encoder has no such layer.
        """
        for encoder in self.key_model_map.distinct():
            for layer in layers or ():
                if layer not in encoder.layers:
                    known = available(encoder.layers, layer)
                    raise EncoderError(f"{encoder.architecture} has no layer {layer!r}; {known}")
                encoder.layers[layer].requires_grad_(True)
            if layers is None:
                encoder.requires_grad_(True)
        self.train(self.training)
        logger.info("unfroze %s of the RGB encoder; %s", ", ".join(layers or ["all"]), self.parameter_report())

    def parameter_report(self) -> str:
        """Returns ``Encoder: 197,888 / 11,374,400 parameters trainable (1.7%)``; shared parameters count once."""
        total = sum(p.numel() for p in self.parameters())
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return f"Encoder: {trainable:,} / {total:,} parameters trainable ({trainable / total:.1%})"

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self._weight.device

    @property
    def _weight(self) -> Tensor:
        return cast(nn.Linear, self.projection[0]).weight

    def _pooled(self, camera: str, features: Tensor) -> Tensor:
        encoder = self.key_model_map[camera]
        if features.dim() == 4:
            features = features.contiguous(memory_format=torch.channels_last)
        if module_name(camera) not in self.pooling:
            return encoder.head(features)
        return cast(Tensor, self.pooling[module_name(camera)](encoder.head_map(features)))

    def _random_view(self, leading: tuple[int, ...], generator: torch.Generator | None) -> ViewBatch:
        device = self.device if generator is None else generator.device
        crop = torch.rand(leading[0], 2, generator=generator, device=device)
        return ViewBatch(crop.repeat_interleave(math.prod(leading[1:]), dim=0).to(self.device))

    def _check_crops(self) -> None:
        bare = [camera for camera, p in self.preprocessing.items() if p.crop_shape is None]
        if self.random_crop and bare:
            raise EncoderError(f"random_crop needs a crop_shape for {bare[0]}, such as (76, 76) for 84×84 frames")

    def _add_camera(self, camera: str, pooling: str) -> int:
        encoder = self.key_model_map[camera]
        size = self.preprocessing[camera].output_shape(*self.shapes.cameras[camera])
        self.feature_shapes[camera] = encoder.feature_shape(*size)
        if pooling == "avg":
            return encoder.head_shape(*size, pooled=True)[0]
        if pooling != "spatial_softmax":
            raise EncoderError(f"there is no pooling {pooling!r}; {available(('avg', 'spatial_softmax'), pooling)}")
        shape = encoder.head_shape(*size, pooled=False)
        if len(shape) != 3:
            raise EncoderError(
                f"{camera}: spatial softmax needs feature maps, but the cut {encoder.cut} gives pooled features; "
                f"take cut layer4 (--cut layer4)"
            )
        self.pooling[module_name(camera)] = SpatialSoftmax((shape[0], shape[1], shape[2]))
        return cast(SpatialSoftmax, self.pooling[module_name(camera)]).out_dim

    def _set_training_options(self, gradient_checkpointing: bool, train_batch_norm: bool) -> None:
        for encoder in self.key_model_map.distinct():
            encoder.train_batch_norm = train_batch_norm
            if gradient_checkpointing:
                encoder.enable_gradient_checkpointing()
        self.train(self.training)

    def _log_start(self, frozen: bool) -> None:
        self.log_encoders()
        if frozen:
            logger.info("froze the RGB encoder: only layers above it are trained")
        logger.info("%s", self.parameter_report())

    def log_encoders(self) -> None:
        """Logs the encoder and the weights of each camera."""
        items = self.key_model_map.items()
        said = {camera: f"{encoder.architecture}, weights: {encoder.source}" for camera, encoder in items}
        for line in by_name(said, "camera"):
            logger.info("%s", line)


def _split(rows: Tensor, leading: tuple[int, ...]) -> Tensor:
    return rows.reshape(*leading, *rows.shape[1:])


def _build(
    models: Model | Mapping[str, Model], cameras: Sequence[str], shared: bool, options: Mapping[str, Any]
) -> dict[str, ImageEncoder]:
    if isinstance(models, Mapping):
        if shared:
            raise EncoderError("share_rgb_model with one encoder per camera: give one encoder, or do not share")
        return {
            camera: _one(model, options) for camera, model in _per_camera("rgb_model_name", models, cameras).items()
        }
    first = _one(models, options)
    return {camera: copy.deepcopy(first) if index and not shared else first for index, camera in enumerate(cameras)}


def _one(model: Any, options: Mapping[str, Any]) -> ImageEncoder:
    if options["weights"] not in ("imagenet", "random") and (not isinstance(model, str) or ":" in model):
        raise EncoderError(f"weights {options['weights']}: the given encoder has its own weights; leave out weights")
    if isinstance(model, ImageEncoder):
        return model
    if isinstance(model, EncoderSpec):
        return build_encoder(model)
    if isinstance(model, nn.Module):
        return ImageEncoder(as_backbone(model), options["cut"]).eval()
    if ":" in model:
        return build_encoder(EncoderSpec(factory=model, cut=options["cut"]))
    return build_encoder(EncoderSpec(rgb_model_name=model, **options))


def _per_camera(name: str, value: Any, cameras: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return dict.fromkeys(cameras, value)
    for camera in value:
        if camera not in cameras:
            raise EncoderError(f"{name} is given for the unknown camera {camera!r}; {available(cameras, camera)}")
    missing = [camera for camera in cameras if camera not in value]
    if missing:
        raise EncoderError(f"{name} is missing for the camera {missing[0]!r}; given for: {listed(value)}")
    return dict(value)
