"""Runs all stages on the sample in ``data/``: inspect, extract, verify, train, evaluate and report."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from cache_pipeline.encoders.found_resnet import architecture, choose_resnet, shapes_of
from cache_pipeline.encoders.image_encoder import EncoderSpec, build_encoder
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.encoders.resnet import RESNETS
from cache_pipeline.errors import EncoderError
from cache_pipeline.progress import logger
from cache_pipeline.reports.inspection import inspect_path
from cache_pipeline.reports.page import is_ours
from cache_pipeline.reports.run_report import write_report
from cache_pipeline.reports.sample import sample_dataset
from cache_pipeline.runs.metrics import of_mean_action

DOWNLOAD_TIMEOUT_S = 10.0


class QuickstartResult(NamedTuple):
    """Outputs and main figures of the quickstart."""

    dataset: Path
    cache: Path
    run: Path
    report: Path
    weights: str
    seconds: float
    images_per_s: float
    steps_per_s: float
    valid_action_mse: float | None
    mean_action_mse: float | None

    def to_json(self) -> dict[str, Any]:
        return {key: str(value) if isinstance(value, Path) else value for key, value in self._asdict().items()}

    def lines(self) -> list[str]:
        error = "no held-out demos"
        if self.valid_action_mse is not None:
            error = f"{self.valid_action_mse:.4g}, {of_mean_action(self.valid_action_mse, self.mean_action_mse)}"
        return [
            f"encoder weights      {self.weights}",
            f"extraction           {self.images_per_s:.0f} images/s",
            f"training from cache  {self.steps_per_s:.0f} steps/s",
            f"held-out error       {error}",
            f"total time           {self.seconds:.0f} s",
            f"cache                {self.cache}",
            f"run                  {self.run}",
            f"report               {self.report}",
        ]


def run_quickstart(
    out: Path,
    *,
    steps: int,
    weights: Path | None,
    device: str,
    seed: int,
    weights_prefix: str | None = None,
    dataset: Path | None = None,
) -> QuickstartResult:
    """Runs every stage with outputs in ``out``; a finished cache of an earlier quickstart is reused.

    Args:
        dataset: a robomimic file; the sample by default.
    """
    from cache_pipeline.extract.config import ExtractConfig
    from cache_pipeline.extract.pipeline import extract_features
    from cache_pipeline.extract.verify import verify
    from cache_pipeline.training.config import SavingConfig, TrainConfig
    from cache_pipeline.training.train import train

    started = time.perf_counter()
    dataset = dataset if dataset is not None else sample_dataset()
    cache, run = out / f"{dataset.stem}.zarr", out / "run"
    _say("1/5 inspect", f"inspect {dataset}")
    _log(inspect_path(dataset).lines())

    spec, weights_text = choose_weights(weights, weights_prefix, seed)
    _say("2/5 extract", f"extract-features {dataset} --out {cache}")
    preprocess = Preprocess(imagenet_norm=spec.weights != "random")
    config = ExtractConfig(datasets=(dataset,), out=cache, encoders=spec, preprocess=preprocess, device=device)
    extracted = extract_features(config)
    _log(extracted.lines())

    _say("3/5 verify", f"verify {cache}")
    _log(verify(cache, rows=64, seed=seed, device=device).lines())

    _say("4/5 train", f"train --from-cache {cache} --out {run} --steps {steps}")
    saving = SavingConfig(eval_every=max(1, steps // 6), save_every=0)
    training = TrainConfig(cache=cache, out=run, steps=steps, seed=seed, device=device, overwrite=True, saving=saving)
    trained = train(training)
    _log(trained.lines())

    _say("5/5 report", f"report {run}")
    stages = {"read": extracted.read_s, "encode": extracted.encode_s, "write": extracted.write_s}
    page = out / "report.html"
    write_report(run, page, overwrite=is_ours(page), stages=stages if extracted.images else None)
    return QuickstartResult(
        dataset=dataset,
        cache=cache,
        run=run,
        report=page,
        weights=weights_text,
        seconds=time.perf_counter() - started,
        images_per_s=extracted.images_per_s,
        steps_per_s=trained.steps_per_s,
        valid_action_mse=trained.valid_action_mse,
        mean_action_mse=trained.mean_action_mse,
    )


def choose_weights(weights: Path | None, prefix: str | None, seed: int) -> tuple[EncoderSpec, str]:
    """Returns the encoder and a sentence on its weights: from a file, from ImageNet, or random."""
    if weights is not None:
        name = architecture(shapes_of(choose_resnet(weights, prefix).state))
        name = name if name in RESNETS else "resnet18"  # building it raises an error that says what the file holds
        return EncoderSpec(rgb_model_name=name, weights=str(weights), weights_prefix=prefix), f"{name} from {weights}"
    pretrained = EncoderSpec(rgb_model_name="resnet18", weights="imagenet")
    try:
        with _download_timeout():
            build_encoder(pretrained)
    except EncoderError as error:
        logger.info("ImageNet weights cannot be loaded: %s", error)
        text = f"resnet18 with RANDOM weights (seed {seed}): ImageNet weights could not be downloaded"
        logger.warning("the quickstart continues with %s", text)
        return EncoderSpec(rgb_model_name="resnet18", weights="random", seed=seed), text
    return pretrained, "resnet18 pretrained on ImageNet (torchvision)"


@contextmanager
def _download_timeout() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _say(stage: str, command: str) -> None:
    logger.info("")
    logger.info("%s   (cache-pipeline %s)", stage, command)


def _log(lines: list[str]) -> None:
    for line in lines:
        logger.info("  %s", line)
