"""Exports a policy to one self-contained file, from raw images and low-dim obs to actions, for robots.

    obs (B,To,…), noise → preprocessing → encoder → normalisers → projection → action head → actions (B,Ta,A)

Inputs by name: ``{camera: uint8 (B,To,H,W,3)}``, ``{low-dim key: float32 (B,To,…)}`` and, for stochastic policies,
``noise``: float32, standard normal, fresh for each call. Its shape is (B,Ta,A) for flow and (B, M + Ta·A) for gmm; with
zeros, gmm returns the mean of the most likely of M components. Equal inputs give equal actions. The output ``actions``
(B,Ta,A) is in dataset units. Any batch size works, unless the user's own encoder fixes it: then it is 1.

``.pt2`` is a ``torch.export`` program: ``torch.export.load(file).module()(obs, noise=noise)``, where ``obs`` is the
dict of all other inputs. ``.onnx`` takes each input by its name, in any ONNX runtime.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from cache_pipeline import __version__
from cache_pipeline.encoders.factory import Factories
from cache_pipeline.errors import CheckFailedError, ConfigError, MissingExtraError, available, install_command
from cache_pipeline.files import FileKind, check_output, output_file
from cache_pipeline.policies.spec import POLICIES
from cache_pipeline.policies.visuomotor import VisuomotorPolicy
from cache_pipeline.runs.policy import load_policy

FORMATS = (".onnx", ".pt2")
METADATA_FILE = "metadata.json"
NOISE, ACTIONS, BATCH = "noise", "actions", "batch"
TOLERANCE = 1e-4
LATENCY_CALLS = 10


def _is_exported(path: Path) -> bool:
    """Whether a file contains the :func:`metadata` of an exported policy; both formats store it as plain bytes."""
    content = path.read_bytes()
    return all(f"{key}".encode() in content for key in ("low_dim_keys", "obs_horizon", "action_horizon"))


POLICY_FILE = FileKind("a policy that export wrote", _is_exported)


class Inputs(NamedTuple):
    """Inputs of an exported file; ``noise`` is ``None`` for a deterministic policy."""

    obs: dict[str, Tensor]
    noise: Tensor | None

    def by_name(self) -> dict[str, Tensor]:
        return self.obs if self.noise is None else {**self.obs, NOISE: self.noise}


Function = Callable[[Inputs], Tensor]


class ExportResult(NamedTuple):
    """An exported file.

    Attributes:
        bytes: size of the file.
        batch: the only batch size that works; ``None`` if any does.
        inputs, outputs: name → type and shape, such as ``uint8 (B, 2, 84, 84, 3)``.
        max_abs_error: largest difference from the run's own ``act`` on the same inputs and noise, in dataset units.
        latency_ms: median time of one call at batch size 1.
    """

    run: Path
    file: Path
    format: str
    bytes: int
    batch: int | None
    inputs: dict[str, str]
    outputs: dict[str, str]
    max_abs_error: float
    latency_ms: float

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "run": str(self.run), "file": str(self.file)}

    def lines(self) -> list[str]:
        """The result as lines for a terminal."""
        return [
            f"wrote {self.file}: {self.format}, {self.bytes / 2**20:.1f} MiB, "
            f"{'any batch size' if self.batch is None else f'batch size {self.batch} only'}",
            *(f"  in   {name}: {what}" for name, what in self.inputs.items()),
            *(f"  out  {name}: {what}" for name, what in self.outputs.items()),
            f"largest difference from the run {self.max_abs_error:.2g}; {self.latency_ms:.1f} ms per call at batch 1",
        ]


def export_policy(
    run: Path, out: Path, *, overwrite: bool = False, device: str = "cpu", encoder: Factories = None
) -> ExportResult:
    """Writes the policy of ``run`` to ``out``, loads the file again and compares its actions with the run's.

    Args:
        run: a run, whose best checkpoint is exported, or one checkpoint.
        out: the file; its suffix chooses the format.
        overwrite: replace an existing file.
        device: where a ``.pt2`` program runs; ``.onnx`` files are checked on the CPU and run anywhere.
        encoder: as in ``load_policy``.

    Raises:
        ConfigError: an unknown suffix, an existing file, or a policy that cannot be exported.
        MissingExtraError: ``.onnx`` without the packages of the extra ``onnx``.
        CheckpointError: ``run`` cannot be loaded.
        CheckFailedError: the file's actions differ by more than 1e-4, or by 1e-4 of the largest action if that exceeds
            1. No file is written.
    """
    run, out = Path(run), Path(out)
    check_target(out)
    check_output(out, POLICY_FILE, overwrite=overwrite)
    onnx = out.suffix == ".onnx"
    policy = load_policy(run, "cpu" if onnx else device, encoder=encoder)
    check_policy(policy, run)
    program, batch = trace(policy)
    with output_file(out, POLICY_FILE, overwrite=overwrite) as partial:
        if onnx:
            write_onnx(program, partial, example_inputs(policy, 1), metadata(policy))
            function = read_onnx(partial)
        else:
            write_pt2(program, partial, metadata(policy))
            function = read_pt2(partial)
        error = compare(policy, function, (1,) if batch == 1 else (1, 3), out)
        latency = latency_ms(function, example_inputs(policy, 1))
    inputs = example_inputs(policy, 1).by_name()
    return ExportResult(
        run=run,
        file=out,
        format="ONNX" if onnx else "torch.export program",
        bytes=out.stat().st_size,
        batch=batch,
        inputs={name: _describe(value, batch) for name, value in inputs.items()},
        outputs={ACTIONS: _describe(torch.empty(1, policy.action_horizon, policy.action_dim), batch)},
        max_abs_error=error,
        latency_ms=latency,
    )


def check_target(out: Path) -> None:
    """Raises, before any work, if the format is unknown or its packages are not installed."""
    if out.suffix not in FORMATS:
        raise ConfigError(f"{out} has the suffix {out.suffix!r}, which is not an export format; {available(FORMATS)}")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if out.suffix == ".onnx" and missing:
        raise MissingExtraError(
            f"ONNX files need {missing[0]}, which is not installed: {install_command('onnx')}, or write a .pt2 file"
        )


def check_policy(policy: Any, run: Path) -> None:
    """Raises ConfigError for policies that cannot be exported."""
    if not isinstance(policy, VisuomotorPolicy):
        raise ConfigError(f"{run} is a robomimic run; only the policies {', '.join(POLICIES)} can be exported")
    taken = [key for key in (NOISE, ACTIONS) if key in policy.cameras or key in policy.low_dim]
    if taken:
        raise ConfigError(f"{run} has an obs named {taken[0]!r}, which the exported file uses for another input")


class ActingModule(nn.Module):
    """Module whose ``forward`` is the policy's ``act``."""

    def __init__(self, policy: VisuomotorPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, obs: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        return self.policy.act(obs, noise=noise)


def trace(policy: VisuomotorPolicy) -> tuple[torch.export.ExportedProgram, int | None]:
    """Traces the policy; returns the graph and its batch size: ``None`` if free, 1 if the encoder's code fixes it.

    Raises:
        ConfigError: the policy cannot be traced, for instance if the user's own encoder branches on values.
    """
    for size in (2, 1):
        obs, noise = example_inputs(policy, size)
        dim = torch.export.Dim.AUTO if size > 1 else torch.export.Dim.STATIC
        kwargs = {} if noise is None else {NOISE: noise}
        dynamic = {"obs": {key: {0: dim} for key in obs}, **{key: {0: dim} for key in kwargs}}
        try:
            with torch.no_grad(), _third_party_warnings():
                program = torch.export.export(ActingModule(policy), (obs,), kwargs, dynamic_shapes=dynamic)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"the policy cannot be traced by torch.export: {_first_line(error)}") from error
        if size == 1 or _batch_is_free(program):
            return program, None if size > 1 else 1
    raise AssertionError


