"""Imports point one way: each module may use those listed before it, so that a reader can start at the top."""

import ast
from pathlib import Path

import pytest

import ddpm_fast

PACKAGE = Path(ddpm_fast.__file__).parent
# Module or folder -> what of the package it may import at the top of a file.
ALLOWED = {
    "reference": set(),
    "schedule": set(),
    "plan": {"reference", "schedule"},
    "triton_kernels": {"reference", "triton_kernels"},
    "ops": {"reference", "schedule", "plan", "ops"},
    "testing": {"reference", "schedule", "plan", "ops"},
    "nn": {"ops", "nn", "atomic"},
    "atomic": set(),
    "images": {"atomic"},
    "data": set(),
}


def _imports(path: Path) -> set[str]:
    """The package's modules that a file imports, first component only, inside functions too."""
    found = set()
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            inside = list(path.relative_to(PACKAGE).parts[: depth - node.level])
            module = inside + (node.module.split(".") if node.module else [])
            found |= {module[0]} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ddpm_fast."):
            found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("name", ALLOWED)
def test_imports_point_one_way(name: str) -> None:
    path = PACKAGE / name
    files = list(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    allowed = ALLOWED[name] | ({"triton_kernels"} if name == "ops" else set())  # loaded when that family is asked for
    for file in files:
        assert _imports(file) <= allowed, f"{file.relative_to(PACKAGE)} imports {_imports(file) - allowed}"


def test_importing_the_package_needs_neither_triton_nor_optional_packages() -> None:
    """In a fresh interpreter, importing ddpm_fast leaves heavy and optional packages alone."""
    import subprocess
    import sys

    optional = ("triton", "diffusers", "torchvision", "sklearn", "matplotlib", "tensorboard")
    script = f"import sys, ddpm_fast; print(*sorted({set(optional)} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() in ([], ["triton"])  # torch itself imports triton where it is installed
