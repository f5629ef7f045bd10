"""Plots: each function takes arrays and returns one PNG as bytes. No function reads a file."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.text import printable, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, GRID = "#22313f", "#d8dee4"
COLORS = ("#1f6fb2", "#d9622b", "#2e8b57", "#8a5bb5", "#b8860b", "#5f6b76", "#c2407a")
LINES = ("-", "--", ":", "-.")
WIDTH_IN, DPI = 9.0, 110
Series = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Steps, and the values measured there."""
LEAST_COLUMNS, MOSAIC_COLUMNS, MOSAIC_PIXELS = 4, 12, 64


def curves(series: Mapping[str, Series], mean_action_mse: float | None = None) -> bytes:
    """Plots training loss and held-out action error over steps, with the error of the mean action as baseline.

    Args:
        series: ``training/loss`` and, with a held-out split, ``validation/action_mse``, each as steps and the values
            measured there. NaN and infinity are gaps.
        mean_action_mse: error of a baseline that always predicts the mean training action, in the same units.
    """
    figure, axes = _axes(1, 2, height=3.2)
    loss, error = axes
    _line(loss, series["training/loss"], COLORS[0], "training loss")
    loss.set(title="Training loss", xlabel="step", yscale=_scale(series["training/loss"]))
    valid = series.get("validation/action_mse")
    if valid is not None and np.isfinite(valid[1]).any():
        _line(error, valid, COLORS[1], "held-out error", marker="o")
        if mean_action_mse is not None and mean_action_mse > 0:
            error.axhline(
                mean_action_mse, color=COLORS[5], linestyle="--", linewidth=1.2, label="always the mean action"
            )
        error.set(title="Held-out action error (MSE)", xlabel="step", yscale=_scale(valid))
        error.legend(frameon=False, fontsize=8, loc="upper right")
    else:
        error.text(0.5, 0.5, "no held-out error", ha="center", va="center", color=COLORS[5])
        error.set_axis_off()
    return _png(figure)


class Rate(NamedTuple):
    """A success rate with its interval, measured in ``episodes`` episodes after ``step`` steps of training."""

    step: int
    rate: float
    low: float
    high: float
    episodes: int


def success_rates(training: Sequence[Rate], later: Sequence[Rate]) -> bytes:
    """Plots success rates over steps with their intervals.

    Args:
        training: of rollouts during training, drawn as a line.
        later: of the command ``rollout``, drawn as points.
    """
    return _success({"during training": (training, COLORS[2], "-"), "rollout": (later, COLORS[0], "none")})


def success_of_runs(runs: Mapping[str, Sequence[Rate]]) -> bytes:
    """Plots success rates over steps with their intervals, one line per run."""
    return _success({name: (rates, *_style(number)) for number, (name, rates) in enumerate(runs.items())})


def _success(lines: Mapping[str, tuple[Sequence[Rate], str, str]]) -> bytes:
    figure, (axis,) = _axes(1, 1, height=2.8)
    for label, (rates, color, line) in lines.items():
        if rates:
            step, rate, low, high, _ = (np.array(column, np.float64) for column in zip(*rates, strict=True))
            spread = np.maximum([rate - low, high - rate], 0)
            style: dict[str, Any] = {"color": color, "linestyle": line, "marker": "o", "markersize": 4, "capsize": 3}
            axis.errorbar(step, rate, spread, label=_label(label), **style)
    last = max(rate.step for rates, _, _ in lines.values() for rate in rates)
    axis.set(title="Success rate", xlabel="step", ylim=(-0.03, 1.03), xlim=(-0.02 * last, 1.02 * max(last, 1)))
    axis.yaxis.set_major_formatter(lambda value, place: f"{value:.0%}")
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    return _png(figure)


def compared(series: Mapping[str, Series], label: str) -> bytes:
    """Plots a metric over steps, one line per name, with a legend below."""
    figure, (axis,) = _axes(1, 1, height=3.2)
    for number, (name, values) in enumerate(series.items()):
        color, line = _style(number)
        _line(axis, values, color, _label(name), marker="o" if len(values[0]) < 100 else None, linestyle=line)
    joined = np.concatenate([values for _, values in series.values()])
    axis.set(xlabel="step", ylabel=label, yscale=_scale((np.empty(0, np.int64), joined)))
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    return _png(figure)


