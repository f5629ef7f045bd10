"""Every command that writes, run on a disk that is too small for its output."""

from __future__ import annotations

import gc
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import typer
from cache_fakes import CAMERA, TINY
from fakes import make_dataset
from typer.testing import CliRunner

from cache_pipeline.cli import app
from cache_pipeline.cli.app import ErrorGroup, configure
from cache_pipeline.encoders.image_encoder import EncoderSpec
from cache_pipeline.reports import quickstart
from cache_pipeline.reports.bench import run as bench
from cache_pipeline.runs.checkpoint import has_checkpoint
from cache_pipeline.sim import collect as collecting
from cache_pipeline.sim.collect_config import CollectConfig
from cache_pipeline.sim.config import RolloutConfig
from cache_pipeline.sim.results import RolloutResult, keep, settings_of
from cache_pipeline.sim.video import write_video

CPU = ["--encoder", str(TINY.factory), "--device", "cpu"]
STEPS = ["--steps", 2, "--batch-size", 4, "--device", "cpu", "--emb-dim", 8]
LIMITS = ("no space left", "file size limit exceeded", "file too large")


class Made(NamedTuple):
    """Inputs of the commands.

    Attributes:
        long: a dataset of more than a batch.
        dead_rows: a cache with rows to free.
    """

    dataset: Path
    long: Path
    cache: Path
    dead_rows: Path
    run: Path


def cli(*args: object) -> Any:
    return CliRunner().invoke(app, ["--quiet", *map(str, args)])


def called(function: Callable[[], object]) -> Any:
    """Runs a function as a command of the command line."""
    one = typer.Typer(cls=ErrorGroup)
    one.callback()(configure)
    one.command("one")(lambda: function() and None)
    return CliRunner().invoke(one, ["--quiet", "one"])


def make(folder: Path) -> Made:
    names = ("data.hdf5", "long.hdf5", "data.zarr", "dead.zarr", "run")
    made = Made(*(folder / name for name in names))
    make_dataset(made.long, lengths=(40, 40, 10))
    grown = make_dataset(folder / "grown.hdf5", lengths=(7, 5, 9, 30))
    done = [cli("extract-features", grown, "--out", made.dead_rows, "--cameras", CAMERA, *CPU)]
    make_dataset(grown)
    done.append(cli("extract-features", grown, "--out", made.dead_rows, "--cameras", CAMERA, *CPU))
    make_dataset(made.dataset)
    done.append(cli("extract-features", made.dataset, "--out", made.cache, "--cameras", CAMERA, *CPU))
    done.append(cli("train", "--from-cache", made.cache, "--out", made.run, *CPU[:2], *STEPS))
    assert [result.exit_code for result in done] == [0] * 4, [result.output for result in done]
    return made


class Command(NamedTuple):
    """A command that writes.

    Attributes:
        output: name of the file or folder.
        run: runs it, given the path of the output and whether to overwrite.
        source: folder to copy to that path first, if it changes one.
        wrote: pattern of the files that it writes.
    """

    output: str
    run: Callable[[Path, bool], Any]
    source: Path | None = None
    wrote: str = "**/*"

    def begin(self, out: Path) -> Path:
        """Makes the place for the output and returns its path."""
        out.parent.mkdir(exist_ok=True)
        if self.source is not None:
            shutil.copytree(self.source, out)
        return out

    def needed(self, out: Path) -> int:
        """Returns the size of the largest file of the output in bytes."""
        return max(file.stat().st_size for file in ([out] if out.is_file() else out.glob(self.wrote)))


