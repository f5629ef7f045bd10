"""Finds an OpenGL backend that renders without a screen, and imports robosuite with it."""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import subprocess
import sys
import warnings
from functools import cache
from types import ModuleType
from typing import NamedTuple

from cache_pipeline.errors import CachePipelineError, MissingExtraError, install_command

PROBE_TIMEOUT_S = 60
_PROBE = "import mujoco; context = mujoco.GLContext(16, 16); context.make_current(); context.free()"
_INSTALL = "apt-get install libosmesa6 libgl1 libglib2.0-0"
_torch_may_follow = True


class OpenGLBackend(NamedTuple):
    """A working value of ``MUJOCO_GL``, or None and the reason why none works."""

    name: str | None
    reason: str


class OpenGLError(CachePipelineError, RuntimeError):
    """This machine has no OpenGL backend that renders images."""


@cache
def find_opengl_backend() -> OpenGLBackend:
    """Tries EGL and then OSMesa; only the value of ``MUJOCO_GL`` if it is set.

    Each try runs in its own process, because a broken driver ends the process. A try takes about 1 s.

    Raises:
        MissingExtraError: mujoco is not installed.
    """
    _require("mujoco")
    chosen = os.environ.get("MUJOCO_GL", "").strip().lower()
    if platform.system() != "Linux" and not chosen:
        return OpenGLBackend("cgl" if platform.system() == "Darwin" else "wgl", "the system's own")
    failures = []
    for name in (chosen,) if chosen else ("egl", "osmesa"):
        failure = _probe(name)
        if failure is None:
            return OpenGLBackend(name, "MUJOCO_GL is set" if chosen else "found by rendering")
        failures.append(f"{name}: {failure}")
    return OpenGLBackend(None, "; ".join(failures))


def load_robosuite() -> ModuleType:
    """Sets ``MUJOCO_GL`` to a working backend and imports robosuite.

    Raises:
        MissingExtraError: robosuite is not installed. OpenGLError: no backend works, or a library is missing.
    """
    _require("mujoco")
    _require("robosuite")
    backend = find_opengl_backend()
    if backend.name is None:
        raise OpenGLError(f"no OpenGL backend works on this machine ({backend.reason}); install one with: {_INSTALL}")
    if platform.system() == "Linux":
        os.environ["MUJOCO_GL"] = backend.name
        os.environ.update(_egl_device())
    # torchvision crashes the process if its libraries are loaded after mujoco's.
    if _torch_may_follow and importlib.util.find_spec("torchvision") is not None:
        import torchvision  # noqa: F401
    logging.getLogger("robosuite_logs").addFilter(_errors_only)
    with warnings.catch_warnings():
        # robosuite 1.5.2 has an invalid escape sequence in its logo.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            import robosuite
        except ImportError as error:  # of a library of the system, which OpenCV needs
            raise OpenGLError(f"robosuite cannot be imported: {error}; try: {_INSTALL}") from error
    return robosuite


def never_import_torch() -> None:
    """Declares that this process never imports torch, so ``load_robosuite`` need not do it first: 7 s and 700 MB."""
    global _torch_may_follow
    _torch_may_follow = False


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _require(module: str) -> None:
    if importlib.util.find_spec(module) is not None:
        return
    if module == "robosuite" and sys.version_info >= (3, 13):
        raise MissingExtraError("simulation needs robosuite, which needs Python 3.11 or 3.12: uv sync --python 3.12")
    raise MissingExtraError(f"simulation needs {module}, which is not installed: {install_command('sim')}")


def _probe(name: str) -> str | None:
    """Returns None if backend ``name`` creates a context, else the last line of its error."""
    environment = {**os.environ, **_egl_device(), "MUJOCO_GL": name}
    # robosuite renders only on the first EGL device, so the probe must use that one.
    environment.setdefault("MUJOCO_EGL_DEVICE_ID", os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0])
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {PROBE_TIMEOUT_S} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"the driver ended the process with {done.returncode}"


def _egl_device() -> dict[str, str]:
    """Names the EGL device if CUDA_VISIBLE_DEVICES is empty, because robosuite's EGL fails otherwise."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" and "MUJOCO_EGL_DEVICE_ID" not in os.environ:
        return {"MUJOCO_EGL_DEVICE_ID": "0"}
    return {}
