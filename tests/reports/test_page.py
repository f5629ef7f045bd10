import io
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest

from cache_pipeline.reports import plots
from cache_pipeline.reports.page import Page


def image(png):
    return matplotlib.image.imread(io.BytesIO(png), format="png")


@pytest.mark.parametrize("dims", [1, 7])
def test_every_action_dimension_is_drawn(dims):
    demo = np.sin(np.arange(40 * dims).reshape(40, dims) / 9)
    assert image(plots.actions(demo, demo + 0.1, "held-out demo")).std() > 0.01


def test_curves_without_held_out_demos_say_so():
    steps = np.arange(1, 50)
    metrics = {"training/loss": (steps, 1 / steps)}
    with_valid = {**metrics, "validation/action_mse": (steps[::7], np.linspace(1, 0.1, 7))}
    assert not np.array_equal(image(plots.curves(metrics)), image(plots.curves(with_valid, mean_action_mse=0.5)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_gaps_of_a_curve(bad):
    steps = np.arange(1, 50)
    loss = 1 / steps
    broken = np.where((steps > 10) & (steps < 40), bad, loss)
    ends = (steps <= 10) | (steps >= 40)
    joined = image(plots.curves({"training/loss": (steps[ends], loss[ends])}))
    gap = image(plots.curves({"training/loss": (steps, broken)}))
    assert (gap < 0.7).any(-1).sum() < (joined < 0.7).any(-1).sum()
    plots.curves({"training/loss": (steps, np.full(49, bad)), "validation/action_mse": (steps, np.full(49, bad))})


def test_negative_losses_are_drawn():
    """The loss of ``gmm`` is a negative log-likelihood."""
    steps = np.arange(1, 50)
    drawn = image(plots.curves({"training/loss": (steps, -np.sqrt(steps))}))
    empty = image(plots.curves({"training/loss": (steps, np.full(49, np.nan))}))
    assert (drawn < 0.7).any(-1).sum() > (empty < 0.7).any(-1).sum()


def test_names_are_drawn_as_they_are():
    names = ("a$b$", r"$\frac$", "😀", "x\x1b[31m", "n" * 300)
    red = np.zeros((8, 8, 3), np.uint8)
    plots.contact_sheet({name: [red] for name in names})
    for name in names:
        plots.actions(np.zeros((4, 1)), np.zeros((4, 1)), name)
        plots.feature_map([np.zeros((4, 2))], name)


def test_a_contact_sheet_shows_the_frames_themselves():
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    shown = image(plots.contact_sheet({"view 0": [red, red], "view 1": [red]}))
    is_red = (shown[..., 0] > 0.95) & (shown[..., 1] < 0.05)
    assert is_red.mean() > 0.2


def test_a_page_is_self_contained_and_escapes_text(tmp_path):
    page = Page("run <1>", "lead & more")
    page.table(["a", "b"], [["<script>", 3], ["x", 0.5]])
    page.picture(plots.stage_times({"read": 0.1, "encode": 2.0}, "stages"), "stages")
    html = page.write(tmp_path / "deep" / "report.html").read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "http" not in html
    HTMLParser().feed(html)
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "report.html"]
