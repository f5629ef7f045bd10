"""Records of a run with wrong types, missing fields or foreign bytes: one line, and whole checkpoints stay usable."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cache_fakes import TINY, extract
from fakes import make_dataset

from cache_pipeline.errors import CheckpointError
from cache_pipeline.files import finite
from cache_pipeline.reports.run_report import write_report
from cache_pipeline.runs.checkpoint import find_checkpoint, read_index
from cache_pipeline.runs.metrics import of_mean_action, read_metrics
from cache_pipeline.runs.record import read_record
from cache_pipeline.runs.summary import inspect_run
from cache_pipeline.training.config import SavingConfig, TrainConfig
from cache_pipeline.training.train import train

OPTIONS = {"batch_size": 4, "emb_dim": 8, "policy_options": {"hidden": [8]}, "device": "cpu", "precision": "fp32"}


def config(out: Path, cache: Path, steps: int, **options) -> TrainConfig:
    saving = SavingConfig(log_every=1, eval_every=2, save_every=2, keep_best=2)
    return TrainConfig(
        cache=cache, out=out, steps=steps, saving=saving, encoder_factory=TINY.factory, **OPTIONS, **options
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    extract(folder / "a.zarr", make_dataset(folder / "demos.hdf5", lengths=(9, 8, 7)))
    train(config(folder / "run", folder / "a.zarr", 4), progress=False)
    train(config(folder / "whole", folder / "a.zarr", 4), progress=False)
    train(config(folder / "whole", folder / "a.zarr", 6, resume=True), progress=False)
    return folder


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


def resumed(made, run):
    return train(config(run, made / "a.zarr", 6, resume=True), progress=False)


BROKEN_INDEXES = [
    "",
    "[]",
    '{"latest": 3}',
    '{"latest": "step_0000004", "best": "x"}',
    '{"latest": "gone", "best": []}',
    '{"latest": "..", "best": []}',
    '{"latest": "step_0000004", "best": [{"name": "step_0000004"}]}',
    '{"best": [], "made": ["step_0000004"]}',
    '{"latest": "step_0000004", "made": ["step_0000004"]}',
    '{"latest": null, "best": [{"name": "step_0000004", "step": 4, "valid_action_mse": 1}]}',
    '{"latest": "step_0000004", "best": [{"name": "step_0000004", "step": 4, "valid_action_mse": NaN}]}',
    '{"latest": "step_0000004", "best": [{"name": "step_0000004", "step": 4, "valid_action_mse": 1e999}]}',
    "\xff\xfe",
]


@pytest.mark.parametrize("content", BROKEN_INDEXES)
def test_a_damaged_index_is_rebuilt_and_the_run_resumes_to_the_same_weights(made, run, caplog, content):
    (run / "checkpoints/index.json").write_bytes(content.encode("latin-1"))
    keep = run / "checkpoints/step_0000004_copy"  # whole, and with an equal error
    shutil.copytree(run / "checkpoints/step_0000004", keep)
    assert find_checkpoint(run, latest=True)[1].name == "step_0000004"
    assert "it is rebuilt from the checkpoints beside it: step_0000004 is the latest" in caplog.text
    result = resumed(made, run)
    assert result.steps == 6
    assert (keep / "model.safetensors").is_file()
    same, other = (find_checkpoint(path, latest=True)[1] / "model.safetensors" for path in (run, made / "whole"))
    assert same.read_bytes() == other.read_bytes()
    assert json.loads((run / "checkpoints/index.json").read_text())["latest"] == "step_0000006"


def test_the_best_checkpoint_of_a_rebuilt_index_is_the_one_with_the_lowest_error(run):
    whole = read_index(run)
    (run / "checkpoints/index.json").write_text("{")
    assert read_index(run).best[0] == whole.best[0]


def test_a_folder_of_the_users_is_never_taken_for_a_checkpoint_of_the_run(run):
    mine = run / "checkpoints/step_mine"
    shutil.copytree(run / "checkpoints/step_0000004", mine)
    value = json.loads((mine / "checkpoint.json").read_text())
    value |= {"step": 99, "metrics": {"validation/action_mse": 0.0}}
    (mine / "checkpoint.json").write_text(json.dumps(value))
    (run / "checkpoints/index.json").write_text("{")
    index = read_index(run)
    assert index.latest == "step_0000004"
    assert "step_mine" not in {*index.made, *(entry.name for entry in index.best)}


@pytest.mark.parametrize("damage", ["bytes", "header", "value", "width"])
def test_damaged_metrics_are_rebuilt_on_resuming_and_the_old_file_is_kept(made, run, caplog, damage):
    file = run / "metrics.csv"
    text = file.read_text()
    damaged = {
        "bytes": b"\xff" + text.encode(),
        "header": text.replace("time/seconds", "timu/seconds").encode(),
        "value": text.replace("\n1,", "\nx,").encode(),
        "width": text.replace("\n1,", "\n1,,,,,,,,,,,").encode(),
    }[damage]
    file.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_metrics(run)
    resumed(made, run)
    assert "it is rebuilt from the checkpoints, and kept as metrics.csv.damaged" in caplog.text
    assert (run / "metrics.csv.damaged").read_bytes() == damaged
    assert [row["step"] for row in read_metrics(run)][-1] == 6
    assert 4 in [row["step"] for row in read_metrics(run)]


def test_partial_files_of_a_dead_process_are_removed_when_the_run_goes_on(made, run):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [".run.json", ".metrics.csv", "checkpoints/.index.json"]
    partials = [run / f"{name}.{dead.pid}.partial" for name in names]
    mine, living = run / ".notes.txt.1.partial", run / f".run.json.{os.getppid()}.partial"
    for path in (*partials, mine, living):
        path.touch()
        os.utime(path, (0, 0))
    resumed(made, run)
    assert not any(path.exists() for path in partials)
    assert mine.exists()
    assert living.exists()


def paths(value, place=()):
    yield place
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from paths(item, (*place, key))


def test_every_field_of_a_record_with_another_type_is_one_line_or_harmless(run):
    """Each value is replaced in turn by values of other types."""
    for file, read in (
        ("run.json", read_record),
        ("checkpoints/step_0000004/checkpoint.json", lambda run: inspect_run(run).lines()),
    ):
        whole = (run / file).read_text()
        refused = []
        for place in [place for place in paths(json.loads(whole)) if place]:
            for odd in (None, [], [[]], {"a": []}, "x", -1, True, 1e308, math.nan, 10**30):
                value = holder = json.loads(whole)
                for key in place[:-1]:
                    holder = holder[key]
                holder[place[-1]] = odd
                (run / file).write_text(json.dumps(value))
                try:
                    read(run)
                except CheckpointError as error:
                    refused.append(str(error))
        (run / file).write_text(whole)
        assert len(refused) > 20
        assert not any("\n" in line for line in refused)


NUMBERS = ["NaN", "-Infinity", "1e999", "1" + 30 * "0", "-1" + 30 * "0"]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    "place", [("policy", "preprocess", "agentview_image", "std", 1), ("data", "env_args", "type"), ("config", "odd")]
)
def test_a_record_with_a_number_that_is_never_written_is_damaged(run, place, number):
    value = holder = json.loads((run / "run.json").read_text())
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = "NUMBER"
    (run / "run.json").write_text(json.dumps(value).replace('"NUMBER"', number))
    with pytest.raises(CheckpointError, match=r"run\.json is damaged.*(NaN|Infinity|inf|10{30})"):
        read_record(run)


@pytest.mark.parametrize(
    ("place", "odd", "said"),
    [
        (("data", "train", 0, 0), 7, "a demo in it is of file 7, but it lists 1"),
        (("data", "valid", 0, 0), -1, "a demo in it is of file -1, but it lists 1"),
        (("data", "files"), [], "a demo in it is of file 0, but it lists 0"),
        (("policy", "low_dim", "robot0_eef_pos", 0), 10**15, "a size in it is not between 1 and"),
        (("policy", "action_dim"), 2**40, "a size in it is not between 1 and"),
    ],
)
def test_a_record_with_a_number_out_of_range_is_damaged(run, place, odd, said):
    value = holder = json.loads((run / "run.json").read_text())
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = odd
    (run / "run.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=said):
        read_record(run)


def test_a_checkpoint_without_the_error_of_the_mean_action_is_shown_and_resumed(made, run):
    for file in run.glob("checkpoints/step_*/checkpoint.json"):
        value = json.loads(file.read_text())
        value["metrics"]["validation/mean_action_mse"] = None
        file.write_text(json.dumps(value))
    error = inspect_run(run).valid_action_mse
    assert f"held-out action error {error:.4g}" in inspect_run(run).lines()
    write_report(run, encoder=TINY.factory)
    assert resumed(made, run).steps == 6
    assert of_mean_action(0.5, None) == "and that of always predicting the mean action is not recorded"


def test_values_that_json_lacks_become_null():
    value = {"a": math.nan, "b": [1.0, -math.inf], "c": {"d": (math.inf,)}, "e": "NaN"}
    assert finite(value) == {"a": None, "b": [1.0, None], "c": {"d": [None]}, "e": "NaN"}
    json.dumps(finite(value), allow_nan=False)


def test_the_error_is_compared_with_that_of_the_mean_action_at_any_scale():
    assert of_mean_action(2.33e-14, 1e-14).startswith("233% of the error of always predicting the mean action")
    assert of_mean_action(0.5, 0.0) == (
        "the held-out actions are all equal to the mean action, so there is no error to compare with"
    )
    assert np.isfinite(float(of_mean_action(1e-300, 1e-290).split("%")[0]))