def _style(number: int) -> tuple[str, str]:
    """Returns the color and the line style of one of many lines."""
    return COLORS[number % len(COLORS)], LINES[number // len(COLORS) % len(LINES)]


def actions(demo: NDArray[Any], predicted: NDArray[Any], title: str) -> bytes:
    """Plots actions of a demo (T, A) and of the policy at each step (T, A), one panel per dimension."""
    dims = demo.shape[1]
    columns = min(4, dims)
    rows = -(-dims // columns)
    figure, axes = _axes(rows, columns, height=1.7 * rows + 0.5)
    for d, axis in enumerate(axes):
        if d >= dims:
            axis.set_axis_off()
            continue
        axis.plot(demo[:, d], color=COLORS[5], linewidth=2.2, alpha=0.6, label="demo")
        axis.plot(predicted[:, d], color=COLORS[0], linewidth=1.3, label="policy")
        axis.set_title(f"action[{d}]", fontsize=9)
    axes[0].legend(frameon=False, fontsize=8, loc="upper right")
    figure.suptitle(_label(title), fontsize=10, color=INK)
    return _png(figure)


def action_errors(demo: NDArray[Any], predicted: NDArray[Any], title: str) -> bytes:
    """Plots the root mean square difference of two action sequences (T, A), one bar per dimension."""
    figure, (axis,) = _axes(1, 1, height=2.4)
    errors = np.sqrt(np.mean((predicted.astype(np.float64) - demo) ** 2, axis=0))
    axis.stairs(errors, np.arange(len(errors) + 1) - 0.5, fill=True, color=COLORS[0])
    axis.set(title=_label(title), xlabel="action dimension", ylabel="RMS difference", xlim=(-0.5, len(errors) - 0.5))
    return _png(figure)


def stage_times(stages: Mapping[str, float], title: str) -> bytes:
    """Plots seconds per stage as horizontal bars."""
    figure, (axis,) = _axes(1, 1, height=0.5 + 0.42 * len(stages))
    labels, seconds = list(stages), list(stages.values())
    bars = axis.barh(labels, seconds, color=[COLORS[i % len(COLORS)] for i in range(len(labels))], height=0.6)
    axis.bar_label(bars, [f" {s:.2f} s" for s in seconds], fontsize=9, color=INK)
    axis.invert_yaxis()
    axis.set(title=title, xlabel="seconds", xlim=(0, max([*seconds, 1e-6]) * 1.18))
    axis.grid(visible=False, axis="y")
    return _png(figure)


def contact_sheet(rows: Mapping[str, Sequence[NDArray[np.uint8]]]) -> bytes:
    """Draws frames (H, W, 3) side by side, one labelled row per name."""
    columns = max(LEAST_COLUMNS, *(len(frames) for frames in rows.values()))
    strips = {name: _tiled(frames, columns) for name, frames in rows.items()}
    heights = [WIDTH_IN * strip.shape[0] / strip.shape[1] + 0.25 for strip in strips.values()]
    figure, axes = _axes(len(rows), 1, height=sum(heights), heights=heights)
    for axis, (name, strip) in zip(axes, strips.items(), strict=True):
        axis.set_axis_off()
        axis.imshow(strip, interpolation="nearest")
        axis.set_title(_label(name), fontsize=8, loc="left", color=INK)
    return _png(figure)


def mosaic(frames: Sequence[NDArray[np.uint8]]) -> bytes:
    """Draws one frame (H, W, 3) per camera as small pictures of one size, row by row, without labels."""
    picked = [frame[_places(frame.shape[0])][:, _places(frame.shape[1])] for frame in frames]
    tiles = _tiled(picked, min(len(frames), MOSAIC_COLUMNS))
    figure, (axis,) = _axes(1, 1, height=WIDTH_IN * tiles.shape[0] / tiles.shape[1])
    axis.set_axis_off()
    axis.imshow(tiles, interpolation="nearest")
    return _png(figure)


def _places(size: int) -> NDArray[np.int64]:
    return np.arange(MOSAIC_PIXELS) * size // MOSAIC_PIXELS


def _tiled(frames: Sequence[NDArray[np.uint8]], columns: int) -> NDArray[np.uint8]:
    """Joins frames of one size row by row, with white gaps."""
    height, width, channels = frames[0].shape
    gap = max(1, width // 24)
    rows = -(-len(frames) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8)
    for number, frame in enumerate(frames):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = frame
    return sheet


def feature_map(projected: Sequence[NDArray[Any]], title: str) -> bytes:
    """Plots features of a few demos, each (T, 2) on the first two principal components, coloured by time."""
    figure, (axis,) = _axes(1, 1, height=4.2)
    points = None
    for demo in projected:
        axis.plot(demo[:, 0], demo[:, 1], color=GRID, linewidth=0.8, zorder=1)
        time = np.linspace(0.0, 1.0, len(demo))
        points = axis.scatter(demo[:, 0], demo[:, 1], c=time, cmap="viridis", s=9, zorder=2, vmin=0, vmax=1)
    if points is not None:
        figure.colorbar(points, ax=axis, label="start → end of the demo", ticks=[])
    axis.set(title=_label(title), xlabel="first component", ylabel="second component")
    return _png(figure)


def bars(groups: Mapping[str, Mapping[str, float]], title: str, ylabel: str) -> bytes:
    """Plots grouped bars: ``groups[group][series]``, one colour per series."""
    figure, (axis,) = _axes(1, 1, height=3.4)
    series = list(dict.fromkeys(name for values in groups.values() for name in values))
    width = 0.8 / max(len(series), 1)
    for i, name in enumerate(series):
        x = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width
        axis.bar(x, [values.get(name, np.nan) for values in groups.values()], width * 0.92, label=name, color=COLORS[i])
    axis.set_xticks(np.arange(len(groups)), list(map(_label, groups)))
    axis.set(title=title, ylabel=ylabel)
    axis.grid(visible=False, axis="x")
    axis.legend(frameon=False, fontsize=8, ncols=len(series), loc="upper center", bbox_to_anchor=(0.5, -0.08))
    return _png(figure)


def _line(axis: Any, series: Series, color: str, label: str, marker: str | None = None, linestyle: str = "-") -> None:
    steps, values = series
    values = np.where(np.isfinite(values), values, np.nan)
    style: dict[str, Any] = {"color": color, "linestyle": linestyle, "linewidth": 1.5}
    axis.plot(steps, values, marker=marker, markersize=3, label=label, **style)


def _scale(series: Series) -> str:
    """Returns ``log``, or ``linear`` for values that a logarithm lacks, such as a negative log-likelihood."""
    finite = series[1][np.isfinite(series[1])]
    return "log" if finite.size and finite.min() > 0 else "linear"


def _label(name: str) -> str:
    """Returns a name as a text of matplotlib, which takes text between dollar signs for mathematics."""
    return printable(shortened(name)).replace("$", r"\$")


def _axes(rows: int, columns: int, height: float, heights: Sequence[float] | None = None) -> tuple[Figure, list[Any]]:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    inked = ("axes.labelcolor", "text.color", "xtick.color", "ytick.color")
    style: dict[Any, Any] = {"axes.edgecolor": GRID, **dict.fromkeys(inked, INK)}
    with mpl.rc_context({**style, "font.size": 9, "axes.titlesize": 10}):
        figure = Figure(figsize=(WIDTH_IN, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = list(np.atleast_1d(figure.subplots(rows, columns, height_ratios=heights)).ravel())
    for axis in axes:
        axis.grid(color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():  # a glyph that the font lacks, such as an emoji in a name, is drawn as a box
        warnings.filterwarnings("ignore", message=r"Glyph .* missing", category=UserWarning)
        figure.savefig(out, format="png")
    return out.getvalue()
