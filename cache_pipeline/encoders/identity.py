"""Identity of an encoder's features, and statistics of features."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cache_pipeline.encoders.image_encoder import ImageEncoder
from cache_pipeline.encoders.preprocess import Preprocess

COLLAPSED_SPREAD = 1e-3


def encoder_identity(
    encoder: ImageEncoder,
    preprocess: Preprocess,
    compute: str,
    image_shape: tuple[int, ...],
    digest: str | None = None,
) -> dict[str, Any]:
    """Returns a JSON object that differs between encoders whose features at the cut differ.

    Compare all items except ``weights.source``, which names a file for the reader. ``weights.digest`` covers only the
    layers below the cut, so training the layers above does not make features stale.

    Args:
        encoder: the encoder; its cut is used.
        preprocess: preprocessing of frames.
        compute: precision of computing: ``fp32``, ``tf32``, ``bf16`` or ``fp16``.
        image_shape: (H, W, 3) of the frames.
        digest: ``encoder.trunk_digest()``, if known.
    """
    shape = preprocess.output_shape(image_shape[0], image_shape[1])
    structure = encoder.structure()
    return {
        "architecture": encoder.architecture,
        **({} if structure is None else {"structure": structure}),
        "cut": encoder.cut,
        "feature_shape": list(encoder.feature_shape(*shape)),
        "weights": {"source": encoder.source, "digest": digest or encoder.trunk_digest()},
        "preprocess": preprocess.to_json(),
        "precision": {"compute": compute},
    }


class FeatureStatistics(NamedTuple):
    """Statistics of features of N different frames.

    Attributes:
        rms: root mean square of all values.
        spread: root mean square of the deviation from the mean feature, divided by ``rms``: 0 if all frames have the
            same feature, about 0.1–0.5 for useful encoders.
        constant: fraction of the values that are equal for all frames.
        finite: whether no value is NaN or infinite.
    """

    rms: float
    spread: float
    constant: float
    finite: bool

    @property
    def collapsed(self) -> bool:
        """Whether features do not distinguish frames: a spread below ``COLLAPSED_SPREAD``, or values not finite."""
        return not self.finite or self.spread < COLLAPSED_SPREAD


def feature_statistics(features: Tensor) -> FeatureStatistics:
    """Computes statistics of features (N, …) of N different frames. The spread of one frame counts as 1."""
    flat = features.detach().flatten(1).double()
    if not bool(torch.isfinite(flat).all()):
        return FeatureStatistics(float("nan"), float("nan"), float("nan"), False)
    rms = float(flat.square().mean().sqrt())
    if len(flat) < 2:
        return FeatureStatistics(rms, 1.0, 0.0, True)
    deviation = flat - flat.mean(0)
    spread = float(deviation.square().mean().sqrt()) / rms if rms > 0 else 0.0
    return FeatureStatistics(rms, spread, float((deviation.abs().amax(0) == 0).double().mean()), True)


def collapse_warning(statistics: FeatureStatistics) -> str:
    """Returns a one-line warning for a collapsed encoder, else an empty string."""
    if not statistics.collapsed:
        return ""
    if not statistics.finite:
        return "features are not finite; use --precision fp32 or other weights"
    return (
        f"features of different frames differ by {statistics.spread:.1e} of their size: the encoder has "
        f"collapsed and a policy cannot learn from it; check its weights and normalisation"
    )
