"""Broken files and values, drawn at random: each ends in an error of this package or in a sound result.

No other exception, no call longer than ``SLOWEST`` seconds, and no end of this process.
"""

import itertools
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import typer.main
from cache_fakes import TINY, extract
from fakes import make_dataset
from lerobot_fakes import encode, make_lerobot
from mutations import change_bytes, change_json, change_structure
from typer.testing import CliRunner

from cache_pipeline import isolation
from cache_pipeline.cli import app
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.demos.summary import inspect_dataset
from cache_pipeline.errors import CachePipelineError
from cache_pipeline.isolation import isolated

pytestmark = [pytest.mark.stress, pytest.mark.timeout(7200)]

FILES = int(os.environ.get("STRESS_FILES", "5000"))
RECORDS = int(os.environ.get("STRESS_RECORDS", "3000"))
CONFIGS = int(os.environ.get("STRESS_CONFIGS", "500"))
DRAWS = int(os.environ.get("STRESS_DRAWS", "2000"))
SEED = int(os.environ.get("STRESS_SEED", "0"))
SLOWEST = 60
CAMERA = {"agentview_image": (8, 8, 3)}
TRAIN = [
    "--policy-option",
    "hidden=[8]",
    "--emb-dim",
    "8",
    "--batch-size",
    "4",
    "--device",
    "cpu",
    "--precision",
    "fp32",
]


class Slow(BaseException):
    """A call took longer than ``SLOWEST`` seconds."""


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Slow

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SLOWEST)
    try:
        yield
    finally:
        signal.alarm(0)


def test_mutated_datasets(tmp_path):
    bases = [
        make_dataset(
            tmp_path / f"{name}.hdf5", lengths=(6, 5, 7, 6), cameras=CAMERA, compression=name, next_obs=name is None
        )
        for name in ("gzip", None)
    ]
    path = tmp_path / "mutated.hdf5"

    def mutate(rng: random.Random) -> str:
        shutil.copy(rng.choice(bases), path)
        change: Callable[[Path, random.Random], str] = rng.choice([change_bytes, change_structure])
        return change(path, rng)

    read_mutated("datasets", path, mutate)


@pytest.mark.parametrize(("version", "images"), [("v3.0", "h264"), ("v2.1", "av1"), ("v3.0", "PNG")])
def test_mutated_lerobot_folders(tmp_path, version, images):
    make_lerobot(tmp_path / "base", version=version, images=images)
    path = tmp_path / "mutated"

    def mutate(rng: random.Random) -> str:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(tmp_path / "base", path)
        file = rng.choice(sorted(file for file in path.rglob("*") if file.is_file()))
        return f"{file.name} {change_json(file, rng) if file.suffix == '.json' else change_bytes(file, rng)}"

    read_mutated(f"folders of {version}, {images}", path, mutate)


def test_mutated_datasets_of_encoded_frames(tmp_path):
    base = make_dataset(tmp_path / "base.hdf5", lengths=(6, 5, 7), cameras=CAMERA)
    with h5py.File(base, "r+") as file:
        for demo in file["data"].values():
            for camera in CAMERA:
                images = demo[f"obs/{camera}"][()]
                del demo[f"obs/{camera}"]
                rows = np.empty(len(images), object)
                rows[:] = [np.frombuffer(encode(image, "JPEG"), np.uint8) for image in images]
                demo["obs"].create_dataset(camera, data=rows, dtype=h5py.vlen_dtype(np.uint8))
    path = tmp_path / "mutated.hdf5"

    def mutate(rng: random.Random) -> str:
        shutil.copy(base, path)
        return change_bytes(path, rng)

    read_mutated("datasets of encoded frames", path, mutate)


def read_mutated(what: str, path: Path, mutate: Callable[[random.Random], str]) -> None:
    """Reads ``path`` after each of ``FILES`` mutations; keeps those that end in a fault."""
    isolated(_limit_cpu, 3.0)
    rng, ends, faults = random.Random(SEED), Counter[str](), []
    for number in range(FILES):
        said = mutate(rng)
        try:
            with time_limit():
                ends[_read(path)] += 1
        except BaseException as error:
            faults.append(f"{number}: {said}: {ended(error)}")
            path.rename(path.with_name(f"fault_{number}_{path.name}"))
    told(what, FILES, ends, faults)


def _limit_cpu(seconds: float) -> None:
    isolation.CPU_SECONDS = seconds


def _read(path: Path) -> str:
    ends = []
    for call in (lambda: inspect_dataset(path), lambda: _read_all(path)):
        try:
            call()
            ends.append("sound")
        except CachePipelineError as error:
            if "crashed" in str(error) or "CPU time" in str(error):
                isolated(_limit_cpu, 3.0)  # in the new child
                return "crash or hang in HDF5"
            ends.append("error")
    return ends[1]


