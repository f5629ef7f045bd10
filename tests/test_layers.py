"""The structure that docs/design.md describes, compared with the code."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cache_pipeline"
LAYERS = {
    "text": -2,
    "errors": -1,  # below all, so that every other module may raise them
    "isolation": -1,
    "factories": 0,
    "files": 0,
    "hdf5": 0,
    "memory": 0,
    "object_storage": 0,
    "options": 0,
    "progress": 0,
    "demos": 1,
    "encoders": 1,
    "cache": 1,
    "extract": 2,
    "policies": 2,
    "runs": 3,
    "sim": 4,
    "training": 5,
    "reports": 6,
    "cli": 7,
}
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FUNCTION, MOST_PARAMETERS = 60, 12


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


def layer_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "cache_pipeline" else None


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """(name, line) of every import, those inside functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}", node


def test_every_package_has_a_layer():
    packages = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} - {"__init__", "__main__"}
    assert packages == set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module, line in imported(path):
        other = layer_of(module)
        if own in ("__init__", "__main__") or other is None or other == own or other not in LAYERS:
            continue
        assert LAYERS[other] < LAYERS[own], f"{path.name}:{line} in {own} imports {module}"


def test_no_modules_import_each_other_in_a_circle():
    needed: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        needed[name] = set()
        for module, _ in imported(path):
            while module not in MODULES and "." in module:
                module = module.rpartition(".")[0]
            needed[name] |= {module} & MODULES.keys() - {name, "cache_pipeline"}
    while free := [name for name, others in needed.items() if not others & needed.keys()]:
        needed = {name: others for name, others in needed.items() if name not in free}
    assert not needed


@pytest.mark.parametrize("folder", ["demos", "cache"])
def test_demos_and_cache_never_import_torch(folder):
    for path in (PACKAGE / folder).rglob("*.py"):
        for module, line in imported(path):
            assert module.split(".")[0] not in ("torch", "torchvision"), f"{path.name}:{line}"


def test_functions_are_short_and_take_few_parameters():
    """MultiImageObsEncoder alone takes more: its options are the guide's."""
    long = [name for name, node in functions() if node.end_lineno - node.lineno >= LONGEST_FUNCTION]
    many = [name for name, node in functions() if _parameters(node) > MOST_PARAMETERS]
    assert long == []
    assert [name for name in many if not name.startswith("encoders/obs_encoder.py")] == []


def _parameters(node: ast.FunctionDef) -> int:
    return len([arg for arg in (*node.args.args, *node.args.kwonlyargs) if arg.arg not in ("self", "cls")])


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from cache_pipeline.cli import app; "
        "heavy = ('torch', 'torchvision', 'zarr', 'h5py', 'robosuite', 'matplotlib', 'numpy'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert shown.stdout.strip() == "[]"
