"""Errors on machines without simulator or OpenGL backend."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from cache_pipeline.errors import MissingExtraError
from cache_pipeline.sim import opengl


@pytest.mark.parametrize("module", ["mujoco", "robosuite"])
def test_a_missing_simulator_names_the_extra(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == module else find("json" if name == "mujoco" else name, *rest),
    )
    monkeypatch.setattr(sys, "version_info", (3, 11))
    with pytest.raises(MissingExtraError, match=rf"{module}.*uv sync --extra sim"):
        opengl.load_robosuite()
    monkeypatch.setattr(sys, "version_info", (3, 13))
    hint = "Python 3.11 or 3.12" if module == "robosuite" else "uv sync --extra sim"
    with pytest.raises(MissingExtraError, match=f"{module}.*{hint}"):
        opengl.load_robosuite()


def test_without_a_backend_the_error_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opengl, "_require", lambda module: None)
    monkeypatch.setattr(opengl, "find_opengl_backend", lambda: opengl.OpenGLBackend(None, "egl: broken"))
    with pytest.raises(opengl.OpenGLError, match=r"egl: broken.*apt-get install libosmesa6"):
        opengl.load_robosuite()


def test_a_missing_library_of_the_system_is_one_line_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *rest: object) -> None:
            if name == "robosuite":
                raise ImportError("libGL.so.1: cannot open shared object file")

    monkeypatch.setattr(opengl, "_require", lambda module: None)
    monkeypatch.setattr(opengl, "find_opengl_backend", lambda: opengl.OpenGLBackend("osmesa", "chosen"))
    monkeypatch.delitem(sys.modules, "robosuite", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(opengl.OpenGLError, match=r"imported: libGL\.so\.1: .*; try: apt-get install \S+ libgl1"):
        opengl.load_robosuite()


def test_every_backend_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opengl, "_require", lambda module: None)
    monkeypatch.setattr(opengl, "_probe", lambda name: f"no {name} here")
    monkeypatch.setattr(opengl.platform, "system", lambda: "Linux")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    found = opengl.find_opengl_backend.__wrapped__()
    assert found.name is None
    assert found.reason == "egl: no egl here; osmesa: no osmesa here"


def test_the_backend_that_the_user_chose_is_the_only_one_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(opengl, "_require", lambda module: None)
    monkeypatch.setattr(opengl, "_probe", tried.append)
    monkeypatch.setenv("MUJOCO_GL", "OSMesa")
    assert opengl.find_opengl_backend.__wrapped__().name == "osmesa"
    assert tried == ["osmesa"]


@pytest.mark.sim
def test_a_probe_of_nonsense_fails_with_a_reason() -> None:
    if importlib.util.find_spec("mujoco") is None:
        pytest.skip("mujoco is not installed")
    assert "nonsense" in (opengl._probe("nonsense") or "")
