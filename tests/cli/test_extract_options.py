"""Encoders per camera, encoders of a run, views: from the command line to the cache."""

import json

import matplotlib.image
import pytest
from cache_fakes import TINY
from fakes import make_dataset
from typer.testing import CliRunner

from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.cli import app
from cache_pipeline.runs.policy import load_policy

RANDOM = ["--no-pretrained-encoder", "--device", "cpu", "--precision", "fp32"]


def run(*args):
    return CliRunner().invoke(app, ["--quiet", *map(str, args)])


def done(result):
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("options") / "data.hdf5", lengths=(6, 5))


def test_a_camera_can_have_an_encoder_of_its_own(dataset, tmp_path):
    out = tmp_path / "mixed.zarr"
    done(run("extract-features", dataset, "--out", out, *RANDOM, "--camera-encoder", "agentview_image=resnet34@random"))
    cameras = FeatureCache(out).cameras
    assert cameras["agentview_image"].identity["architecture"] == "resnet34"
    assert cameras["robot0_eye_in_hand_image"].identity["architecture"] == "resnet18"
    trained = run(
        "train", "--from-cache", out, "--out", tmp_path / "run", "--steps", 2, "--batch-size", 4, "--device", "cpu"
    )
    done(trained)
    encoders = load_policy(tmp_path / "run").obs_encoder.key_model_map
    assert encoders["agentview_image"].architecture == "resnet34"
    assert encoders["robot0_eye_in_hand_image"].architecture == "resnet18"


def test_an_encoder_for_an_unknown_camera_lists_the_cameras(dataset, tmp_path):
    result = run(
        "extract-features", dataset, "--out", tmp_path / "x.zarr", *RANDOM, "--camera-encoder", "agent=resnet34"
    )
    assert result.exit_code == 1
    assert "agentview_image" in result.stderr
    assert not (tmp_path / "x.zarr").exists()


def test_an_encoder_for_all_others_is_refused_where_every_camera_has_its_own(dataset, tmp_path):
    own = [f"{camera}=resnet34@random" for camera in ("agentview_image", "robot0_eye_in_hand_image")]
    each = ["--camera-encoder", own[0], "--camera-encoder", own[1]]
    for flag, options in (("--no-pretrained-encoder", []), ("--rgb-model-name", ["resnet50"])):
        result = run("extract-features", dataset, "--out", tmp_path / "x.zarr", flag, *options, *each)
        assert result.exit_code == 2
        assert f"{flag} (" in result.stderr
        assert "every camera has its own encoder" in result.stderr
    assert not (tmp_path / "x.zarr").exists()


def test_an_encoder_of_the_users_own_beside_a_resnet_for_one_camera(dataset, tmp_path):
    out = tmp_path / "mixed.zarr"
    options = ["--encoder", TINY.factory, "--camera-encoder", "agentview_image=resnet18@random", "--device", "cpu"]
    done(run("extract-features", dataset, "--out", out, *options))
    cuts = {camera: entry.identity["cut"] for camera, entry in FeatureCache(out).cameras.items()}
    assert cuts == {"agentview_image": "avgpool", "robot0_eye_in_hand_image": "output"}


def test_no_cameras_at_all_is_refused(dataset, tmp_path):
    for value, said in (("none", "no cameras are given"), ("", "--cameras is empty"), (",,", "available: agentview")):
        result = run("extract-features", dataset, "--out", tmp_path / "x.zarr", *RANDOM, "--cameras", value)
        assert result.exit_code == (2 if value == "" else 1)
        assert said in result.stderr


def test_a_tuned_encoder_is_cached_again_and_its_old_cache_is_stale_for_it(dataset, tmp_path):
    cache, base, tuned, again = (tmp_path / name for name in ("a.zarr", "run", "tuned", "b.zarr"))
    short = ["--steps", 2, "--batch-size", 4, "--device", "cpu"]
    done(run("extract-features", dataset, "--out", cache, *RANDOM))
    done(run("train", "--from-cache", cache, "--out", base, *short))
    fast = ["--encoder-lr", 0.01, "--lr", 0.01, "--precision", "fp32"]
    done(run("finetune", "--live-encoder", "--checkpoint", base, "--out", tuned, *short, *fast))
    tuned = tuned / "checkpoints" / "step_0000002"  # two wild steps make no best checkpoint
    stale = run("extract-features", dataset, "--out", cache, "--encoder-from", tuned, "--device", "cpu")
    assert stale.exit_code == 1
    assert "encoder.weights.digest" in stale.stderr
    done(
        run(
            "extract-features",
            dataset,
            "--out",
            again,
            "--encoder-from",
            tuned,
            "--device",
            "cpu",
            "--precision",
            "fp32",
        )
    )
    before, after = FeatureCache(cache), FeatureCache(again)
    assert abs(before.features("agentview_image") - after.features("agentview_image")).max() > 1e-4
    done(run("verify", again, "--json"))
    done(run("train", "--from-cache", again, "--out", tmp_path / "second", *short))


def test_views_are_drawn_as_the_encoder_sees_them(dataset, tmp_path):
    cache, sheet = tmp_path / "views.zarr", tmp_path / "views.png"
    done(run("extract-features", dataset, "--out", cache, *RANDOM, "--views", 3, "--crop-shape", "20,20"))
    shown = json.loads(done(run("inspect", cache, "--views", sheet, "--json")).stdout)
    assert shown == {"picture": str(sheet)}
    assert matplotlib.image.imread(sheet).std() > 0.05


STILL = ["--brightness", 0, "--contrast", 0, "--saturation", 0, "--hue", 0]


def test_views_without_room_for_a_crop_are_said_or_refused_by_each_command_that_draws_them(dataset, tmp_path):
    cache, base = tmp_path / "views.zarr", tmp_path / "base"
    extract = ["extract-features", dataset, "--out", cache, *RANDOM]
    refused = run(*extract, "--views", 2, *STILL)
    assert refused.exit_code == 1
    assert "error: all augmented views would equal the clean view" in refused.output
    assert not cache.exists()
    said = CliRunner().invoke(app, [*map(str, extract), "--views", "2"])
    assert "agentview_image, robot0_eye_in_hand_image: augmented views differ in colour only" in done(said).output
    assert "augmented views" not in done(CliRunner().invoke(app, [*map(str, extract), "--views", "2"])).output

    short = ["--steps", 2, "--batch-size", 4, "--device", "cpu"]
    live = ["train", "--dataset", dataset, "--out", base, "--no-pretrained-encoder", *short, "--augment"]
    assert "all augmented views would equal the clean view" in run(*live, *STILL).output
    assert not base.exists()
    assert "differ in colour only" in done(CliRunner().invoke(app, list(map(str, live)))).output
    tuned = ["finetune", "--live-encoder", "--checkpoint", base, "--out", tmp_path / "tuned", *short, "--augment"]
    assert "all augmented views would equal the clean view" in run(*tuned, *STILL).output
    assert not (tmp_path / "tuned").exists()


def test_the_error_of_the_precision_is_measured_and_shown(dataset, tmp_path):
    cache = tmp_path / "bf16.zarr"
    done(
        run(
            "extract-features",
            dataset,
            "--out",
            cache,
            "--no-pretrained-encoder",
            "--device",
            "cpu",
            "--precision",
            "bf16",
        )
    )
    measured = FeatureCache(cache).cameras["agentview_image"].measured
    assert 1e-2 < measured["error_over_variation"] < 1
    assert "of the features' variation over frames" in done(run("inspect", cache)).stdout
