"""Nothing that came with data is run: a factory or a class that a cache or a run names, in every command and call."""

import json
import shutil
from pathlib import Path

import pytest
import typer
from fakes import make_dataset
from typer.testing import CliRunner

from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.cli import app
from cache_pipeline.encoders.image_encoder import EncoderSpec, ImageEncoder, build_encoder
from cache_pipeline.encoders.saving import load_encoder, save_encoder
from cache_pipeline.errors import CheckpointError, EncoderError
from cache_pipeline.extract.verify import verify
from cache_pipeline.runs.policy import load_policy
from cache_pipeline.runs.tuned_encoder import encoders_of_run

SOURCE = """
from pathlib import Path
import torch
from torch import nn

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 5, stride=4)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.rand(parameter.shape, generator=generator)

    def forward(self, x):
        return SCALE * torch.relu(self.conv(x)).mean((2, 3))

def mine():
    return Mine()
"""
GOOD = SOURCE.replace("SCALE", "1.0")
SMALL = ["--steps", 2, "--batch-size", 4, "--emb-dim", 8, "--device", "cpu"]
CPU = ["--device", "cpu", "--precision", "fp32"]


def run(*args):
    return CliRunner().invoke(app, ["--quiet", *map(str, args)])


def done(result):
    assert result.exit_code == 0, result.output
    return result


def refused(result):
    assert result.exit_code == 1, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert result.stdout == ""
    return lines[0]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """data.hdf5, mine.py, cache.zarr made by its factory, and runs trained on the cache and live."""
    folder = tmp_path_factory.mktemp("original")
    make_dataset(folder / "data.hdf5")
    (folder / "mine.py").write_text(GOOD)
    named = ["--encoder", f"{folder}/mine.py:mine"]
    done(run("extract-features", folder / "data.hdf5", "--out", folder / "cache.zarr", *named, *CPU))
    done(run("train", "--from-cache", folder / "cache.zarr", "--out", folder / "run", *named, *SMALL))
    done(run("train", "--dataset", folder / "data.hdf5", "--out", folder / "live", *named, *SMALL))
    return folder


@pytest.fixture
def made(original, tmp_path):
    """A copy of cache and run. Both name the factory of the original folder, whose file the test may change."""
    for name in ("cache.zarr", "run", "live"):
        shutil.copytree(original / name, tmp_path / name)
    yield tmp_path
    (original / "mine.py").write_text(GOOD)


def loading(folder: Path, data: Path):
    """Every command that loads the encoder of a cache or a run."""
    cache, trained = folder / "cache.zarr", folder / "run"
    live = ["--live-encoder", "--dataset", data, "--checkpoint", trained, "--unfreeze", "all"]
    return {
        "train": ["train", "--from-cache", cache, "--out", folder / "r1", *SMALL],
        "train --config": ["train", "--config", trained / "run.json", "--out", folder / "r4", *SMALL],
        "train --config of a live run": [
            *("train", "--config", folder / "live" / "run.json", "--out", folder / "r5", *SMALL),
        ],
        "train --resume": ["train", "--from-cache", cache, "--out", trained, "--resume", *SMALL],
        "finetune": ["finetune", *live, "--out", folder / "r2", *CPU, "--steps", 1, "--batch-size", 4],
        "finetune --from-cache": [
            *("finetune", "--from-cache", cache, "--checkpoint", trained, "--out", folder / "r3", "--unfreeze", "conv"),
            *(*CPU, "--steps", 1, "--batch-size", 4),
        ],
        "verify": ["verify", cache, "--dataset", data, "--device", "cpu"],
        "rollout": ["rollout", trained, "--episodes", 1, "--device", "cpu"],
        "export": ["export", trained, "--out", folder / "policy.pt2"],
        "report": ["report", trained, "--out", folder / "page.html"],
        "extract-features": [
            *("extract-features", data, "--encoder-from", trained, "--out", folder / "again.zarr", *CPU),
        ],
    }


def reading(folder: Path):
    """Every command that reads a cache or a run without its encoder."""
    cache, trained = folder / "cache.zarr", folder / "run"
    return {
        "inspect": ["inspect", trained],
        "inspect CACHE": ["inspect", cache],
        "cache inspect": ["cache", "inspect", cache],
        "cache compact": ["cache", "compact", cache],
        "cache export": ["cache", "export", cache, "--out", folder / "features.npz"],
        "verify --integrity": ["verify", cache, "--integrity"],
        "probe": ["probe", cache, "--device", "cpu"],
    }


def test_every_command_is_looked_at(tmp_path):
    command = typer.main.get_command(app)
    names = {name for name in command.commands if name != "cache"}
    names |= {f"cache {name}" for name in command.commands["cache"].commands}
    seen = {name.split(" --")[0] for name in (*loading(tmp_path, tmp_path), *reading(tmp_path))}
    assert names - seen == {"quickstart", "collect", "bench"}  # these read no cache or run of others


def test_a_factory_that_a_cache_or_a_run_names_is_not_run(original, made):
    witness = made / "witness"
    (original / "mine.py").write_text(f"from pathlib import Path\nPath({str(witness)!r}).write_text('x')\n{GOOD}")
    for name, command in loading(made, original / "data.hdf5").items():
        line = refused(run(*command))
        assert "mine.py:mine" in line, name
        assert "--encoder" in line, name
    for command in reading(made).values():
        done(run(*command))
    FeatureCache(made / "cache.zarr").features("agentview_image")
    for call in (load_policy, encoders_of_run):
        with pytest.raises(CheckpointError, match="runs only if you name it"):
            call(made / "run")
    with pytest.raises(EncoderError, match="runs only if you name it"):
        verify(made / "cache.zarr")
    assert not witness.exists()
    assert not [
        path for path in made.iterdir() if path.name in ("r1", "r2", "r3", "r4", "r5", "again.zarr", "policy.pt2")
    ]