def _read_all(path: Path) -> None:
    with Dataset.open(path) as dataset:
        for demo in range(len(dataset.demos)):
            dataset.rows(demo)
            for camera in dataset.cameras:
                dataset.frames(demo, camera)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dataset, a cache and a run of three steps."""
    folder = tmp_path_factory.mktemp("made")
    make_dataset(folder / "demos.hdf5", lengths=(12, 10, 11, 9), cameras=CAMERA)
    extract(folder / "lift.zarr", folder / "demos.hdf5")
    cache, encoder = folder / "lift.zarr", ["--encoder", TINY.factory]
    code, output = call("train", "--from-cache", cache, "--out", folder / "run", *encoder, *TRAIN, "--steps", 3)
    assert code == 0, output
    (folder / "run/rollouts").mkdir()
    result = {"episodes": 2, "successes": 1, "success_rate": 0.5, "ci95": [0.1, 0.9], "seconds": 3.0}
    records = [{"seed": seed, "success": True, "steps": 9, "seconds": 1.5, "video": None} for seed in (1, 2)]
    (folder / "run/rollouts/seed_0_2.json").write_text(json.dumps({**result, "records": records, "settings": {"a": 1}}))
    return folder


def call(*args: Any) -> tuple[int, str]:
    """Calls the command line in this process; any exception but an exit is a fault."""
    with time_limit():
        result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.output
    return result.exit_code, result.output


def ended(error: BaseException) -> str:
    """The end of an exception's text, where the output of a command has its error."""
    return f"{type(error).__name__} …{repr(error)[-600:]}"


def told(what: str, count: int, ends: Counter[Any], faults: list[str]) -> None:
    """Prints how the calls ended and every fault, which pytest would shorten; fails if there is a fault."""
    print(f"{count} {what}: {dict(ends)}, {len(faults)} faults")
    print("\n".join(faults))
    assert not faults


def one_line(output: str) -> bool:
    """Whether an error is one line."""
    lines = output.splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    return not errors or errors == [len(lines) - 1]


def test_mutated_records_of_runs(tmp_path, made):
    files = ["run.json", "checkpoints/index.json", "checkpoints/step_0000003/checkpoint.json", "metrics.csv"]
    files.append("rollouts/seed_0_2.json")
    encoder = ["--encoder", TINY.factory]
    cpu = ["--device", "cpu", "--overwrite", "--out", tmp_path / "tuned"]
    commands: list[list[Any]] = [
        ["inspect"],
        ["report", *encoder, "--overwrite"],
        ["train", "--from-cache", made / "lift.zarr", *encoder, *TRAIN, "--steps", 4, "--resume", "--out"],
        ["finetune", "--live-encoder", *encoder, "--steps", 1, *cpu, "--checkpoint"],
    ]
    faults, codes, rng = [], Counter[tuple[str, int]](), random.Random(SEED)
    for number in range(RECORDS):
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(made / "run", run)
        file = run / rng.choice(files)
        mutate = change_json if file.suffix == ".json" and rng.random() < 0.7 else change_bytes
        said, command = f"{file.name} {mutate(file, rng)}", rng.choice(commands)
        if file.parent.name == "rollouts":  # only report reads it
            command = commands[1]
        try:
            code, output = call(*command, run)
            codes[command[0], code] += 1
            assert code in (0, 1, 2, 3), output
            assert one_line(output), output
            if command[0] == "train" and file.name in ("index.json", "metrics.csv"):
                assert code == 0, output
        except BaseException as error:
            faults.append(f"{number}: {said}, {command[0]}: {ended(error)}")
    told("records", RECORDS, codes, faults)


def test_mutated_robomimic_configs(tmp_path, made):
    pytest.importorskip("robomimic", reason="robomimic is not installed")
    from cache_pipeline.policies.robomimic.config import default_config

    faults, codes, rng = [], Counter[int](), random.Random(SEED)
    cache, out = made / "lift.zarr", tmp_path / "run"
    for number in range(CONFIGS):
        path = tmp_path / "theirs.json"
        policy = rng.choice(["robomimic:bc", "robomimic:bc_rnn_gmm", "robomimic:bc_transformer"])
        config = default_config(policy).on_features(("agentview_image",), ("robot0_eef_pos",)).json
        config["observation"]["modalities"]["obs"] = {"rgb": ["agentview_image"], "low_dim": ["robot0_eef_pos"]}
        config["algo"]["actor_layer_dims"] = [8]
        path.write_text(json.dumps(config))
        said = (change_json if rng.random() < 0.9 else change_bytes)(path, rng)
        options = ["--steps", 1, "--device", "cpu", "--encoder", TINY.factory, "--overwrite", "--batch-size", 4]
        try:
            code, output = call("train", "--from-cache", cache, "--out", out, "--robomimic-config", path, *options)
            codes[code] += 1
            assert code in (0, 1, 2), output
        except BaseException as error:
            faults.append(f"{number}: {said}: {ended(error)}")
    told("robomimic configs", CONFIGS, codes, faults)


