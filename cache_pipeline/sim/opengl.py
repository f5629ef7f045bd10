"""Finds an OpenGL backend that renders without a screen, and imports robosuite so that it uses that one."""

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
_INSTALL = "install one with: apt-get install libosmesa6"


class OpenGLBackend(NamedTuple):
    """The value of ``MUJOCO_GL`` that renders here, or None and the reason why none does."""

    name: str | None
    reason: str


class OpenGLError(CachePipelineError, RuntimeError):
    """Nothing on this machine can render images."""


@cache
def find_opengl_backend() -> OpenGLBackend:
    """Tries EGL and then OSMesa, each in a process of its own (a broken driver kills it); ``MUJOCO_GL``, if set, alone.

    Takes about a second per candidate. Raises MissingExtraError without mujoco.
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
    """Imports robosuite with ``MUJOCO_GL`` set to a backend that works; the environment variable stays set.

    Raises MissingExtraError without robosuite and OpenGLError without a backend.
    """
    _require("mujoco")
    _require("robosuite")
    backend = find_opengl_backend()
    if backend.name is None:
        raise OpenGLError(f"no OpenGL backend can render here ({backend.reason}); {_INSTALL}")
    if platform.system() == "Linux":
        os.environ["MUJOCO_GL"] = backend.name
        os.environ.update(_egl_device())
    # torchvision's libraries crash the process when they are loaded after mujoco's.
    if importlib.util.find_spec("torchvision") is not None:
        import torchvision  # noqa: F401
    logging.getLogger("robosuite_logs").addFilter(_errors_only)
    with warnings.catch_warnings():
        # robosuite 1.5.2 has an invalid escape sequence in its logo.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", SyntaxWarning)
        import robosuite
    return robosuite


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _require(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(f"simulation needs {module}, which is not installed: {install_command('sim')}")


def _probe(name: str) -> str | None:
    """None if backend ``name`` makes a context, else the last line of what went wrong."""
    environment = {**os.environ, **_egl_device(), "MUJOCO_GL": name}
    # robosuite renders on the first EGL device only, so the probe must not succeed on another one.
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
    """An empty CUDA_VISIBLE_DEVICES (no CUDA wanted) makes robosuite's EGL fail unless the device is named."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" and "MUJOCO_EGL_DEVICE_ID" not in os.environ:
        return {"MUJOCO_EGL_DEVICE_ID": "0"}
    return {}