def test_an_edited_factory_is_refused_wherever_it_is_loaded(original, made):
    (original / "mine.py").write_text(SOURCE.replace("SCALE", "3.0"))
    named = ["--encoder", f"{original}/mine.py:mine"]
    commands = loading(made, original / "data.hdf5")
    del commands["train --config of a live run"]  # a new run, whose encoder need not be that of another
    for command in commands.values():
        line = refused(run(*command, *named))
        assert "mine.py:mine is not the encoder that" in line
        assert "source or structure has changed" in line
    with pytest.raises(CheckpointError, match="structure has changed"):
        load_policy(made / "run", encoder=named[1])


def test_the_factory_that_is_named_runs_wherever_its_file_lies(original, made):
    pytest.importorskip("torch.export")
    shutil.copy(original / "mine.py", made / "elsewhere.py")
    named = ["--encoder", f"{made}/elsewhere.py:mine"]
    commands = loading(made, original / "data.hdf5")
    del commands["rollout"]  # needs a simulator
    del commands["finetune --from-cache"]  # an own encoder has no layers above its cut
    for command in commands.values():
        done(run(*command, *named))
    again = FeatureCache(made / "again.zarr").cameras["agentview_image"].identity
    assert (
        again["weights"]["digest"]
        == (FeatureCache(made / "cache.zarr").cameras["agentview_image"].identity["weights"]["digest"])
    )


def test_a_factory_named_for_an_encoder_that_needs_none_is_refused(original, tmp_path):
    plain = ["--no-pretrained-encoder", *CPU]
    done(run("extract-features", original / "data.hdf5", "--out", tmp_path / "plain.zarr", *plain))
    named = ["--encoder", f"{original}/mine.py:mine"]
    line = refused(run("train", "--from-cache", tmp_path / "plain.zarr", "--out", tmp_path / "r", *SMALL, *named))
    assert "has no effect" in line


def test_the_weights_of_a_ready_module_are_loaded_by_a_factory_of_the_same_structure(original, tmp_path):
    reference = f"{original}/mine.py:mine"
    ready = ImageEncoder(build_encoder(EncoderSpec(factory=reference)).net)
    save_encoder(ready, tmp_path / "ready.safetensors")
    loaded = load_encoder(None, tmp_path / "ready.safetensors", reference)
    assert loaded.weights_digest() == ready.weights_digest()
    with pytest.raises(EncoderError, match="a module without factory"):
        load_encoder(None, tmp_path / "ready.safetensors")


PLAIN = """
from torch import nn
def plain():
    net = nn.Sequential(nn.Conv2d(3, 6, 5, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.register_forward_hook(lambda module, given, out: SCALE * out)
    return net
"""


def test_an_edit_shows_although_no_class_comes_from_the_factorys_file(tmp_path):
    file = tmp_path / "plain.py"
    file.write_text(PLAIN.replace("SCALE", "1.0"))
    encoder = build_encoder(EncoderSpec(factory=f"{file}:plain"))
    save_encoder(encoder, tmp_path / "e.safetensors")
    load_encoder(None, tmp_path / "e.safetensors", f"{file}:plain")
    file.write_text(PLAIN.replace("SCALE", "2.0"))
    with pytest.raises(EncoderError, match="has changed"):
        load_encoder(None, tmp_path / "e.safetensors", f"{file}:plain")


def poisoned(config, witness):
    code = f"__import__('pathlib').Path({str(witness)!r}).write_text('x')"
    config["observation"]["encoder"]["low_dim"] = {
        **config["observation"]["encoder"].get("low_dim", {}),
        "core_class": "VisualCore",
        "core_kwargs": {"backbone_class": code, "backbone_kwargs": {}},
    }
    return config


def test_what_robomimic_would_evaluate_is_refused_in_a_run_and_in_a_given_config(original, tmp_path):
    pytest.importorskip("robomimic")
    witness, data, cache = tmp_path / "witness", original / "data.hdf5", tmp_path / "plain.zarr"
    done(run("extract-features", data, "--out", cache, "--no-pretrained-encoder", *CPU))
    short = ["--steps", 1, "--batch-size", 4, "--device", "cpu"]
    trained = ["train", "--from-cache", cache, "--out", tmp_path / "run", "--policy", "robomimic:bc", *short]
    done(run(*trained))
    value = json.loads((tmp_path / "run" / "run.json").read_text())
    given = poisoned({"algo_name": "bc", "observation": {"encoder": {}}}, witness)
    (tmp_path / "given.json").write_text(json.dumps(given))
    poisoned(value["policy"]["options"]["config"], witness)
    (tmp_path / "run" / "run.json").write_text(json.dumps(value))
    commands = [
        ["train", "--from-cache", cache, "--out", tmp_path / "r", "--robomimic-config", tmp_path / "given.json"],
        [*trained, "--resume"],
        *(command for name, command in loading(tmp_path, data).items() if name in ("rollout", "export", "report")),
        ["extract-features", data, "--encoder-from", tmp_path / "run", "--out", tmp_path / "a.zarr", *CPU],
    ]
    for command in commands:
        assert "encoder.low_dim.core_kwargs.backbone_class" in refused(run(*command))
    with pytest.raises(CheckpointError, match="execute it as code"):
        load_policy(tmp_path / "run")
    done(run("inspect", tmp_path / "run"))
    assert not witness.exists()
