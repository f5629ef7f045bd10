"""Detects a plateau of the held-out error, and suggests what to try next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from cache_pipeline.runs.metrics import read_metrics, series
from cache_pipeline.runs.record import RunRecord, read_record

LEAST_MEASUREMENTS = 6
IMPROVEMENT = 0.02


def has_flattened(errors: Sequence[float]) -> bool:
    """Whether the best of the last third of measurements is less than 2 % below the best earlier one.

    Returns False below six measurements. This is a heuristic: a smaller learning rate may still reduce the error.
    """
    if len(errors) < LEAST_MEASUREMENTS:
        return False
    late = len(errors) // 3
    return min(errors[-late:]) > (1 - IMPROVEMENT) * min(errors[:-late])


def plateau_notes(run: Path) -> tuple[str, ...]:
    """Returns advice for a finished run whose held-out error has flattened; otherwise no lines."""
    errors = series(read_metrics(run), "validation/action_mse")[1].tolist()
    if not has_flattened(errors):
        return ()
    record = read_record(run)
    late = len(errors) // 3
    return (
        f"the held-out error has flattened: the last {late} of {len(errors)} measurements lowered it by less than "
        f"{IMPROVEMENT:.0%}; if rollouts fail, try",
        *(f"  {line}" for line in advice(run, record)),
    )


def advice(run: Path, record: RunRecord) -> list[str]:
    """Returns commands to try next, the cheapest first."""
    whole = f"finetune --live-encoder --checkpoint {quote(str(run))}"
    config = record.config
    if record.kind == "finetune":
        if config.get("unfreeze_schedule") is None and config.get("unfreeze") == "all":
            return ["more demos: the whole encoder learns already"]
        return [f"more of the encoder: {whole} --unfreeze all"]
    if config.get("freeze_encoder") is False:
        return ["more demos: the whole encoder learns already"]
    wider = f"a wider projection: the same train command with --emb-dim {2 * record.policy.emb_dim}"
    layers = "all" if record.policy.cut == "output" else "layer4"
    learning = f"an encoder that learns: {whole} --unfreeze {layers}"
    if record.policy.cut != "avgpool" or record.data.cache is None:
        return [wider, learning]
    places = "where things are in the image: extract-features --cut layer4 to a new cache, then train with --pooling"
    return [wider, f"{places} spatial_softmax", learning]