def commands(made: Made) -> dict[str, Command]:
    """Every command that writes, by name."""

    def with_options(*words: object, out: str = "--out") -> Callable[[Path, bool], Any]:
        return lambda path, again: cli(*words, out, path, *(["--overwrite"] if again else []))

    def resumed(*words: object) -> Callable[[Path, bool], Any]:
        return lambda out, again: cli(*words, "--out", out, *(["--resume"] if has_checkpoint(out) else []))

    run, cache = [made.run, *CPU[:2]], ["--from-cache", made.cache]
    extract = with_options("extract-features", made.dataset, "--cameras", CAMERA, *CPU)
    return {
        "extract-features": Command("x.zarr", extract),
        "cache compact": Command("x.zarr", lambda out, again: cli("cache", "compact", out), made.dead_rows),
        "cache export hdf5": Command("x.hdf5", with_options("cache", "export", made.cache)),
        "cache export npz": Command("x.npz", with_options("cache", "export", made.cache)),
        "train": Command("run", resumed("train", *cache, *CPU[:2], *STEPS)),
        "finetune": Command("run", resumed("finetune", "--checkpoint", *run, "--live-encoder", *STEPS[:6])),
        "report": Command("x.html", with_options("report", *run)),
        "inspect": Command("x.png", with_options("inspect", made.cache, out="--views")),
        "probe": Command("x.png", with_options("probe", made.cache, "--device", "cpu")),
        "bench": Command("x.json", lambda out, again: called(lambda: small_bench(out, again))),
        "collect": Command("x.hdf5", lambda out, again: called(lambda: small_collect(out, again))),
        "quickstart": Command("x", lambda out, again: called(lambda: small_quickstart(made.long, out))),
        "rollout": Command("run", lambda out, again: called(lambda: small_rollout(out)), made.run, "rollouts/*"),
        "rollout --video": Command("x.mp4", lambda out, again: called(lambda: small_video(out, again))),
        "export pt2": Command("x.pt2", with_options("export", *run)),
        "export onnx": Command("x.onnx", with_options("export", *run)),
    }


def small_bench(out: Path, overwrite: bool) -> None:
    """Writes the figures of a case that takes no time."""
    row = bench.BenchRow("train", 1.0, 0.5, "a peer", 2.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "_choose", lambda cases: {"train": lambda setup: [row] * 50})
        bench.run_bench(
            (), dataset=out, rgb_model_name="resnet18", batch_size=1, seconds=1, out=out, device="cpu",
            overwrite=overwrite,
        )  # fmt: skip


def small_quickstart(dataset: Path, out: Path) -> None:
    """Runs all stages on a small dataset, with random weights and without a download."""
    with pytest.MonkeyPatch.context() as patch:
        random = EncoderSpec(weights="random")
        patch.setattr(quickstart, "choose_weights", lambda weights, prefix, seed: (random, "random weights"))
        quickstart.run_quickstart(out, steps=2, weights=None, device="cpu", seed=0, dataset=dataset)


class NoEnvironment:
    """Stands in for the simulator."""

    def __enter__(self) -> NoEnvironment:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def small_collect(out: Path, overwrite: bool) -> None:
    """Collects two demos of random images."""
    rng = np.random.default_rng(0)
    obs = {CAMERA: rng.integers(0, 256, (40, 24, 24, 3), np.uint8), "object": rng.normal(size=(40, 10))}
    zeros = np.zeros(40)
    demo = collecting.RecordedDemo(
        obs, np.ones((40, 7)), zeros, zeros.astype(np.int64), np.zeros((40, 32)), "<mujoco/>", True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "make_env_args", lambda config: {"env_name": config.task})
        patch.setattr(collecting.Environment, "from_env_args", lambda *args: NoEnvironment())
        patch.setattr(collecting, "record_demo", lambda env, config, attempt: demo)
        config = CollectConfig(out=out, cameras=(CAMERA,), demos=2, overwrite=overwrite)
        collecting.collect(config, progress=False)


def small_rollout(run: Path) -> None:
    """Keeps a result in a run folder."""
    config = RolloutConfig(run=run)
    kept = keep(RolloutResult(20, 10, 0.5, (0.3, 0.7), 1.0, ()), config, settings_of(config))
    assert json.loads(kept.read_text())["successes"] == 10


def small_video(out: Path, overwrite: bool) -> None:
    rng = np.random.default_rng(0)
    write_video(out, list(rng.integers(0, 256, (10, 64, 64, 3), np.uint8)), 20, overwrite=overwrite)


def contents(folder: Path) -> dict[Path, bytes]:
    """Path → bytes of every file."""
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def check_refused(result: Any, path: Path) -> None:
    """The command has ended in one line that names the limit and the place, and left no partial file."""
    result.exc_info = result.exception = None  # they hold open files
    gc.collect()
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 1, result.output
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert any(limit in lines[0] for limit in LIMITS), lines[0]
    assert str(path) in lines[0]
    assert result.stdout == ""
    assert [file.name for file in path.parent.rglob("*") if file.name.endswith((".partial", ".lock"))] == []


@contextmanager
def file_size_limit(most: int) -> Iterator[None]:
    """Files of this process and of processes that it starts cannot grow beyond ``most`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
