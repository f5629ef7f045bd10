"""Plots: each function takes arrays and returns one PNG as bytes. No function reads a file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, GRID = "#22313f", "#d8dee4"
COLORS = ("#1f6fb2", "#d9622b", "#2e8b57", "#8a5bb5", "#b8860b", "#5f6b76", "#c2407a")
WIDTH_IN, DPI = 9.0, 110


def curves(metrics: Mapping[str, NDArray[Any]], mean_action_mse: float | None = None) -> bytes:
    """Plots training loss and held-out action error over steps, with the error of the mean action as baseline.

    Args:
        metrics: columns ``step``, ``training/loss`` and, with a held-out split, ``validation/action_mse``; NaN for
            missing values.
        mean_action_mse: error of a baseline that always predicts the mean training action, in the same units.
    """
    figure, axes = _axes(1, 2, height=3.2)
    loss, error = axes
    step = metrics["step"]
    _line(loss, step, metrics["training/loss"], COLORS[0], "training loss")
    loss.set(title="Training loss", xlabel="step", yscale="log")
    valid = metrics.get("validation/action_mse")
    if valid is not None and np.isfinite(valid).any():
        _line(error, step, valid, COLORS[1], "held-out error", marker="o")
        if mean_action_mse is not None:
            error.axhline(
                mean_action_mse, color=COLORS[5], linestyle="--", linewidth=1.2, label="always the mean action"
            )
        error.set(title="Held-out action error (MSE)", xlabel="step", yscale="log")
        error.legend(frameon=False, fontsize=8)
    else:
        error.text(0.5, 0.5, "no held-out demos", ha="center", va="center", color=COLORS[5])
        error.set_axis_off()
    return _png(figure)


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
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10, color=INK)
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
    columns = max(len(frames) for frames in rows.values())
    figure, axes = _axes(len(rows), columns, height=(WIDTH_IN / columns + 0.2) * len(rows))
    for r, (name, frames) in enumerate(rows.items()):
        for c in range(columns):
            axis = axes[r * columns + c]
            axis.set_axis_off()
            if c < len(frames):
                axis.imshow(frames[c], interpolation="nearest")
        axes[r * columns].set_title(name, fontsize=8, loc="left", color=INK)
    return _png(figure)


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
    axis.set(title=title, xlabel="first component", ylabel="second component")
    return _png(figure)


def bars(groups: Mapping[str, Mapping[str, float]], title: str, ylabel: str) -> bytes:
    """Plots grouped bars: ``groups[group][series]``, one colour per series."""
    figure, (axis,) = _axes(1, 1, height=3.4)
    series = list(dict.fromkeys(name for values in groups.values() for name in values))
    width = 0.8 / max(len(series), 1)
    for i, name in enumerate(series):
        x = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width
        axis.bar(x, [values.get(name, np.nan) for values in groups.values()], width * 0.92, label=name, color=COLORS[i])
    axis.set_xticks(np.arange(len(groups)), list(groups))
    axis.set(title=title, ylabel=ylabel)
    axis.grid(visible=False, axis="x")
    axis.legend(frameon=False, fontsize=8, ncols=len(series), loc="upper center", bbox_to_anchor=(0.5, -0.08))
    return _png(figure)


def _line(axis: Any, x: NDArray[Any], y: NDArray[Any], color: str, label: str, marker: str | None = None) -> None:
    known = np.isfinite(y)
    axis.plot(x[known], y[known], color=color, linewidth=1.5, marker=marker, markersize=3, label=label)


def _axes(rows: int, columns: int, height: float) -> tuple[Figure, list[Any]]:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    inked = ("axes.labelcolor", "text.color", "xtick.color", "ytick.color")
    style: dict[Any, Any] = {"axes.edgecolor": GRID, **dict.fromkeys(inked, INK)}
    with mpl.rc_context({**style, "font.size": 9, "axes.titlesize": 10}):
        figure = Figure(figsize=(WIDTH_IN, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = list(np.atleast_1d(figure.subplots(rows, columns)).ravel())
    for axis in axes:
        axis.grid(color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
