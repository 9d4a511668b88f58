"""Rules of wording that ruff does not know."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("ddpm_fast", "csrc", "tests", "benchmarks", "docs", "examples")
SUFFIXES = {".py", ".pyi", ".h", ".cpp", ".cu", ".md"}
TEXTS = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
TEXTS = [*ROOT.glob("*.md"), *ROOT.glob("*.py"), *(path for path in TEXTS if path != Path(__file__))]
MODULES = [path for path in TEXTS if path.suffix == ".py"]

BEGINNINGS = re.compile(r"(?:Of|What|Where|Those|Whether|As|In)\b(?!\.| place)")  # "In place" is a term
FAMILY = re.compile(r"famil(?:y|ies)", re.IGNORECASE)
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(source: str) -> Iterator[tuple[str, str]]:
    """Yield name and docstring of a module and of every class and function in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DEFINITIONS) and (text := ast.get_docstring(node)) is not None:
            yield getattr(node, "name", "module"), text


def comments(source: str, suffix: str) -> Iterator[str]:
    """Yield every comment that stands on lines of its own, as one string."""
    mark = "#" if suffix == ".py" else "//"
    for block in re.findall(rf"(?:^[ \t]*{mark} .*\n)+", source, re.MULTILINE):
        yield " ".join(line.strip().removeprefix(mark).strip() for line in block.splitlines())


def test_docstrings_and_comments_are_found() -> None:
    source = '"""M."""\n# A\n# b.\nx = 1  # c\nclass A:\n  """C."""\n  def _b(self):\n    """D."""\n'
    assert dict(docstrings(source)) == {"module": "M.", "A": "C.", "_b": "D."}
    assert list(comments(source, ".py")) == ["A b."]


def remarks(source: str, suffix: str) -> Iterator[str]:
    """Yield every comment that stands behind code."""
    mark = "#" if suffix == ".py" else "//"
    yield from re.findall(rf"^[ \t]*(?!{mark})\S.*? {mark} (.*)$", source, re.MULTILINE)


def test_remarks_behind_code_are_no_fragments() -> None:
    assert list(remarks("# A\nx = 1  # b\n", ".py")) == ["b"]
    wrong = []
    for path in TEXTS:
        if path.suffix != ".md":
            found = remarks(path.read_text(encoding="utf-8"), path.suffix)
            wrong += [f"{path.relative_to(ROOT)}: {remark}" for remark in found if remark.startswith("of ")]
    assert not wrong, "\n".join(wrong)


def test_docstrings_and_comments_begin_with_a_verb_or_a_noun() -> None:
    wrong = []
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT)
        if path.suffix == ".py":
            wrong += [f"{name}: {where}: {begin}" for where, begin in docstrings(text) if BEGINNINGS.match(begin)]
        if path.suffix != ".md":
            wrong += [f"{name}: {begin[:60]}" for begin in comments(text, path.suffix) if BEGINNINGS.match(begin)]
    assert not wrong, "\n".join(wrong)


def test_modules_of_the_package_are_documented() -> None:
    for path in (ROOT / "ddpm_fast").rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_code_and_documents_say_backend() -> None:
    """Identifiers, comments, messages and pages have one word for an implementation of an op."""
    assert len(TEXTS) > 100
    assert not [str(path.relative_to(ROOT)) for path in TEXTS if FAMILY.search(path.read_text(encoding="utf-8"))]