def example_inputs(policy: VisuomotorPolicy, batch: int, seed: int = 0) -> Inputs:
    """Makes realistic inputs: smooth random images, and low-dim obs with the statistics of the train split."""
    generator = torch.Generator().manual_seed(seed)
    steps, obs = policy.obs_horizon, {}
    for camera, size in policy.cameras.items():
        colors = torch.rand(batch * steps, 3, 4, 4, generator=generator)
        images = functional.interpolate(colors, size=size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
        obs[camera] = (images * 255).to(torch.uint8).reshape(batch, steps, *size, 3)
    widths = [math.prod(shape) for shape in policy.low_dim.values()]
    joined = torch.randn(batch * steps, policy.inputs.offset.numel(), generator=generator).to(policy.device)
    rows = policy.inputs.invert(joined)[:, joined.shape[1] - sum(widths) :]
    for (key, shape), values in zip(policy.low_dim.items(), torch.split(rows, widths, dim=1), strict=True):
        obs[key] = values.reshape(batch, steps, *shape).contiguous()
    noise = None if policy.noise_shape is None else torch.randn(batch, *policy.noise_shape, generator=generator)
    to = policy.device
    return Inputs({key: value.to(to) for key, value in obs.items()}, None if noise is None else noise.to(to))


def metadata(policy: VisuomotorPolicy) -> dict[str, Any]:
    """Returns the description of inputs and outputs that is stored in the file as JSON."""
    return {
        "cameras": list(policy.cameras),
        "low_dim_keys": list(policy.low_dim),
        "obs_horizon": policy.obs_horizon,
        "action_horizon": policy.action_horizon,
        "action_dim": policy.action_dim,
        "noise_shape": None if policy.noise_shape is None else list(policy.noise_shape),
        "env_name": (policy.env_args or {}).get("env_name"),
        "versions": {"cache_pipeline": __version__, "torch": str(torch.__version__)},
    }


def write_pt2(program: torch.export.ExportedProgram, path: Path, values: dict[str, Any]) -> None:
    """Writes a torch.export program with ``metadata.json`` in it."""
    # PyTorch's writer aborts the process if the disk is full, so it writes to memory.
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={METADATA_FILE: json.dumps(values)})
    path.write_bytes(content.getbuffer())


