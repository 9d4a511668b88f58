"""Rules of wording that ruff does not know."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "ddpm_fast").glob("**/*.py"))
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

BEGINNINGS = re.compile(r"(?:Of|What|Where|Those|Whether|As|In)\b")
FAMILY = re.compile(r"famil(?:y|ies)", re.IGNORECASE)
FOLDERS = ("ddpm_fast", "csrc", "tests", "benchmarks", "docs", "examples")
SUFFIXES = {".py", ".pyi", ".h", ".cpp", ".cu", ".md"}
TEXTS = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
TEXTS = [*ROOT.glob("*.md"), *ROOT.glob("*.py"), *(path for path in TEXTS if path != Path(__file__))]


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


def test_code_and_documents_say_backend() -> None:
    """Identifiers, comments, messages and pages have one word for an implementation of an op."""
    assert len(TEXTS) > 100
    assert not [str(path.relative_to(ROOT)) for path in TEXTS if FAMILY.search(path.read_text(encoding="utf-8"))]
