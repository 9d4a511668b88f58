"""Imports point one way: each module may use those listed before it, so that a reader can start at the top."""

import ast
from pathlib import Path

import pytest

import ddpm_fast

PACKAGE = Path(ddpm_fast.__file__).parent
# Module or folder -> what of the package it may import, at the top of a file or inside a function.
ALLOWED = {
    "version": set(),
    "atomic": set(),
    "memory": set(),
    "reference": set(),
    "schedule": set(),
    "plan": {"reference", "schedule"},
    "triton_kernels": {"reference", "triton_kernels"},
    "ops": {"reference", "schedule", "plan", "triton_kernels", "ops"},
    "testing": {"reference", "schedule", "plan", "ops"},
    "nn": {"atomic", "ops", "nn"},
    "info": {"version", "ops"},
    "data": set(),
    "images": {"atomic"},
    "run_folder": {"atomic"},
    "draws": {"ops"},
    "networks": set(),
    "loop": {"reference", "plan", "ops", "networks"},
    "graph": {"nn", "networks", "loop"},
    "sampling": {"plan", "ops", "nn", "images", "networks", "loop", "graph"},
    "evaluate": {"schedule", "plan", "ops", "networks", "graph", "sampling"},
    "builtin": {"schedule", "plan", "nn", "run_folder"},
    "training": {
        *("version", "atomic", "memory", "schedule", "plan", "ops", "nn", "data", "images", "run_folder", "draws", "sampling"),
    },
    "integrations": {
        *("reference", "schedule", "plan", "ops", "nn", "networks", "loop", "graph", "sampling", "evaluate", "integrations"),
    },
    "__init__": {
        *("version", "memory", "schedule", "plan", "ops", "nn", "images", "sampling", "evaluate", "builtin", "training"),
        "integrations",
    },
    "cli": {"version", "plan", "info", "data", "images", "run_folder", "sampling", "evaluate", "builtin", "training"},
    "__main__": {"cli"},
}


def _imports(source: str, folder: tuple[str, ...] = ()) -> set[str]:
    """What of the package a file in `folder` of it imports, first component only; "ddpm_fast" for the package as a whole."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["ddpm_fast", *folder][: len(folder) + 2 - node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            modules = [[*base, alias.name] for alias in node.names]
        else:
            continue
        found |= {(module[1:] or module)[0] for module in modules if module[0] == "ddpm_fast"}
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import ddpm_fast", {"ddpm_fast"}),
        ("import ddpm_fast.ops.noise, torch", {"ops"}),
        ("from ddpm_fast import ops, plan", {"ops", "plan"}),
        ("from ddpm_fast.ops.noise import noise", {"ops"}),
        ("def late():\n    from ...plan import ddpm_plan", {"plan"}),
        ("from ... import ops", {"ops"}),
        ("from . import kernels", {"folder"}),
        ("from .kernels import kernel", {"folder"}),
        ("import torch\nfrom torch import nn\nfrom ddpm_fastest import x", set()),
    ],
)
def test_every_form_of_import_is_seen(source: str, found: set[str]) -> None:
    assert _imports(source, ("folder", "inner")) == found


def _module(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_point_one_way() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert {_module(file) for file in files} == set(ALLOWED)
    listed: set[str] = set()
    for name, allowed in ALLOWED.items():
        listed.add(name)
        assert allowed <= listed, f"{name} may import what comes after it: {allowed - listed}"
    for file in files:
        extra = _imports(file.read_text(), file.relative_to(PACKAGE).parts[:-1]) - ALLOWED[_module(file)]
        assert not extra, f"{file.relative_to(PACKAGE)} imports {extra}"


def test_importing_the_package_needs_neither_triton_nor_optional_packages() -> None:
    """In a fresh interpreter, importing ddpm_fast leaves heavy and optional packages alone."""
    import subprocess
    import sys

    optional = ("triton", "diffusers", "torchvision", "sklearn", "matplotlib", "tensorboard")
    script = f"import sys, ddpm_fast; print(*sorted({set(optional)} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() in ([], ["triton"])  # torch itself imports triton where it is installed
