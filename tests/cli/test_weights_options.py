"""Weights of checkpoints from the command line to the cache, and their place in its identity."""

import json

import pytest
import torch
from fakes import make_dataset
from typer.testing import CliRunner

from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.cli import app
from cache_pipeline.encoders.image_encoder import EncoderSpec, build_encoder
from cache_pipeline.errors import EncoderError
from cache_pipeline.reports.quickstart import choose_weights
from cache_pipeline.runs.policy import load_policy

CPU = ["--device", "cpu", "--precision", "fp32"]
LAYER1 = [*CPU, "--cut", "layer1", "--crop-shape", "8,8", "--cameras", "agentview_image"]


def cli(*args):
    return CliRunner().invoke(app, list(map(str, args)))


def done(result):
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dataset, a plain checkpoint, and one of MoCo with the same network and a second one."""
    folder = tmp_path_factory.mktemp("weights")
    make_dataset(
        folder / "data.hdf5", lengths=(4, 3), cameras={"agentview_image": (12, 12, 3), "wrist_image": (12, 12, 3)}
    )
    states = [build_encoder(EncoderSpec(weights="random", seed=seed)).net.state_dict() for seed in (0, 1)]
    torch.save(states[0], folder / "plain.pth")
    moco = {f"module.encoder_{side}.{k}": v for side, state in zip("qk", states, strict=True) for k, v in state.items()}
    torch.save({"state_dict": moco | {"module.queue": torch.zeros(3)}}, folder / "moco.pth.tar")
    done(
        cli(
            "extract-features",
            folder / "data.hdf5",
            "--out",
            folder / "plain.zarr",
            "--weights",
            folder / "plain.pth",
            *LAYER1,
        )
    )
    return folder


def test_the_prefix_is_in_the_identity_through_the_digest_alone(made, tmp_path):
    extract = ["extract-features", made / "data.hdf5", "--out", made / "plain.zarr", *LAYER1]
    same = done(cli(*extract, "--weights", made / "moco.pth.tar", "--weights-prefix", "encoder_q", "--json"))
    assert json.loads(same.stdout)["images"] == 0
    other = cli(*extract, "--weights", made / "moco.pth.tar", "--weights-prefix", "encoder_k")
    assert other.exit_code == 1
    assert "encoder.weights.digest" in other.stderr
    several = cli(*extract, "--weights", made / "moco.pth.tar")
    assert several.exit_code == 1
    assert several.stderr.splitlines()[-1].startswith(f"error: {made / 'moco.pth.tar'} holds several ResNets")


def test_what_was_found_and_left_out_is_said_and_json_stays_alone_on_stdout(made, tmp_path):
    weights = ["--weights", made / "moco.pth.tar", "--weights-prefix", "encoder_q"]
    result = done(
        cli("extract-features", made / "data.hdf5", "--out", tmp_path / "x.zarr", *weights, *LAYER1, "--json")
    )
    assert "resnet18 under state_dict.module.encoder_q; not used: state_dict.module.encoder_k (" in result.stderr
    assert "state_dict.module.queue (1 tensor)" in result.stderr
    json.loads(result.stdout)
    identity = FeatureCache(tmp_path / "x.zarr").cameras["agentview_image"].identity
    assert identity["weights"]["source"] == "moco.pth.tar, encoder_q"
    assert (
        FeatureCache(tmp_path / "x.zarr").features("agentview_image")
        == FeatureCache(made / "plain.zarr").features("agentview_image")
    ).all()


def test_each_camera_may_take_a_network_of_its_own_from_one_file(made, tmp_path):
    out, file = tmp_path / "each.zarr", made / "moco.pth.tar"
    cameras = {"agentview_image": "encoder_q", "wrist_image": "encoder_k"}
    each = [
        word for name, prefix in cameras.items() for word in ("--camera-encoder", f"{name}=resnet18@{file}#{prefix}")
    ]
    done(cli("extract-features", made / "data.hdf5", "--out", out, "--cut", "layer1", *CPU, *each))
    found = {name: entry.identity["weights"]["digest"] for name, entry in FeatureCache(out).cameras.items()}
    specs = {name: EncoderSpec(weights=str(file), weights_prefix=prefix) for name, prefix in cameras.items()}
    assert found == {name: build_encoder(spec).trunk_digest("layer1") for name, spec in specs.items()}


def test_live_training_takes_the_network_of_a_prefix_and_its_run_needs_the_file_no_more(made, tmp_path):
    file = tmp_path / "moco.pth.tar"
    file.write_bytes((made / "moco.pth.tar").read_bytes())
    weights = ["--weights", file, "--weights-prefix", "encoder_k", "--cameras", "wrist_image"]
    short = ["--steps", 1, "--batch-size", 2, "--emb-dim", 8, "--policy-option", "hidden=[8]", *CPU]
    done(cli("train", "--dataset", made / "data.hdf5", "--out", tmp_path / "run", *weights, *short))
    wanted = build_encoder(EncoderSpec(weights=str(file), weights_prefix="encoder_k")).weights_digest()
    file.unlink()
    assert load_policy(tmp_path / "run").obs_encoder.key_model_map["wrist_image"].weights_digest() == wanted
    tuned = ["finetune", "--live-encoder", "--checkpoint", tmp_path / "run", "--out", tmp_path / "tuned", "--steps", 1]
    done(cli(*tuned, "--batch-size", 2, "--device", "cpu"))
    again = ["extract-features", made / "data.hdf5", "--out", tmp_path / "again.zarr", "--cameras", "wrist_image"]
    done(cli(*again, "--encoder-from", tmp_path / "tuned", *CPU))


def test_another_mean_and_std_are_part_of_the_identity(made, tmp_path):
    extract = [
        "extract-features",
        made / "data.hdf5",
        "--out",
        made / "plain.zarr",
        "--weights",
        made / "plain.pth",
        *LAYER1,
    ]
    stale = cli(*extract, "--image-mean", "0,0,0", "--image-std", "1/255,1/255,1/255")
    assert stale.exit_code == 1
    assert "preprocess" in stale.stderr
    imagenet = ["--image-mean", "0.485,0.456,0.406", "--image-std", "0.229,0.224,0.225"]
    for same in (imagenet, ["--imagenet-norm"]):
        assert json.loads(done(cli(*extract, *same, "--json")).stdout)["images"] == 0


def test_the_quickstart_tells_the_architecture_from_the_content(made, tmp_path):
    torch.save(
        build_encoder(EncoderSpec(rgb_model_name="resnet34", weights="random")).net.state_dict(),
        tmp_path / "resnet50.pth",
    )
    spec, said = choose_weights(tmp_path / "resnet50.pth", None, 0)
    assert spec.rgb_model_name == "resnet34"
    assert said == f"resnet34 from {tmp_path / 'resnet50.pth'}"
    spec, _ = choose_weights(made / "moco.pth.tar", "encoder_k", 0)
    assert (spec.rgb_model_name, spec.weights_prefix) == ("resnet18", "encoder_k")
    with pytest.raises(EncoderError, match="several ResNets"):
        choose_weights(made / "moco.pth.tar", None, 0)
