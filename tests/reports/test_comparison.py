import re
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
from fakes import make_dataset
from typer.testing import CliRunner

from cache_pipeline.cli import app
from cache_pipeline.encoders.image_encoder import EncoderSpec
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.errors import ConfigError
from cache_pipeline.extract.config import ExtractConfig
from cache_pipeline.extract.pipeline import extract_features
from cache_pipeline.files import write_json
from cache_pipeline.reports.break_even import break_even
from cache_pipeline.reports.comparison import write_comparison
from cache_pipeline.runs.record import read_record
from cache_pipeline.runs.summary import inspect_run
from cache_pipeline.training.config import SavingConfig, TrainConfig
from cache_pipeline.training.train import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Cached runs that differ in their policy and rate, one with other held-out demos, and one that encodes live."""
    folder = tmp_path_factory.mktemp("comparison")
    dataset = make_dataset(folder / "data.hdf5", lengths=(8, 9, 10, 11))
    encoder, preprocess = EncoderSpec(weights="random"), Preprocess(imagenet_norm=False)
    extract = ExtractConfig(
        datasets=(dataset,),
        out=folder / "data.zarr",
        encoders=encoder,
        preprocess=preprocess,
        device="cpu",
        precision="fp32",
    )
    extract_features(extract, progress=False)
    saving = SavingConfig(eval_every=2, log_every=2)
    cached = TrainConfig(
        cache=folder / "data.zarr", out=folder / "flow", steps=6, batch_size=4, device="cpu", saving=saving
    )
    train(cached, progress=False)
    train(replace(cached, out=folder / "mlp", policy="mlp", lr=2e-3), progress=False)
    train(replace(cached, out=folder / "other", filter_key="valid", valid_key="train"), progress=False)
    live = replace(cached, cache=None, datasets=(dataset,), encoder=encoder, preprocess=preprocess, steps=2)
    train(replace(live, out=folder / "live"), progress=False)
    return folder


def tables(page: Path) -> list[list[list[str]]]:
    """The cells of the tables of a page."""
    found = []
    for table in re.findall(r"<table>(.*?)</table>", page.read_text(), re.S):
        rows = re.findall(r"<tr>(.*?)</tr>", table, re.S)
        found.append([[unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows])
    return found


def test_the_results_of_each_run_stand_in_one_table(runs: Path) -> None:
    names = ["flow", "mlp", "live"]
    page = write_comparison([runs / name for name in names])
    assert page == runs / "comparison.html"
    results = tables(page)[0]
    column = {name: [row[number] for row in results[1:]] for number, name in enumerate(results[0])}
    assert column["run"] == [str(runs / name) for name in names]
    assert column["encoder"] == ["frozen, cached", "frozen, cached", "frozen, live"]
    assert column["policy"] == ["flow", "mlp", "flow"]
    assert column["steps"] == ["6", "6", "2"]
    errors = [inspect_run(runs / name).valid_action_mse for name in names]
    assert column["held-out error"] == [f"{error:.4g}" for error in errors]
    assert column["success (95 % interval)"] == ["–"] * 3
    assert "cannot be compared" not in page.read_text()
    assert page.read_text().count("<img ") == 2


def test_a_cache_has_paid_when_live_encoding_would_have_encoded_as_many_images(runs: Path) -> None:
    page = write_comparison([runs / "flow", runs / "live"], runs / "paid.html")
    # 38 frames of each camera; a live step of 4 windows with 2 obs encodes 8 of each
    assert [row[-1] for row in tables(page)[0][1:]] == ["5", "–"]


def test_a_cache_that_cannot_be_read_has_no_break_even(runs: Path) -> None:
    record = read_record(runs / "flow")
    damaged = runs / "damaged.zarr"
    shutil.copytree(runs / "data.zarr", damaged)
    (damaged / "manifest.json").write_text("{")
    for cache in (runs / "gone.zarr", damaged):
        assert break_even(replace(record, data=replace(record.data, cache=str(cache)))) is None


def test_only_settings_that_differ_are_listed(runs: Path) -> None:
    (head, *rows) = tables(write_comparison([runs / "flow", runs / "mlp"], runs / "settings.html"))[1]
    assert head == ["setting", str(runs / "flow"), str(runs / "mlp")]
    assert dict(zip((row[0] for row in rows), (row[1:] for row in rows), strict=True)) == {
        "lr": ["0.001", "0.002"],
        "policy": ["flow", "mlp"],
    }


def test_errors_over_other_held_out_demos_are_said_to_be_incomparable(runs: Path) -> None:
    page = write_comparison([runs / "flow", runs / "other"], runs / "held_out.html")
    assert "their held-out errors cannot be compared" in page.read_text()


def test_the_success_shown_is_that_of_most_episodes(runs: Path) -> None:
    rollouts = runs / "mlp" / "rollouts"
    rollouts.mkdir()
    for episodes, successes in ((4, 4), (20, 15)):
        result = {"episodes": episodes, "successes": successes, "success_rate": successes / episodes}
        result |= {"ci95": [0.531, 0.888], "seconds": 1, "records": [], "settings": {"checkpoint": "step_0000006"}}
        write_json(rollouts / f"seed_0_{episodes}.json", result)
    page = write_comparison([runs / "flow", runs / "mlp"], runs / "success.html")
    assert tables(page)[0][2][6] == "75% (53%–89%), 20 episodes at step 6"


def test_a_comparison_replaces_only_its_own_page(runs: Path) -> None:
    pair = [runs / "flow", runs / "mlp"]
    write_comparison(pair)
    write_comparison(pair)
    notes = runs / "comparison.html"
    notes.write_text("<html>my own notes</html>")
    with pytest.raises(ConfigError, match="--overwrite"):
        write_comparison(pair)
    assert notes.read_text() == "<html>my own notes</html>"
    notes.unlink()


def test_the_command_compares_several_runs(runs: Path) -> None:
    out = runs / "command.html"
    done = CliRunner().invoke(app, ["report", str(runs / "flow"), str(runs / "mlp"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert tables(out)[0][0][0] == "run"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["flow", "flow"], "given twice"),
        (["flow", "flow/checkpoints/step_0000006"], "given twice"),
        (["flow", "mlp/../flow"], "given twice"),
        (["flow", "gone"], "gone"),
        (["flow", "mlp", "--encoder", "mine.py:make"], "leave it out"),
    ],
)
def test_a_comparison_that_makes_no_sense_is_one_line(runs: Path, words: list[str], said: str) -> None:
    paths = [word if word.startswith("--") or ":" in word else str(runs / word) for word in words]
    done = CliRunner().invoke(app, ["report", *paths, "--out", str(runs / "never.html")])
    assert done.exit_code != 0
    assert said in str(done.exception) + done.output
    assert not (runs / "never.html").exists()
