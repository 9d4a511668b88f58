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

BEGINNINGS = re.compile(r"(?:Of|What|Where|Those|Whether|As|In)\b(?!\.| place)")  # "In place" is a term
FAMILY = re.compile(r"famil(?:y|ies)", re.IGNORECASE)  # the word for an implementation of an op is "backend"
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def wrong_words(text: str, suffix: str) -> Iterator[str]:
    """Yield words that break a rule.

    Docstrings, and comments on lines of their own, begin with a verb or a noun. Comments behind code are no fragments.
    """
    yield from FAMILY.findall(text)
    if suffix == ".md":
        return
    mark = "#" if suffix == ".py" else "//"
    blocks = re.findall(rf"(?:^[ \t]*{mark} .*\n)+", text, re.MULTILINE)
    begins = [" ".join(line.strip().removeprefix(mark).strip() for line in block.splitlines()) for block in blocks]
    if suffix == ".py":
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, DEFINITIONS)]
        begins += [ast.get_docstring(node) or "" for node in nodes]
    yield from (begin[:60] for begin in begins if BEGINNINGS.match(begin))
    remarks = re.findall(rf"^[ \t]*(?!{mark})\S.*? {mark} (.*)$", text, re.MULTILINE)
    yield from (remark for remark in remarks if remark.startswith("of "))


def test_wrong_words_are_found() -> None:
    source = (
        '"""Of M."""\n# As A\n# b.\nx = 1  # of c\n# In place.\nclass A:\n  """In C."""\n  def _b(self):\n    """What D."""\n'
    )
    assert [*wrong_words(source, ".py")] == ["As A b.", "Of M.", "In C.", "What D.", "of c"]
    assert [*wrong_words("// As A\n// b.\nint x;  // of c, a family\n", ".cpp")] == ["family", "As A b.", "of c, a family"]


def test_no_text_has_wrong_words() -> None:
    texts = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in TEXTS}
    assert len(texts) > 100
    wrong = [f"{path}: {words}" for path, text in texts.items() for words in wrong_words(text, path.suffix)]
    assert not wrong, "\n".join(wrong)
