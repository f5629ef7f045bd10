"""The structure of docs/design.md, held against the code's own imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cache_pipeline"
FLOORS = {
    "errors": -1,  # below all, so that every other module may raise them
    "files": 0,
    "memory": 0,
    "progress": 0,
    "demos": 1,
    "encoders": 1,
    "cache": 1,
    "extract": 2,
    "policies": 2,
    "training": 3,
    "sim": 4,
    "reports": 5,
    "cli": 6,
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "cache_pipeline" else None


def imported(path: Path) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def test_every_room_has_a_floor():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES} - {"__init__", "__main__"}
    assert rooms == set(FLOORS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module, line in imported(path):
        other = room(module)
        if own in ("__init__", "__main__") or other is None or other == own or other not in FLOORS:
            continue
        assert FLOORS[other] < FLOORS[own], f"{path.name}:{line} in {own} imports {module}"


@pytest.mark.parametrize("folder", ["demos", "cache"])
def test_demos_and_cache_never_import_torch(folder):
    for path in (PACKAGE / folder).rglob("*.py"):
        for module, line in imported(path):
            assert module.split(".")[0] not in ("torch", "torchvision"), f"{path.name}:{line}"


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from cache_pipeline.cli import app; "
        "heavy = ('torch', 'torchvision', 'zarr', 'h5py', 'robosuite', 'matplotlib', 'numpy'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert shown.stdout.strip() == "[]"
