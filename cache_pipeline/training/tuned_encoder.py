"""The encoder of a run as something that a cache can be made with: tune, cache again, train a new head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from cache_pipeline.encoders.image_encoder import EncoderSpec
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.encoders.saving import save_encoder
from cache_pipeline.errors import CheckpointError
from cache_pipeline.training.checkpoint import find_checkpoint, load_policy

ENCODERS = "encoders"


class RunEncoders(NamedTuple):
    """Camera → encoder and preprocessing, as extraction takes them."""

    encoders: dict[str, EncoderSpec]
    preprocess: dict[str, Preprocess]


def encoders_of_run(run: Path, cut: str = "avgpool") -> RunEncoders:
    """The encoders of a run's best checkpoint, or of one checkpoint folder.

    Their weights are written to ``<checkpoint>/encoders/<camera>.safetensors``; a cache's identity holds their content,
    not their path.

    Args:
        run: a run or one of its checkpoints.
        cut: where the cache is to be cut.

    Raises:
        CheckpointError: no run, or an encoder that only its own factory can make.
    """
    _, folder = find_checkpoint(run)
    policy = load_policy(run)
    specs, preprocess, written = {}, {}, {}
    for camera in policy.cameras:
        encoder = policy.obs_encoder.key_model_map[camera]
        if encoder.spec is None or encoder.spec.factory is not None:
            raise CheckpointError(
                f"{run}: the encoder of {camera} comes from a factory; extract with --encoder instead"
            )
        if id(encoder) not in written:
            path = folder / ENCODERS / f"{camera}.safetensors"
            path.parent.mkdir(exist_ok=True)
            save_encoder(encoder, path)
            written[id(encoder)] = path
        specs[camera] = replace(encoder.spec, weights=str(written[id(encoder)]), cut=cut)
        preprocess[camera] = policy.obs_encoder.preprocessing[camera]
    return RunEncoders(specs, preprocess)
