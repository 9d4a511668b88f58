"""Docstrings of the package keep two rules that ruff does not know."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "ddpm_fast").glob("**/*.py"))
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

BEGINNINGS = re.compile(r"(?:Of|What|Where|Those|Whether|As|In)\b")
FAMILY = re.compile(r"\bfamil(?:y|ies)\b", re.IGNORECASE)


def docstrings(source: str) -> Iterator[tuple[str, str]]:
    """Yield name and docstring of a module and of every public class, function and method in it."""

    def walk(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, str]]:
        for child in node.body:
            if isinstance(child, DEFINITIONS) and (not child.name.startswith("_") or child.name.startswith("__")):
                name = prefix + child.name
                text = ast.get_docstring(child)
                if text is not None:
                    yield name, text
                if isinstance(child, ast.ClassDef):
                    yield from walk(child, f"{name}.")

    module = ast.parse(source)
    yield "module", ast.get_docstring(module) or ""
    yield from walk(module, "")


def test_docstrings_are_found() -> None:
    source = '"""M."""\nclass A:\n  """C."""\n  def b(self):\n    """D."""\n  def _c(self):\n    """No."""\n'
    assert dict(docstrings(source)) == {"module": "M.", "A": "C.", "A.b": "D."}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_a_verb_or_a_noun(module: Path) -> None:
    found = dict(docstrings(module.read_text(encoding="utf-8")))
    assert found["module"], "expected a module docstring"
    assert not [name for name, text in found.items() if BEGINNINGS.match(text)]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_say_backend(module: Path) -> None:
    assert not [name for name, text in docstrings(module.read_text(encoding="utf-8")) if FAMILY.search(text)]
