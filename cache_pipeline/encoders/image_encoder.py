"""An image encoder: a ResNet cut into trunk and head, or a custom network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cache_pipeline.encoders.cut import CUTS, check_cut, head_stages, run_stages, trunk_stages
from cache_pipeline.encoders.factory import call_factory, structure_digest
from cache_pipeline.encoders.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from cache_pipeline.encoders.resnet import RESNETS, ResNet, get_resnet
from cache_pipeline.encoders.weights import imagenet_sha256, state_digest
from cache_pipeline.errors import EncoderError, available
from cache_pipeline.files import typed

OUTPUT = "output"
PROBE_SIDE = 224


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Network, weights and cut of an encoder."""

    rgb_model_name: str = "resnet18"
    weights: str = "imagenet"
    """``imagenet`` (torchvision's IMAGENET1K_V1), ``random``, or a ``.pth`` or ``.safetensors`` file."""
    weights_prefix: str | None = None
    """What the names of one of several ResNets in the file begin with; see ``choose_resnet``."""
    seed: int = 0
    """Seed of random weights; no effect on other weights."""
    cut: str = "avgpool"
    """``avgpool``, ``layer4``, ``layer3``, ``layer2`` or ``layer1``; always ``output`` for a factory."""
    factory: str | None = None
    """``module:factory`` or ``file.py:factory`` instead of a ResNet. The factory loads its weights, unless ``weights``
    names a file of ``save_encoder``. Building the spec runs the factory."""
    use_group_norm: bool = False
    """GroupNorm instead of BatchNorm; only for random weights."""

    def __post_init__(self) -> None:
        if self.weights_prefix is not None and (self.factory is not None or self.weights in ("imagenet", "random")):
            raise EncoderError("weights_prefix chooses one of several ResNets in a weights file; leave it out")
        if self.factory is not None:
            self._check_factory()
            object.__setattr__(self, "cut", OUTPUT)
            return
        check_cut(self.cut)
        if self.rgb_model_name not in RESNETS:
            names = available(RESNETS, self.rgb_model_name)
            raise EncoderError(f"there is no encoder {self.rgb_model_name!r}; {names}; any other network: --encoder")
        if self.use_group_norm and self.weights == "imagenet":
            raise EncoderError(
                "use_group_norm would replace the BatchNorm of ImageNet weights, and features would be meaningless; "
                "turn it off, or start from random weights (--no-pretrained-encoder)"
            )

    def _check_factory(self) -> None:
        if self.cut not in ("avgpool", OUTPUT):
            raise EncoderError(
                f"--encoder {self.factory} cannot be cut at {self.cut!r}; only ResNets have {', '.join(CUTS)}"
            )
        if self.use_group_norm:
            raise EncoderError(f"use_group_norm is for ResNets; --encoder {self.factory} brings its own layers")
        if self.weights == "random":
            raise EncoderError(
                f"--no-pretrained-encoder with --encoder {self.factory}: draw random weights in the factory"
            )
        if self.weights in ("imagenet", "factory"):
            object.__setattr__(self, "weights", "factory")
        elif not self.weights.endswith(".safetensors"):
            raise EncoderError(f"--weights {self.weights} with --encoder {self.factory}: load them in the factory")

    @property
    def source(self) -> str:
        """Origin of the weights, for the reader; not part of the identity."""
        if self.weights == "random":
            return f"random, seed {self.seed}"
        if self.factory is not None:
            return self.factory
        if self.weights == "imagenet":
            return "torchvision IMAGENET1K_V1"
        return Path(self.weights).name + ("" if self.weights_prefix is None else f", {self.weights_prefix}")

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object for a run or saved weights. It is not an identity, because it names files."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> EncoderSpec:
        """Inverts ``to_json``; raises EncoderError for any other value."""
        try:
            made: EncoderSpec = typed(value, cls)
        except ValueError as error:
            raise EncoderError(f"the recorded encoder cannot be read: {error}") from error
        return made


