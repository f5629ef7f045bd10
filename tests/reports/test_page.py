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
    metrics = {"step": np.arange(1, 50), "training/loss": 1 / np.arange(1, 50)}
    with_valid = {**metrics, "validation/action_mse": np.linspace(1, 0.1, 49)}
    assert not np.array_equal(image(plots.curves(metrics)), image(plots.curves(with_valid, mean_action_mse=0.5)))


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
