"""Every command that takes a cache takes the URL of one."""

import json

import pytest
from cache_fakes import TINY
from fakes import make_dataset
from object_store import BUCKET, KEYS, s3_server, upload
from typer.testing import CliRunner

from cache_pipeline.cli import app

ENCODER = ["--encoder", TINY.factory]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "demos.hdf5", lengths=(6, 9, 5))


@pytest.fixture(scope="module")
def cache(dataset):
    """URL of a cache."""
    with s3_server() as (endpoint, _), pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint}.items():
            patch.setenv(name, value)
        url = f"s3://{BUCKET}/folder/lift.zarr"
        extracted = run("extract-features", dataset, "--out", url, *ENCODER)
        assert extracted["cache"] == url
        yield url


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_inspect_verify_and_export(cache, tmp_path):
    assert run("inspect", cache)["state"] == "complete"
    assert run("cache", "inspect", cache)["path"] == cache
    assert run("verify", cache, "--rows", 8, *ENCODER)["ok"]
    assert run("verify", cache, "--integrity")["ok"]
    assert run("cache", "export", cache, "--out", tmp_path / "lift.npz")["demos"] == 3
    assert run("probe", cache)["cache"] == cache
    assert run("cache", "compact", cache)["rows_freed"] == 0


@pytest.mark.parametrize("source", ["resident", "streamed"])
def test_train_and_resume(cache, tmp_path, source):
    out = tmp_path / "run"
    trained = run("train", *ENCODER, "--from-cache", cache, "--out", out, "--steps", 3, "--source", source)
    assert trained["source"] == source
    assert json.loads((out / "run.json").read_text())["data"]["cache"] == cache
    assert run("train", *ENCODER, "--from-cache", cache, "--out", out, "--steps", 5, "--resume")["steps"] == 5


def test_the_losses_are_those_of_a_folder(cache, dataset, tmp_path):
    local = tmp_path / "lift.zarr"
    run("extract-features", dataset, "--out", local, *ENCODER)
    losses = [
        run("train", *ENCODER, "--from-cache", place, "--out", tmp_path / name, "--steps", 3, "--source", source)[
            "final_loss"
        ]
        for name, place, source in (("a", local, "resident"), ("b", cache, "resident"), ("c", cache, "streamed"))
    ]
    assert losses[0] == losses[1] == losses[2]


def test_fine_tune_a_run_of_it(cache, tmp_path):
    run("train", *ENCODER, "--from-cache", cache, "--out", tmp_path / "run", "--steps", 3)
    live = run(
        *("finetune", "--live-encoder", "--checkpoint", tmp_path / "run", "--out", tmp_path / "live"),
        *("--steps", 1, *ENCODER),
    )
    assert live["steps"] == 1


@pytest.fixture(scope="module")
def remote_dataset(cache, dataset, tmp_path_factory):
    """URL of a dataset."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CACHE_PIPELINE_HOME", str(tmp_path_factory.mktemp("home")))
        url = f"s3://{BUCKET}/sets/demos.hdf5"
        upload(dataset, url)
        yield url


def test_a_dataset_by_url(remote_dataset, dataset, tmp_path):
    made = [
        run("extract-features", place, "--out", tmp_path / name, *ENCODER, *more)["fingerprint"]
        for name, place, more in (
            ("here.zarr", dataset, ()),
            ("there.zarr", remote_dataset, ()),
            ("workers.zarr", remote_dataset, ("--workers", 2)),
        )
    ]
    assert made[0] == made[1] == made[2]
    there = tmp_path / "there.zarr"
    assert run("inspect", remote_dataset)["sound"]
    assert run("inspect", there)["files"] == [remote_dataset]
    assert run("verify", there, "--rows", 8, *ENCODER)["ok"]
    assert run("extract-features", remote_dataset, "--out", there, *ENCODER, "--dry-run")["units"] == 0
    out = tmp_path / "run"
    run("train", *ENCODER, "--from-cache", there, "--dataset", remote_dataset, "--out", out, "--steps", 2)
    assert json.loads((out / "run.json").read_text())["data"]["datasets"] == [remote_dataset]
    live = run("finetune", "--live-encoder", "--checkpoint", out, "--out", tmp_path / "live", "--steps", 1, *ENCODER)
    assert live["steps"] == 1
    frozen = run("train", *ENCODER, "--dataset", remote_dataset, "--out", tmp_path / "frozen", "--steps", 1)
    assert frozen["steps"] == 1
    assert run("report", out, *ENCODER)


def test_a_wrong_place_is_one_line(cache):
    result = CliRunner().invoke(app, ["inspect", "s3://nowhere/lift.zarr"])
    assert result.exit_code == 1
    assert result.output.strip().splitlines() == [
        "error: the bucket s3://nowhere does not exist; create it, or correct the URL"
    ]