class ImageEncoder(nn.Module):
    """Maps preprocessed images (B,3,h,w) to features (B,D).

    Args:
        net: a ``ResNet``, or any module from (B,3,h,w) to (B,D) or (B,D,h',w').
        cut: layer between trunk and head; always the output for modules other than ``ResNet``.
        source: origin of the weights, for the reader.
        spec: the spec that builds ``net``; ``None`` for a given module, which needs a named factory to be loaded later.
        factory_source: name of the factory's file from ``call_factory``.
    """

    def __init__(
        self,
        net: nn.Module,
        cut: str = "avgpool",
        *,
        source: str = "a ready module",
        spec: EncoderSpec | None = None,
        factory_source: str | None = None,
    ):
        super().__init__()
        self.net = net
        self.cut = _cut_of(net, cut)
        self.source, self.spec, self._factory_source = source, spec, factory_source
        self.gradient_checkpointing = False
        self.train_batch_norm = False
        self._feature_shapes: dict[tuple[str, int, int], tuple[int, ...]] = {}

    def cut_at(self, cut: str) -> None:
        """Moves the cut; raises ``EncoderError`` for an unknown cut."""
        self.cut = _cut_of(self.net, cut)

    @property
    def is_resnet(self) -> bool:
        """Whether the network is a ``ResNet``, which has stages."""
        return isinstance(self.net, ResNet)

    @property
    def layers(self) -> dict[str, nn.Module]:
        """Name → child of the network, for the children that have parameters: each can be unfrozen by its name."""
        return {name: child for name, child in self.net.named_children() if any(True for _ in child.parameters())}

    @property
    def out_dim(self) -> int:
        """Width D of the pooled feature."""
        if isinstance(self.net, ResNet):
            return self.net.out_dim
        shape = _declared_shape(self.net) or (PROBE_SIDE, PROBE_SIDE)
        return self.feature_shape(*shape)[0]

    @property
    def architecture(self) -> str:
        """``resnet18``, …, or the class name of a custom module."""
        if isinstance(self.net, ResNet):
            return self.net.name + ("+groupnorm" if self.net.use_group_norm else "")
        return type(self.net).__qualname__

    def train(self, mode: bool = True) -> ImageEncoder:
        """Sets the mode as ``torch.nn.Module``, but frozen layers stay in eval mode.

        All BatchNorm stays in eval mode too, unless ``train_batch_norm`` is set: statistics of small batches of similar
        frames would harm the pretrained ones.
        """
        super().train(mode)
        if mode:
            keep_frozen_in_eval(self.net, self.train_batch_norm)
        return self

    def trunk(self, x: Tensor) -> Tensor:
        """Maps images (B,3,h,w) to the feature at the cut: (B,D) or a map (B,D,h',w')."""
        if self.training:
            keep_frozen_in_eval(self.net, self.train_batch_norm)
        if not isinstance(self.net, ResNet):
            return _checked(self.net(x), len(x), self.net)
        x = run_stages(self.net, x, trunk_stages(self.cut), self.gradient_checkpointing)
        return self.pool(x) if self.cut == "avgpool" else x

    def head_map(self, features: Tensor) -> Tensor:
        """Maps the feature at the cut to the encoder's last output before pooling."""
        if not isinstance(self.net, ResNet):
            return features
        return run_stages(self.net, features, head_stages(self.cut), self.gradient_checkpointing)

    def head(self, features: Tensor) -> Tensor:
        """Maps the feature at the cut to the pooled feature (B,D)."""
        return self.pool(self.head_map(features))

    def pool(self, features: Tensor) -> Tensor:
        """Averages a map over its positions; returns pooled features unchanged."""
        return features.mean((2, 3)) if features.dim() == 4 else features

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (B,3,h,w) to features (B,D)."""
        return self.head(self.trunk(x))

    def feature_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Returns the feature shape at the cut, (D,) or (D,h',w'), for preprocessed images of this size.

        The first call runs a forward pass.

        Raises:
            EncoderError: the network does not accept images of this size.
        """
        key = (self.cut, height, width)
        if key not in self._feature_shapes:
            self._feature_shapes[key] = self._probe(self.trunk, height, width)
        return self._feature_shapes[key]

    def head_shape(self, height: int, width: int, *, pooled: bool) -> tuple[int, ...]:
        """Returns the shape after the head: (D,) if ``pooled``, else that of the map before pooling."""
        return self._probe(lambda x: (self.head if pooled else self.head_map)(self.trunk(x)), height, width)

    def enable_gradient_checkpointing(self) -> None:
        """Keeps only the inputs of blocks for the backward pass, which recomputes the rest.

        Raises:
            EncoderError: BatchNorm statistics are trained, and would count each batch twice; or a custom module has no
                ``set_grad_checkpointing``.
        """
        if self.train_batch_norm:
            raise EncoderError("gradient checkpointing runs BatchNorm twice per step; turn off train_batch_norm")
        if self.is_resnet:
            self.gradient_checkpointing = True
        elif hasattr(self.net, "set_grad_checkpointing"):
            cast(Any, self.net).set_grad_checkpointing()
        else:
            raise EncoderError(f"{self.architecture} has no set_grad_checkpointing(); turn off gradient checkpointing")

    def _probe(self, function: Callable[[Tensor], Tensor], height: int, width: int) -> tuple[int, ...]:
        reference = next(self.parameters(), torch.empty(0))
        images = torch.zeros(1, 3, height, width, device=reference.device, dtype=reference.dtype)
        training = [module for module in self.modules() if module.training]
        try:
            self.eval()
            with torch.no_grad():
                return tuple(function(images).shape[1:])
        except (RuntimeError, AssertionError) as error:
            raise EncoderError(
                f"{self.architecture} does not take images of {height}×{width} pixels "
                f"({str(error).splitlines()[0]}); set an accepted size with --resize-shape H,W"
            ) from error
        finally:
            for module in training:
                module.training = True

    def trunk_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Returns named parameters below the cut, which determine the cached features."""
        above = tuple(f"net.{stage}." for stage in head_stages(self.cut)) if self.is_resnet else ()
        return ((name, p) for name, p in self.named_parameters() if not name.startswith(above))

    def head_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Returns named parameters above the cut, which can be trained on cached features."""
        below = {name for name, _ in self.trunk_parameters()}
        return ((name, p) for name, p in self.named_parameters() if name not in below)

    def weights_digest(self) -> str:
        """Returns a digest of all weights and BatchNorm statistics, independent of their file."""
        return state_digest(self.state_dict())

    def trunk_digest(self, cut: str | None = None) -> str:
        """Returns a digest of the weights and BatchNorm statistics below ``cut``; default: the encoder's own cut.

        Equal to ``weights_digest`` if no layer is above the cut.
        """
        above = tuple(f"net.{stage}." for stage in head_stages(cut or self.cut)) if self.is_resnet else ()
        return state_digest({name: value for name, value in self.state_dict().items() if not name.startswith(above)})

    def structure(self) -> str | None:
        """Returns ``structure_digest`` of a custom module and its factory's file; ``None`` for a ResNet."""
        return None if self.is_resnet else structure_digest(self.net, self._factory_source)


