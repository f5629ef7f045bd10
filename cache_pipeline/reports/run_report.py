"""``report``: an HTML page of a run with data, training curves, actions and rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.demos.split import Split
from cache_pipeline.encoders.factory import Factories
from cache_pipeline.errors import CachePipelineError
from cache_pipeline.files import check_output, resolved
from cache_pipeline.policies.visuomotor import VisuomotorPolicy
from cache_pipeline.progress import logger
from cache_pipeline.reports import plots
from cache_pipeline.reports.break_even import break_even
from cache_pipeline.reports.page import HTML, Page, is_ours
from cache_pipeline.reports.rollouts import add_rollouts
from cache_pipeline.runs.checkpoint import find_checkpoint
from cache_pipeline.runs.contents import Contents, recorded_contents, split_of_run
from cache_pipeline.runs.metrics import fraction_of_mean_action, of_mean_action, read_metrics, series
from cache_pipeline.runs.policy import load_policy
from cache_pipeline.runs.record import RunRecord, read_record
from cache_pipeline.runs.summary import inspect_run
from cache_pipeline.text import listed, shortened

SHOWN_FRAMES = 6
SHOWN_CAMERAS, MOST_SMALL = 8, 240
SHOWN_DIMS = 16
MAPPED_DEMOS = 5


class DemoObs(NamedTuple):
    """Obs of a policy at each step of one demo, and the actions of the demo.

    Attributes:
        name: name of the demo.
        obs: camera → features (T, …) or frames (T, H, W, 3); low-dim key → (T, …).
        actions: (T, A).
    """

    name: str
    obs: dict[str, NDArray[Any]]
    actions: NDArray[np.float32]


def write_report(
    run: Path,
    out: Path | None = None,
    *,
    overwrite: bool = False,
    stages: Mapping[str, float] | None = None,
    encoder: Factories = None,
) -> Path:
    """Writes the page of a run and returns its path. An earlier page of this function at the default path is replaced.

    Args:
        run: a run, or one of its checkpoints.
        out: path of the page; default: ``RUN/report.html``.
        overwrite: replace an existing HTML page.
        stages: seconds per stage of the extraction, if known.
        encoder: as in ``load_policy``.

    Raises:
        CheckpointError: the run is missing or cannot be read.
        ConfigError: ``out`` is taken and may not be replaced.
    """
    folder, _ = find_checkpoint(run)
    if out is None:
        out = folder / "report.html"
        overwrite = overwrite or is_ours(out)
    check_output(out, HTML, overwrite=overwrite)
    record, summary = read_record(folder), inspect_run(folder)
    place = resolved(folder)
    page = Page(f"Training run {place.parent.name}/{place.name}", " · ".join(summary.lines()[:2]))
    _figures(page, record, summary)
    _curves(page, folder, summary.mean_action_mse)
    found = _run_demos(record, cached=record.data.cache is not None and record.kind != "finetune")
    if found is not None:
        _what_it_does(page, load_policy(run, encoder=encoder), *found)
    if stages:
        page.heading("Extraction time per stage")
        page.text("Stages run in parallel; encoding should take longest.")
        page.picture(plots.stage_times(stages, "seconds per stage"), "stage times")
    _what_it_saw(page, record)
    add_rollouts(page, folder, out)
    page.heading("Command and versions")
    page.code(" ".join(record.command))
    page.table(["package", "version"], sorted(record.versions.items()))
    return page.write(out, overwrite=overwrite)


def _figures(page: Page, record: RunRecord, summary: Any) -> None:
    facts = [(f"{summary.step:,}", f"of {summary.steps:,} steps")]
    if summary.valid_action_mse is not None:
        fraction = fraction_of_mean_action(summary.valid_action_mse, summary.mean_action_mse)
        facts.append((f"{summary.valid_action_mse:.4g}", "held-out action error (MSE)"))
        if fraction is None:
            facts.append(("no ratio", of_mean_action(summary.valid_action_mse, summary.mean_action_mse)))
        else:
            facts.append((f"{fraction:.0%}", "of the error of always predicting the mean action"))
    facts.append((summary.policy, "policy"))
    facts.append((f"{len(record.data.train)} + {len(record.data.valid)}", "demos: training + held out"))
    if (paid := break_even(record)) is not None:
        facts.append((f"{paid:,} steps", "until the cache has paid: live encoding would have encoded as many images"))
    page.facts(facts)


def _curves(page: Page, folder: Path, mean_action_mse: float | None) -> None:
    rows = read_metrics(folder)
    if not rows:
        return
    measured = {name: series(rows, name) for name in ("training/loss", "validation/action_mse")}
    page.heading("Training")
    page.picture(plots.curves(measured, mean_action_mse), "training loss and held-out action error")


def _run_demos(record: RunRecord, *, cached: bool) -> tuple[FeatureCache | Dataset, Split] | None:
    """Opens the run's cache or files and finds the run's demos in them by content."""
    data, cameras, low_dim = record.data, tuple(record.policy.cameras), tuple(record.policy.low_dim)
    try:
        opened: FeatureCache | Dataset
        if cached:
            assert data.cache is not None
            opened = FeatureCache(data.cache)
        else:
            opened = Dataset.open(data.datasets, cameras=cameras, low_dim_keys=low_dim, action_key=data.action_keys)
        contents = Contents(opened, cameras, low_dim, recorded_contents(data))
        return opened, split_of_run(opened, contents, data, "the run")
    except CachePipelineError as error:
        what = "actions" if cached else "actions and frames"
        logger.info("the run's demos cannot be read, so their %s are not drawn: %s", what, error)
        return None


def _what_it_does(page: Page, policy: Any, data: FeatureCache | Dataset, split: Split) -> None:
    demos = split.valid or split.train
    demo = read_demo(data, policy, demos[0])
    page.heading("Actions")
    kind = "held-out" if split.valid else "training"
    page.text(
        f"At each step of {kind} {demo.name}, the next action of the policy and of the demo. "
        "The policy always gets the obs of the demo."
    )
    predicted = first_actions(policy, demo)
    dims = demo.actions.shape[1]
    page.picture(
        plots.actions(demo.actions[:, :SHOWN_DIMS], predicted[:, :SHOWN_DIMS], f"{kind} {demo.name}"),
        "actions of the policy and of the demo",
    )
    if dims > SHOWN_DIMS:
        page.text(f"The first {SHOWN_DIMS} of {dims} action dimensions are drawn. The difference in all of them:")
        page.picture(plots.action_errors(demo.actions, predicted, f"{kind} {demo.name}"), "difference per dimension")
    still = np.flatnonzero(np.ptp(demo.actions, axis=0) == 0)
    if len(still):
        page.text(f"Actions that never change in this demo: {listed(f'action[{dim}]' for dim in still)}.")
    if isinstance(data, FeatureCache):
        chosen = [read_demo(data, policy, number) for number in demos[:MAPPED_DEMOS]]
        camera = next(iter(policy.cameras))
        page.heading("Features")
        page.text(f"Features of {camera} over {len(chosen)} demos, on the first two principal components.")
        page.picture(plots.feature_map(principal([d.obs[camera] for d in chosen]), camera), "features over time")


def read_demo(data: FeatureCache | Dataset, policy: VisuomotorPolicy, number: int) -> DemoObs:
    """Reads one demo in the input format of the policy, from a cache or a dataset file."""
    name = data.demos[number].name
    if isinstance(data, FeatureCache):
        demo = data.demos[number]
        rows = slice(demo.row, demo.row + demo.length)
        obs = {camera: data.features(camera, rows) for camera in policy.cameras}
        low_dim = {key: data.array(f"low_dim/{key}", rows) for key in policy.low_dim}
        return DemoObs(name, {**obs, **low_dim}, data.array("actions", rows))
    arrays = data.rows(number)
    frames = {camera: data.frames(number, camera) for camera in policy.cameras}
    low_dim = {key: arrays[f"low_dim/{key}"] for key in policy.low_dim}
    return DemoObs(name, {**frames, **low_dim}, arrays["actions"])


def first_actions(policy: VisuomotorPolicy, demo: DemoObs, seed: int = 0) -> NDArray[np.float32]:
    """Returns (T, A): the first action of the policy's chunk at each step of a demo."""
    steps = np.arange(len(demo.actions))
    rows = np.maximum(steps[:, None] + np.arange(1 - policy.obs_horizon, 1), 0)
    obs: dict[str, Tensor] = {}
    for key, values in demo.obs.items():
        window = torch.from_numpy(values[rows])
        obs[key] = window if window.dtype == torch.uint8 else window.float()
    chunk = policy.act(obs, torch.Generator(policy.device).manual_seed(seed))
    first: NDArray[np.float32] = chunk[:, 0].cpu().numpy()
    return first


