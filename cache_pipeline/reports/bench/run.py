"""``bench``: measures this project, peers and limits side by side in one run.

Each case returns rows: our rate and a peer's rate, measured in turns on the same data, and a limit that our code cannot
exceed, if there is one (the encoder alone, the bare policy step).
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cache_pipeline.errors import ConfigError, OptionError, available
from cache_pipeline.files import FileKind, check_output, finite, output_file, read_json, write_json
from cache_pipeline.progress import logger
from cache_pipeline.reports.bench.case import BenchRow, BenchSetup
from cache_pipeline.reports.sample import sample_dataset


class BenchResult(NamedTuple):
    """All rows, and the device of the measurements."""

    device: str
    rows: tuple[BenchRow, ...]

    def to_json(self) -> dict[str, Any]:
        return {"device": self.device, "rows": [row.to_json() for row in self.rows]}

    def lines(self) -> list[str]:
        wide = max(len(row.case) for row in self.rows)
        names = f"{'ours':>10}{'peer':>10}{'ratio':>8}{'limit':>10}{'of it':>7}"
        lines = [f"device: {self.device}", f"{'case':<{wide}}{names}"]
        for row in self.rows:
            shown = row.to_json()
            figures = "".join(
                f"{'' if shown[name] is None else format(shown[name], spec):>{width}}"
                for name, spec, width in (
                    ("ours", ",.4g", 10),
                    ("peer", ",.4g", 10),
                    ("ratio", ".3g", 8),
                    ("limit", ",.4g", 10),
                    ("of_limit", ".2f", 7),
                )
            )
            lines.append(f"{row.case:<{wide}}{figures}")
        lines += [f"peer of {row.case}: {row.peer_name}" for row in self.rows if row.peer_name]
        return lines


def _is_bench_json(path: Path) -> bool:
    value = read_json(path)
    return isinstance(value, dict) and {"device", "rows"} <= set(value)


BENCH_JSON = FileKind("a JSON file that bench wrote", _is_bench_json)


def run_bench(
    cases: tuple[str, ...],
    *,
    dataset: Path | None,
    store: str | None = None,
    rgb_model_name: str,
    batch_size: int,
    seconds: float,
    out: Path | None,
    device: str,
    overwrite: bool = False,
) -> BenchResult:
    """Runs the named cases (default: all), returns their rows, and writes them as JSON to ``out`` if given."""
    from cache_pipeline.encoders.device import resolve_device

    chosen = _choose(cases)
    if store is not None and "stream" not in chosen:
        raise OptionError("--store is for the case stream; type: bench stream --store URL")
    if out is not None:
        check_output(out, BENCH_JSON, overwrite=overwrite)
    resolved = str(resolve_device(device))
    rows: list[BenchRow] = []
    with tempfile.TemporaryDirectory(prefix="cache_pipeline_bench_") as folder:
        setup = BenchSetup(
            dataset=dataset if dataset is not None else sample_dataset(),
            folder=Path(folder),
            store=store,
            rgb_model_name=rgb_model_name,
            batch_size=batch_size,
            seconds=seconds,
            device=resolved,
        )
        for name, case in chosen.items():
            logger.info("bench %s …", name)
            rows += case(setup)
    result = BenchResult(describe_device(resolved), tuple(rows))
    if out is not None:
        with output_file(out, BENCH_JSON, overwrite=overwrite) as partial:
            write_json(partial, finite(result.to_json()))
    return result


def describe_device(device: str) -> str:
    """Describes the processor or GPU and the versions of torch and Python."""
    import torch

    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _choose(cases: tuple[str, ...]) -> dict[str, Callable[[BenchSetup], list[BenchRow]]]:
    from cache_pipeline.reports.bench import encoding as bench_encoding
    from cache_pipeline.reports.bench import training as bench_training

    known: dict[str, Callable[[BenchSetup], list[BenchRow]]] = {
        "encode": bench_encoding.encode,
        "extract": bench_encoding.extract,
        "load": bench_encoding.load,
        "train": bench_training.train,
        "stream": bench_training.stream,
        "finetune": bench_training.finetune,
        "frontier": bench_training.frontier,
    }
    for case in cases:
        if case not in known:
            raise ConfigError(f"bench has no case {case!r}; {available(known, case)}")
    return {name: known[name] for name in (cases or known)}