def keep_frozen_in_eval(module: nn.Module, train_batch_norm: bool) -> None:
    """Sets eval mode for every submodule whose parameters are all frozen, and for BatchNorm.

    Layers without parameters follow the module that contains them. With ``train_batch_norm``, BatchNorm of trained
    layers keeps its mode.
    """
    parameters = list(module.parameters())
    frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
    if frozen or (isinstance(module, nn.modules.batchnorm._BatchNorm) and not train_batch_norm):
        module.eval()
        return
    for child in module.children():
        keep_frozen_in_eval(child, train_batch_norm)


def _cut_of(net: nn.Module, cut: str) -> str:
    if isinstance(net, ResNet):
        check_cut(cut)
        return cut
    if cut not in ("avgpool", OUTPUT):
        raise EncoderError(f"{type(net).__name__} cannot be cut at {cut!r}; only ResNets have {', '.join(CUTS)}")
    return OUTPUT


def _checked(features: Any, count: int, net: nn.Module) -> Tensor:
    if not isinstance(features, Tensor) or features.dim() not in (2, 4) or len(features) != count:
        what = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise EncoderError(
            f"the encoder {type(net).__name__} returned {what} for {count} images; it must return (B,D) or (B,D,h,w)"
        )
    return features


def _declared_shape(net: nn.Module) -> tuple[int, int] | None:
    return cast("tuple[int, int] | None", getattr(net, "preprocess_resize_shape", None))