def principal(features: list[NDArray[Any]]) -> list[NDArray[np.float64]]:
    """Projects each demo's features (T, …) on the first two principal components of all demos, (T, 2)."""
    flat = [values.reshape(len(values), -1).astype(np.float64) for values in features]
    joined = np.concatenate(flat)
    centred = joined - joined.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    mapped = centred @ axes[:2].T
    if mapped.shape[1] < 2:
        mapped = np.pad(mapped, ((0, 0), (0, 2 - mapped.shape[1])))
    return np.split(mapped, np.cumsum([len(values) for values in flat])[:-1])


def _what_it_saw(page: Page, record: RunRecord) -> None:
    found = _run_demos(record, cached=False)
    if found is None:
        return
    dataset, split = found
    assert isinstance(dataset, Dataset)
    number = (split.valid or split.train)[0]
    demo, cameras = dataset.demos[number], list(dataset.cameras)
    chosen = np.linspace(0, demo.length - 1, min(SHOWN_FRAMES, demo.length)).round().astype(int).tolist()
    shown, others = cameras[:SHOWN_CAMERAS], cameras[SHOWN_CAMERAS:]
    rows = {camera: list(dataset.gather(camera, [(number, t, t + 1) for t in chosen])) for camera in shown}
    page.heading("Frames")
    page.picture(plots.contact_sheet(rows), f"frames of {demo.name}")
    if others:
        page.text(
            f"The first {len(shown)} of {len(cameras)} cameras are drawn. One frame of each of the other "
            f"{len(others)}, row by row: {', '.join(map(shortened, others))}."
        )
        middle = demo.length // 2
        first = [dataset.frames(number, camera, middle, middle + 1)[0] for camera in others[:MOST_SMALL]]
        page.picture(plots.mosaic(first), f"a frame of each other camera of {demo.name}")
