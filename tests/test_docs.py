"""Every command and snippet of these documents runs as printed, beside the sample and the datasets named there.

Three things differ: the sample has three of its demos, training without ``--steps`` takes few steps, and ImageNet
weights, which would be downloaded, are random ones.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from fakes import make_dataset
from lerobot_fakes import make_lerobot
from typer.testing import CliRunner

from cache_pipeline.cli import app
from cache_pipeline.encoders import get_resnet, resnet

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROGRAM = ("uv", "run", "cli.py")
FEW = {"train": 60, "finetune": 3}
DEMOS = {"train": ["demo_0", "demo_1"], "valid": ["demo_8"]}


def blocks(document: str) -> list[tuple[str, str]]:
    """(language, text) of each fenced block that can run."""
    return [(match[1], match[2]) for match in BLOCK.finditer((ROOT / document).read_text(encoding="utf-8"))]


def commands(text: str) -> list[list[str]]:
    """The words of each command of a block; comments and continued lines as a shell reads them."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def copy_sample(out: Path) -> None:
    """Writes the sample with the demos of ``DEMOS`` only."""
    out.parent.mkdir()
    with h5py.File(ROOT / "data" / "lift_sample.hdf5") as sample, h5py.File(out, "w") as few:
        few.create_group("data").attrs.update(sample["data"].attrs)
        for mask, demos in DEMOS.items():
            few[f"mask/{mask}"] = np.array(demos, "S")
            for demo in demos:
                sample.copy(f"data/{demo}", few["data"])


def make_recordings(folder: Path) -> None:
    """Writes small datasets in the layouts of docs/datasets.md, under the names there."""
    with h5py.File(make_dataset(folder / "open_the_drawer_demo.hdf5"), "r+") as libero:
        libero["data"].attrs["problem_info"] = json.dumps({"language_instruction": "open the drawer"})
        libero["data"].attrs["macros_image_convention"] = "opengl"
    seen = dict.fromkeys(("table_cam", "wrist_cam", "table_cam_normals", "table_cam_segmentation"), (32, 32, 3))
    with h5py.File(make_dataset(folder / "dataset.hdf5", cameras=seen, masks={}), "r+") as isaac:
        for demo in isaac["data"].values():
            demo["initial_state/articulation/robot/root_pose"] = np.zeros((1, 7), np.float32)
            del demo["rewards"], demo["dones"]
        isaac.create_group("data/demo_3").attrs["num_samples"] = 0
    masks = {"50_demos": ["demo_0", "demo_2", "demo_7"]}
    with h5py.File(make_dataset(folder / "demo_im128.hdf5", masks=masks), "r+") as robocasa:
        for demo in robocasa["data"].values():
            demo.attrs["ep_meta"] = json.dumps({"lang": "pick up the mug"})
    make_lerobot(folder / "aloha_static_coffee")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the sample, under its own name and as the documents' ``lift.hdf5``, other datasets, and weights."""
    copy_sample(tmp_path / "data" / "lift_sample.hdf5")
    (tmp_path / "lift.hdf5").symlink_to(tmp_path / "data" / "lift_sample.hdf5")
    make_recordings(tmp_path)
    torch.manual_seed(0)
    torch.save(get_resnet("resnet18").state_dict(), tmp_path / "my_weights.pth")
    monkeypatch.setattr(resnet, "imagenet_state", lambda name: get_resnet(name).state_dict())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("document", ["README.md", "docs/guide.md", "docs/api.md", "docs/datasets.md"])
def test_every_command_and_snippet_runs(document: str, workplace: Path) -> None:
    names: dict[str, Any] = {}
    for language, text in blocks(document):
        if language == "python":
            exec(compile(text, document, "exec"), names)
            continue
        for words in commands(text):
            if words[:2] in (["pip", "install"], ["uv", "sync"]):
                continue  # the two commands of the quickstart and of this suite are the quality gate's own
            assert tuple(words[:3]) == PROGRAM, words
            if words[3] in FEW and "--steps" not in words:
                words += ["--steps", str(FEW[words[3]])]
            result = CliRunner().invoke(app, words[3:])
            assert result.exit_code == 0, (words, result.output, result.exception)