def build_encoder(spec: EncoderSpec) -> ImageEncoder:
    """Builds the encoder of a spec in eval mode. torch's global generator keeps its state.

    Raises:
        EncoderError: weights or factory cannot be loaded, or do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        if spec.factory is not None:
            made = call_factory(spec.factory)
            encoder = ImageEncoder(made.net, spec.cut, source=spec.source, spec=spec, factory_source=made.source)
            if spec.weights != "factory":
                load_saved(encoder, spec.weights)
        else:
            weights = None if spec.weights == "random" else spec.weights
            prefix, norm = spec.weights_prefix, spec.use_group_norm
            net = get_resnet(spec.rgb_model_name, weights, prefix=prefix, use_group_norm=norm)
            checked = f", sha256 {imagenet_sha256(spec.rgb_model_name)}" if weights == "imagenet" else ""
            encoder = ImageEncoder(net, spec.cut, source=spec.source + checked, spec=spec)
    return encoder.eval()


def load_saved(encoder: ImageEncoder, path: str | Path) -> None:
    """Loads the weights of a file of ``save_encoder`` into an encoder; raises EncoderError if they do not fit."""
    try:
        encoder.load_state_dict(load_file(path))
    except (OSError, ValueError, SafetensorError) as error:
        raise EncoderError(f"cannot read the encoder's weights from {path} ({error})") from error
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise EncoderError(f"{path} does not hold the weights of {encoder.architecture} ({reason})") from error


def make_preprocess(
    encoder: ImageEncoder,
    *,
    resize_shape: tuple[int, int] | None = None,
    crop_shape: tuple[int, int] | None = None,
    imagenet_norm: bool | None = None,
) -> Preprocess:
    """Returns the preprocessing of an encoder.

    A module declares it by the attributes ``preprocess_mean`` and ``preprocess_std`` (RGB, pixels on 0–1) and
    ``preprocess_resize_shape`` (H, W). Normalisation (declared, else ImageNet's) is on unless weights are random.

    Args:
        encoder: the encoder.
        resize_shape, crop_shape: (H, W) in pixels; ``resize_shape`` overrides a declared size.
        imagenet_norm: normalisation on or off; ``None``: as the encoder declares.
    """
    if imagenet_norm and encoder.is_resnet:
        return Preprocess(resize_shape, crop_shape, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    if imagenet_norm is None:
        imagenet_norm = encoder.spec is None or encoder.spec.weights != "random"
    return with_declared(encoder, Preprocess(resize_shape, crop_shape, imagenet_norm))


def with_declared(encoder: ImageEncoder, p: Preprocess) -> Preprocess:
    """Fills in declared values: the size if ``p`` has no resize, and mean and std instead of ImageNet's.

    Raises:
        EncoderError: the module declares only one of mean and std.
    """
    size = p.resize_shape or _declared_shape(encoder.net)
    mean, std = (getattr(encoder.net, f"preprocess_{name}", None) for name in ("mean", "std"))
    if (mean is None and std is None) or p.mean is not None or not p.imagenet_norm:
        mean, std = p.mean, p.std
    return replace(p, resize_shape=size, mean=mean, std=std)
