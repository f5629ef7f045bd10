"""``report RUN RUN…``: an HTML page that compares runs: results, curves, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cache_pipeline.errors import ConfigError
from cache_pipeline.files import check_output
from cache_pipeline.reports import plots
from cache_pipeline.reports.break_even import break_even
from cache_pipeline.reports.page import HTML, Page, is_ours
from cache_pipeline.reports.rollouts import success_rates
from cache_pipeline.runs.checkpoint import find_checkpoint
from cache_pipeline.runs.metrics import fraction_of_mean_action, read_metrics, series
from cache_pipeline.runs.record import RunRecord, read_record
from cache_pipeline.runs.summary import RunSummary, inspect_run
from cache_pipeline.text import shortened

DEFAULT_NAME = "comparison.html"
HEADER = (
    "run",
    "encoder",
    "policy",
    "steps",
    "held-out error",
    "of the mean action's",
    "success (95 % interval)",
    "steps/s",
    "training time, s",
    "cache has paid after, steps",
)
IRRELEVANT = ("out", "resume", "overwrite", "wandb")
"""Fields of a config that do not decide the result."""
UNKNOWN = "–"


class _Run(NamedTuple):
    name: str
    folder: Path
    record: RunRecord
    summary: RunSummary
    metrics: list[dict[str, Any]]

    def last(self, name: str) -> float | None:
        """Returns the last value of a metric, if it was measured."""
        values = series(self.metrics, name)[1]
        return float(values[-1]) if len(values) else None


def write_comparison(runs: Sequence[Path], out: Path | None = None, *, overwrite: bool = False) -> Path:
    """Writes a page that compares runs, and returns its path. No weights are loaded.

    Args:
        runs: at least two runs, or checkpoints of runs.
        out: path of the page; default: ``comparison.html`` beside the first run. An earlier page at the default path is
            replaced.
        overwrite: replace an existing HTML page.

    Raises:
        CheckpointError: a run is missing or cannot be read.
        ConfigError: a run is given twice, or ``out`` is taken and may not be replaced.
    """
    opened = [_open(run) for run in runs]
    for number, run in enumerate(opened):
        if run.folder in [other.folder for other in opened[:number]]:
            raise ConfigError(f"{run.name} is given twice; give each run once")
    if out is None:
        out = opened[0].folder.parent / DEFAULT_NAME
        overwrite = overwrite or is_ours(out)
    check_output(out, HTML, overwrite=overwrite)
    page = Page(f"{len(opened)} training runs compared", " · ".join(run.name for run in opened))
    _results(page, opened)
    _curves(page, opened)
    _settings(page, opened)
    return page.write(out, overwrite=overwrite)


def _open(run: Path) -> _Run:
    folder = find_checkpoint(run)[0].resolve()
    return _Run(str(run), folder, read_record(folder), inspect_run(folder), read_metrics(folder))


def _results(page: Page, runs: Sequence[_Run]) -> None:
    page.heading("Results")
    if len({_held_out(run.record) for run in runs}) > 1:
        page.text("The held-out demos are not the same in all runs, so their held-out errors cannot be compared.")
    page.table(HEADER, [list(_row(run)) for run in runs])
    page.text(
        "Success is that of the rollouts with the most episodes. A cache has paid when live encoding of the same "
        "training would have encoded as many images."
    )


def _held_out(record: RunRecord) -> frozenset[str | None]:
    """Returns what tells the held-out demos of runs apart: the digests of their actions, else their names."""
    return frozenset(demo.name if demo.contents is None else demo.contents.get("actions") for demo in record.data.valid)


def _row(run: _Run) -> Iterator[object]:
    record, summary = run.record, run.summary
    yield run.name
    yield _encoder(record)
    yield summary.policy
    yield summary.step
    error = summary.valid_action_mse
    fraction = None if error is None else fraction_of_mean_action(error, summary.mean_action_mse)
    yield UNKNOWN if error is None else error
    yield UNKNOWN if fraction is None else f"{fraction:.0%}"
    yield _success(run.folder)
    yield run.last("time/steps_per_s") or UNKNOWN
    seconds = run.last("time/seconds")
    yield UNKNOWN if seconds is None else round(seconds)
    paid = break_even(record)
    yield UNKNOWN if paid is None else paid


def _encoder(record: RunRecord) -> str:
    if record.kind == "finetune":
        return "fine-tuned"
    if record.data.cache is not None:
        return "frozen, cached"
    return "frozen, live" if record.config.get("freeze_encoder", True) else "trained, live"


def _success(folder: Path) -> str:
    rates = [rate for found in success_rates(folder) for rate in found]
    if not rates:
        return UNKNOWN
    best_known = max(rates, key=lambda rate: (rate.episodes, rate.step))
    return (
        f"{best_known.rate:.0%} ({best_known.low:.0%}–{best_known.high:.0%}), "
        f"{best_known.episodes} episodes at step {best_known.step:,}"
    )


def _curves(page: Page, runs: Sequence[_Run]) -> None:
    page.heading("Training")
    for name, label in (("validation/action_mse", "held-out action error (MSE)"), ("training/loss", "training loss")):
        curves = {run.name: series(run.metrics, name) for run in runs}
        if any(len(steps) for steps, _ in curves.values()):
            page.picture(plots.compared(curves, label), f"{label} over steps")
    rates = {run.name: success_rates(run.folder)[0] for run in runs}
    if any(rates.values()):
        page.picture(plots.success_of_runs(rates), "success rate over training steps")


def _settings(page: Page, runs: Sequence[_Run]) -> None:
    settings = [dict(_flat(run.record)) for run in runs]
    names = list(dict.fromkeys(name for found in settings for name in found))
    rows = []
    for name in names:
        values = [found.get(name, UNKNOWN) for found in settings]
        if len(set(values)) > 1:
            rows.append([name, *map(shortened, values)])
    page.heading("Settings that differ")
    if rows:
        page.table(["setting", *(run.name for run in runs)], rows)
    else:
        page.text("None.")


def _flat(record: RunRecord) -> Iterator[tuple[str, str]]:
    """Yields name and value of everything that decides a run's result, as text."""
    yield "kind", record.kind
    yield "start", str(record.start)
    yield "cut", record.policy.cut
    yield "views", str(record.order.get("views"))
    yield "computed in", str(record.precision)
    yield "training demos", str(len(record.data.train))
    yield "held-out demos", str(len(record.data.valid))

    def inside(name: str, value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, Mapping) and value:
            for key, entry in value.items():
                yield from inside(f"{name}.{key}" if name else key, entry)
        else:
            yield name, str(value)

    decisive = {key: value for key, value in record.config.items() if key not in IRRELEVANT}
    yield from inside("", decisive)
