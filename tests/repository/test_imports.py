"""Imports point one way: each module may use those listed before it, so that a reader can start at the top."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ddpm_fast

PACKAGE = Path(ddpm_fast.__file__).parent
# Module or folder -> what of the package it may import, at the top of a file or inside a function.
ALLOWED = {
    "version": set(),
    "errors": set(),  # which every module may import
    "allocator": set(),
    "dtypes": set(),
    "resources": set(),
    "checks": {"dtypes"},
    "distributed": {"checks", "distributed"},
    "forms": {"checks"},
    "options": {"forms", "checks"},
    "interface": {"checks", "interface"},
    "files": {"checks", "resources", "options", "files"},
    "predictions": set(),
    "samplers": {"options", "predictions"},
    "reference": {"dtypes"},
    "schedule": {"checks", "files", "options", "predictions", "schedule"},
    "plan": {"checks", "options", "samplers", "reference", "predictions", "schedule", "plan"},
    "triton_kernels": {"reference", "triton_kernels"},
    "ops": {"dtypes", "checks", "predictions", "reference", "schedule", "plan", "triton_kernels", "ops"},
    "data": {"resources", "checks", "interface", "files", "forms", "options", "ops", "data"},
    "variational": {"dtypes", "checks", "predictions", "reference", "schedule", "ops"},
    "info": {"version", "ops"},
    "nn": {"dtypes", "resources", "checks", "interface", "files", "forms", "options", "reference", "ops", "nn"},
    "schemas": {"checks", "predictions", "schedule", "plan", "nn"},
    "inference": {"dtypes", "checks", "interface", "reference", "plan", "ops", "nn", "inference"},
    "integrations": {
        *(
            "dtypes",
            "checks",
            "interface",
            "options",
            "predictions",
            "reference",
            "schedule",
            "plan",
            "ops",
            "nn",
            "schemas",
            "inference",
            "integrations",
        ),
    },
    "sampling": {
        *("distributed", "dtypes", "resources", "checks", "interface", "files", "forms", "options", "reference", "plan", "ops"),
        *("schemas", "data", "inference", "sampling"),
    },
    "evaluation": {
        *("distributed", "dtypes", "resources", "checks", "files", "options", "predictions", "schedule", "plan", "ops"),
        *("variational", "nn", "inference", "sampling", "evaluation"),
    },
    "training": {
        *(
            "version",
            "allocator",
            "distributed",
            "resources",
            "checks",
            "interface",
            "files",
            "forms",
            "options",
            "predictions",
        ),
        *("schedule", "plan", "ops", "data", "variational", "nn", "schemas", "inference", "sampling", "training"),
    },
    "pretrained": {
        *("checks", "resources", "interface", "files", "options", "samplers", "schedule", "plan", "nn", "schemas"),
        "inference",
        *("sampling", "training"),
    },
    "publishing": {"checks", "resources", "files", "options", "training", "pretrained"},
    "__init__": {"version"},  # and what __init__.pyi imports, when a name is first used
    "cli": {
        *("version", "distributed", "resources", "checks", "files", "forms", "options", "predictions", "samplers", "info"),
        *("interface", "plan", "data", "inference", "sampling", "evaluation", "training", "pretrained", "ddpm_fast", "cli"),
    },
    "__main__": {"cli"},
}


def _modules(source: str, folder: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every module or name that a file in `folder` imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ["ddpm_fast", *folder][: len(folder) + 2 - node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ((*base, alias.name) for alias in node.names)


def _imports(source: str, folder: tuple[str, ...] = ()) -> set[str]:
    """Return the modules of the package that a file in `folder` imports. "ddpm_fast" is the package as a whole."""
    return {(module[1:] or module)[0] for module in _modules(source, folder) if module[0] == "ddpm_fast"}


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


def test_imports_point_one_way() -> None:
    paths = [file.relative_to(PACKAGE) for file in sorted(PACKAGE.rglob("*.py"))]
    modules = {path: path.parts[0].removesuffix(".py") for path in paths}
    assert set(modules.values()) == set(ALLOWED)
    listed: set[str] = set()
    for name, allowed in ALLOWED.items():
        listed.add("ddpm_fast" if name == "__init__" else name)
        assert allowed <= listed, f"{name} may import what comes after it: {allowed - listed}"
    for path, module in modules.items():
        extra = _imports((PACKAGE / path).read_text(), path.parts[:-1]) - ALLOWED[module] - {"errors"}
        assert not extra, f"{path} imports {extra}"


def test_benchmarks_import_no_circle() -> None:
    files = {file.stem: file for file in (PACKAGE.parent / "benchmarks").glob("*.py")}
    sources = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    imported = {name: {module[0] for module in _modules(source)} & {*files} for name, source in sources.items()}
    order = [*TopologicalSorter(imported).static_order()]  # raises a CycleError
    assert {"peers", "traced", "predict"} <= {*order}


def _names_imported_by(folder: str) -> Iterator[tuple[Path, str, str]]:
    """Yield each file of a folder and its sub-folders, a module of another folder of the package, and a name from it."""
    for file in (PACKAGE / folder).rglob("*.py"):
        inner = file.relative_to(PACKAGE).parts[:-1]
        for module in _modules(file.read_text(), inner):
            if module[0] == "ddpm_fast" and module[1] != folder:
                yield file, ".".join(module[1:-1]), module[-1]


def test_integrations_stand_on_public_ops_and_samplers() -> None:
    """They see nothing of how ops are dispatched, of programs and graphs, or of a training run."""
    allowed = {
        *("errors", "dtypes", "checks", "options", "plan", "plan.rows", "plan.timesteps", "plan.levels", "predictions"),
        *(
            "reference",
            "schedule",
            "schedule.objective",
            "ops",
            "ops.arguments",
            "ops.group_norm_silu",
            "ops.q_sample",
            "ops.reverse_step",
            "nn",
        ),
        *("nn.checkpoint", "nn.comparison", "nn.layers", "nn.unet", "inference", "inference.model", "interface", "schemas"),
    }
    imported = list(_names_imported_by("integrations"))
    assert {file.parent.name for file, *_ in imported} == {"integrations", "diffusers"}
    for file, module, name in imported:
        assert module in allowed, f"{file.name} imports {module}"
        assert not name.startswith("_"), f"{file.name} imports {name}"


def test_networks_take_ops_and_nothing_of_how_they_run() -> None:
    for file, module, name in (*_names_imported_by("nn"), *_names_imported_by("inference")):
        assert module != "ops.fused_op", file.name
        assert not (module.startswith("ops") and name.startswith("_")), f"{file.name} imports {name}"


# Names of PyTorch and of named tuples that begin with an underscore.
OTHERS = {
    *("_C", "_VF", "_foreach_add_", "_foreach_lerp_", "_foreach_norm", "_dynamo_marked_constant", "_has_any_global_hook"),
    *("_abort_process_group", "_get_default_store", "_asdict", "_fields", "_make", "_replace", "_version", "_cdata"),
    *("_buffers", "_modules", "_parameters", "_orig_mod", "_compiled_call_impl", "_forward_hooks", "_forward_pre_hooks"),
    *("_backward_hooks", "_backward_pre_hooks"),
}


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in OTHERS


def test_no_module_uses_a_private_name_of_another() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        nodes, own, used = [*ast.walk(ast.parse(path.read_text()))], set[str](), set[str]()
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and not ast.unparse(node).startswith("torch."):
                of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                (own if of_self else used).add(node.attr)
            elif isinstance(node, ast.ImportFrom) and node.level:
                used |= {alias.name for alias in node.names}
        private = {name for name in used if _is_private(name)} - own
        assert not private, f"{path.relative_to(PACKAGE)} uses {private}"


def test_no_function_hides_a_module() -> None:
    """Packages export no name of a module of theirs. Only `ops` does: one name finds an op in every folder."""
    for folder in [PACKAGE, *(path.parent for path in PACKAGE.rglob("__init__.py"))]:
        modules = {path.stem for path in folder.iterdir()}
        name = ".".join(["ddpm_fast", *folder.relative_to(PACKAGE).parts])
        hidden = modules & set(getattr(importlib.import_module(name), "__all__", ()))
        assert not hidden or name == "ddpm_fast.ops", f"{name} exports {hidden}"


def test_public_names_are_those_of_the_stub() -> None:
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    stub = {alias.name: node.module for node in imports for alias in node.names if alias.name != "__version__"}
    assert dir(ddpm_fast) == sorted(stub)
    for name, module in stub.items():
        assert getattr(ddpm_fast, name) is getattr(importlib.import_module(f"ddpm_fast.{module}"), name)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'ddpm_fast' has no attribute 'nothing'"):
        ddpm_fast.nothing  # noqa: B018
    assert ddpm_fast.nn.UNet is ddpm_fast.UNet  # submodules are found too
    assert not hasattr(ddpm_fast, "__main__")  # which would run the command line
    assert not hasattr(ddpm_fast, "no.module")


def _loaded(script: str) -> set[str]:
    """Return the names of the modules in a fresh interpreter after a script."""
    command = [sys.executable, "-W", "ignore", "-c", f"{script}\nimport sys; print(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_help_texts_need_no_torch() -> None:
    assert not {"torch", "numpy", "tqdm", "PIL", "safetensors"} & _loaded("import ddpm_fast.cli")


@pytest.mark.slow
def test_public_names_need_torch_and_numpy_alone_and_sampling_no_compiler() -> None:
    """Every other dependency is imported by the function that uses it, whatever its absence would break otherwise.

    The compiler takes seconds to import. `import torch` alone imports neither it nor sympy.
    """
    loaded = _loaded("""
import sys
others = ("PIL", "click", "tqdm", "safetensors", "msgspec", "diffusers", "torchvision", "sklearn", "matplotlib", "tensorboard")
sys.modules.update(dict.fromkeys(others))
import ddpm_fast
[getattr(ddpm_fast, name) for name in dir(ddpm_fast)]
for name in others:
    del sys.modules[name]
garments = ddpm_fast.load_builtin()
plan = ddpm_fast.dpm_solver_plan(garments.objective, 2, eta=1.0)
garments.sampler(plan)(1, class_labels="bag", guidance_scale=2.0, progress=False)
garments.sampler(steps=2)(1, progress=False)
""")
    assert "safetensors" in loaded
    assert not {"torch._dynamo", "sympy"} & loaded