def words(text: str) -> list[str]:
    return text.split()


INTS = words("""-1 0 1 3 2147483648 9223372036854775807 9223372036854775808 18446744073709551616 1e3 nan 0x10
    1000000000000000000000000000000 -9223372036854775809""")
FLOATS = words("nan inf -inf -1 0 1e308 1e-320 1e400 -0.0 x 1 0.5")
TEXTS = words(""", ,, nope é ../up 1e999 [] - a,b none auto cuda cuda:7 cuda:-1 meta xla mps cpu:3 NaN = a=b a=NaN
    cpu:99999999999999999999 hidden=[] hidden=[0] hidden=-1 hidden=[1e30] hidden=null hidden=[100000000000] =1
    dropout=2 3:6 6:3 3:3 0:99999999999999999999 3:6,4:7 0,0 76 99999999999999999999,3 -3,4 1GiB 0 -1 1e30GB ..
    1..2GB layer4@0 layer4@x layer4@-1 layer9@0 layer4@0,layer3@99999999999999999999 robomimic: robomimic:nope
    resnet18 train missing.hdf5 /dev/null / . demos.hdf5 lift.zarr run file.py: file.py:x :x x.safetensors a@b=c
    =resnet18 agentview_image,agentview_image agentview_image=resnet18@ agentview_image= agentview_image=nope""")
TEXTS += ["", " ", "x" * 300, "y/" + "y" * 260, "new\nline", "\x1b[31mred"]


def test_options_drawn_at_random(tmp_path, made, monkeypatch):
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    encoder, cpu = ["--encoder", TINY.factory], ["--device", "cpu", "--precision", "fp32"]
    bases: dict[str, list[str]] = {
        "extract-features": ["demos.hdf5", "--out", "OUT.zarr", *encoder, *cpu],
        "extract-features --dry-run": ["demos.hdf5", "--out", "OUT.zarr", "--no-pretrained-encoder", *cpu, "--dry-run"],
        "inspect": ["lift.zarr"],
        "verify": ["lift.zarr", *encoder],
        "cache export": ["lift.zarr", "--out", "OUT.npz"],
        "train": ["--from-cache", "lift.zarr", "--out", "OUT", *encoder, *TRAIN, "--steps", "3"],
        "train --dataset": ["--dataset", "demos.hdf5", "--out", "OUT", *encoder, *TRAIN, "--steps", "3"],
        "finetune": ["--live-encoder", "--checkpoint", "run", "--out", "OUT", *encoder, "--steps", "1", *cpu],
        "probe": ["lift.zarr"],
        "report": ["run", *encoder, "--overwrite"],
        "export": ["run", "--out", "OUT.pt2", *encoder],
        "rollout": ["run", "--episodes", "1", "--horizon", "2", "--env-args", "missing.json"],
        "bench": ["load", "--seconds", "0.1", "--dataset", "demos.hdf5"],
    }
    faults, codes, rng = [], Counter[int](), random.Random(SEED)
    for number in range(DRAWS):
        name = rng.choice(list(bases))
        words = [word for word in name.split() if not word.startswith("--")]
        args, drawn = [base.replace("OUT", f"out_{number}") for base in bases[name]], []
        for option in rng.sample(options_of(words), rng.choice([1, 1, 1, 2])):
            flag = rng.choice([*option.opts, *option.secondary_opts])
            if flag in args and not option.multiple:
                at = args.index(flag)
                del args[at : at + (1 if option.is_flag else 2)]
            kind = option.type_descriptor.annotation
            pool = INTS if kind is int else FLOATS if kind is float else TEXTS
            drawn += [flag] if option.is_flag else [flag, rng.choice(pool)]
        started = time.monotonic()
        try:
            code, output = call(*words, *args, *drawn)
            codes[code] += 1
            assert code in (0, 1, 2, 3), output
        except BaseException as error:
            faults.append(f"{number}: {name} {drawn} {time.monotonic() - started:.0f} s {ended(error)}")
        for path in itertools.chain(Path().glob(f"out_{number}*"), Path().glob(f".out_{number}*")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    told("draws of options", DRAWS, codes, faults)


def options_of(words: list[str]) -> list[Any]:
    command: Any = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    return [item for item in command.params if item.param_type_name == "option" and item.name not in ("help", "json")]
