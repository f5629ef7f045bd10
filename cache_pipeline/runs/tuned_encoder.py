"""Exports the encoders of a run for extraction: fine-tune, extract again, train a new action head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from cache_pipeline.encoders.factory import Factories
from cache_pipeline.encoders.image_encoder import EncoderSpec
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.encoders.saving import save_encoder
from cache_pipeline.runs.checkpoint import find_checkpoint
from cache_pipeline.runs.policy import load_policy

ENCODERS = "encoders"


class RunEncoders(NamedTuple):
    """Encoder and preprocessing by camera, as inputs of extraction."""

    encoders: dict[str, EncoderSpec]
    preprocess: dict[str, Preprocess]


def encoders_of_run(run: Path, cut: str = "avgpool", *, encoder: Factories = None) -> RunEncoders:
    """Returns the encoders of a run's best checkpoint, or of one checkpoint folder.

    Writes their weights to ``<checkpoint>/encoders/<camera>.safetensors``. A cache's identity depends on the weights,
    not on their path.

    Args:
        run: a run or one of its checkpoints.
        cut: the layer whose output is cached; ignored for an encoder that a factory makes.
        encoder: the factory of the run's encoder, if a factory made it. It runs only if it is named here.

    Raises:
        CheckpointError: the path is no run, or the encoder's factory is not named or has changed.
    """
    _, folder = find_checkpoint(run)
    policy = load_policy(run, encoder=encoder)
    specs, preprocess, written = {}, {}, {}
    for camera in policy.cameras:
        made = policy.obs_encoder.key_model_map[camera]
        assert made.spec is not None
        if id(made) not in written:
            path = folder / ENCODERS / f"{camera}.safetensors"
            path.parent.mkdir(exist_ok=True)
            save_encoder(made, path)
            written[id(made)] = path
        chosen = made.cut if made.spec.factory is not None else cut
        specs[camera] = replace(made.spec, weights=str(written[id(made)]), weights_prefix=None, cut=chosen)
        preprocess[camera] = policy.obs_encoder.preprocessing[camera]
    return RunEncoders(specs, preprocess)
