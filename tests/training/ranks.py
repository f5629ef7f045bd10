"""Trains with several processes, as ``torchrun`` would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

CODE = """
import json, sys
from pathlib import Path
import torch
from cache_pipeline.errors import CachePipelineError
from cache_pipeline.training import config, finetune, train
torch.set_num_threads(1)
kind, text, before = sys.argv[1:]
exec(before)
options = json.loads(text)
try:
    if kind == "train":
        train.train(config.TrainConfig.from_json(options), progress=False)
    else:
        finetune.finetune(config.FinetuneConfig.from_json(options), progress=False)
except KeyboardInterrupt as stopped:
    print("stopped:", stopped, file=sys.stderr)
    sys.exit(130)
except CachePipelineError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def start(kind: str, options: str, world: int = 2, before: str = "") -> list[tuple[int, str]]:
    """Exit status and stderr of each process that runs ``kind`` with options as JSON."""
    return ended(launch(kind, options, world, before))


def launch(kind: str, options: str, world: int = 2, before: str = "") -> list[subprocess.Popen[str]]:
    """The processes, each of which runs the code ``before`` first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return [
        subprocess.Popen(
            [sys.executable, "-c", CODE, kind, options, before],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit status and stderr of each."""
    said = [process.communicate(timeout=120)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]