def read_pt2(path: Path) -> Function:
    """Loads a torch.export program."""
    with path.open("rb") as file:
        module = torch.export.load(file).module()

    def call(inputs: Inputs) -> Tensor:
        kwargs = {} if inputs.noise is None else {NOISE: inputs.noise}
        with torch.no_grad():
            return module(inputs.obs, **kwargs)

    return call


def write_onnx(program: torch.export.ExportedProgram, path: Path, inputs: Inputs, values: dict[str, Any]) -> None:
    """Writes an ONNX model with ``values`` as metadata properties in JSON; raises ConfigError if it cannot."""
    try:
        with _third_party_warnings():
            converted = torch.onnx.export(
                program, dynamo=True, input_names=list(inputs.by_name()), output_names=[ACTIONS], verbose=False
            )
    except RuntimeError as error:
        raise ConfigError(f"the policy has no ONNX form: {_first_line(error)}; export it as .pt2") from error
    assert converted is not None
    converted.model.metadata_props.update({key: json.dumps(value) for key, value in values.items()})
    model = converted.model_proto
    _name_batch(model.graph)
    path.write_bytes(model.SerializeToString())


def _name_batch(graph: Any) -> None:
    """Names the free dimension ``batch`` in all shapes of an ONNX graph, also in products such as ``2*batch``."""
    symbols = {value.type.tensor_type.shape.dim[0].dim_param for value in graph.input} - {""}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(r"\w+", lambda word: BATCH if word[0] in symbols else word[0], size.dim_param)


def read_onnx(path: Path) -> Function:
    """Loads an ONNX model into onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def call(inputs: Inputs) -> Tensor:
        feed = {name: value.numpy() for name, value in inputs.by_name().items()}
        return torch.from_numpy(session.run([ACTIONS], feed)[0])

    return call


def compare(policy: VisuomotorPolicy, function: Function, batches: tuple[int, ...], out: Path) -> float:
    """Returns the largest difference between ``function`` and the policy; raises CheckFailedError beyond tolerance."""
    worst = 0.0
    for batch in batches:
        inputs = example_inputs(policy, batch, seed=batch)
        expected = policy.act(inputs.obs, noise=inputs.noise)
        error = float((function(inputs) - expected).abs().max())
        tolerance = TOLERANCE * max(1.0, float(expected.abs().max()))
        if not error <= tolerance:
            resized = [camera for camera, p in policy.obs_encoder.preprocessing.items() if p.resize_shape is not None]
            hint = f"; the resize of {resized[0]} may be the cause: train without --resize-shape" if resized else ""
            raise CheckFailedError(
                f"{out} was not written: its actions differ from the run's by {error:.3g} at batch {batch}, "
                f"more than {tolerance:.3g}{hint}"
            )
        worst = max(worst, error)
    return worst


def latency_ms(function: Function, inputs: Inputs) -> float:
    """Returns the median time of one call in milliseconds, after two warm-up calls."""
    times = []
    for _ in range(LATENCY_CALLS + 2):
        start = time.perf_counter()
        function(inputs).cpu()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[2:])


def _batch_is_free(program: torch.export.ExportedProgram) -> bool:
    names = set(program.graph_signature.user_inputs)
    shapes = [node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    # A size that the encoder's code fixes may stay a SymInt; its text is then the value.
    return not any(str(shape[0]).isdigit() for shape in shapes)


@contextmanager
def _third_party_warnings() -> Iterator[None]:
    """Hides deprecation warnings: torch and onnxscript call functions that they deprecate themselves."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=r"(torch|onnxscript|onnx_ir|copyreg)\b")
        yield


def _describe(value: Tensor, batch: int | None) -> str:
    sizes = ", ".join(["B" if batch is None else str(batch), *map(str, value.shape[1:])])
    return f"{str(value.dtype).removeprefix('torch.')} ({sizes})"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
