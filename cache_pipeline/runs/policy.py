"""Loads the policy of a run for inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache_pipeline.encoders.device import resolve_device
from cache_pipeline.encoders.factory import Factories
from cache_pipeline.encoders.image_encoder import ImageEncoder
from cache_pipeline.encoders.saving import load_encoders
from cache_pipeline.errors import CachePipelineError, CheckpointError, ConfigError
from cache_pipeline.policies.build import build_policy
from cache_pipeline.policies.robomimic.config import PREFIX
from cache_pipeline.policies.robomimic.policy import build_robomimic_policy
from cache_pipeline.policies.spec import PolicySpec
from cache_pipeline.runs.checkpoint import find_checkpoint, read_checkpoint
from cache_pipeline.runs.record import RUN_JSON, read_record


def load_policy(path: str | Path, device: str = "cpu", *, encoder: Factories = None) -> Any:
    """Loads the policy of a run (best checkpoint, else latest) or of one checkpoint folder, ready for ``act``.

    Returns a ``VisuomotorPolicy``, with averaged weights if the run has any; for a robomimic run a ``RobomimicPolicy``.

    Args:
        path: the run or checkpoint.
        device: where the policy computes.
        encoder: the factory of the run's encoder, ``file.py:factory``, if a factory made it. It runs only if named
            here, and must be the one with which the run was trained.

    Raises:
        CheckpointError: a file is missing, damaged or from another version; or the encoder's factory is not named or
            has changed. Nothing is unpickled, and code that only the run names is not executed.
        MissingExtraError: it is a robomimic run, and robomimic is not installed.
    """
    run, folder = find_checkpoint(Path(path))
    record, state = read_record(run), read_checkpoint(folder).state
    spec = record.policy
    encoders = run_encoders(run, spec, encoder)
    policy: Any
    if spec.name.startswith(PREFIX):
        try:
            policy = build_robomimic_policy(spec, encoders, resolve_device(device))
        except ConfigError as error:
            raise CheckpointError(f"{run / RUN_JSON} is damaged or from another program: {error}") from error
    else:
        policy = build_policy(spec, encoders).to(resolve_device(device)).requires_grad_(False)
    policy.load_tensors({**state.model, **state.ema})
    policy.env_args, policy.render_flags = record.data.env_args, record.data.render_flags
    policy.action_keys = record.data.action_keys
    policy.eval()
    return policy


def run_encoders(run: Path, spec: PolicySpec, encoder: Factories = None) -> dict[str, ImageEncoder]:
    """Loads the initial encoders of a run; cameras with the same file share one module.

    Args:
        encoder: the factories that the user names; a factory that only the run names is not executed.
    """
    for file in spec.encoder_files.values():
        if Path(file).name != file:
            raise CheckpointError(f"{run / RUN_JSON} names an encoder outside the run: {file!r}")
    try:
        encoders = load_encoders({camera: run / file for camera, file in spec.encoder_files.items()}, encoder)
    except CachePipelineError as error:
        raise CheckpointError(f"the run's encoder cannot be loaded: {error}") from error
    for made in encoders.values():
        made.cut = spec.cut
    return encoders
