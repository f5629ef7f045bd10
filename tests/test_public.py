from __future__ import annotations

import subprocess
import sys

import pytest

import cache_pipeline as cp

HEAVY = ("torch", "torchvision", "zarr", "h5py", "robomimic", "robosuite", "tensorboard")


def test_every_public_name_can_be_imported_and_is_listed() -> None:
    for name in cp.__all__:
        assert getattr(cp, name) is getattr(cp, name), name
        assert name in dir(cp)


def test_the_errors_are_of_one_family() -> None:
    errors = [getattr(cp, name) for name in cp.__all__ if name.endswith("Error")]
    assert len(errors) > 5
    assert all(issubclass(error, cp.CachePipelineError) for error in errors)


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'ExtractConfg'"):
        _ = cp.ExtractConfg  # type: ignore[attr-defined]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, cache_pipeline; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_guides_import_line_works() -> None:
    from cache_pipeline.encoders import MultiImageObsEncoder, get_resnet

    assert (MultiImageObsEncoder, get_resnet) == (cp.MultiImageObsEncoder, cp.get_resnet)


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cache_pipeline", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"cache-pipeline {cp.__version__}"
