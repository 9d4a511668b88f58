"""Links in the documents lead to files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(path for path in ROOT.glob("**/*.md") if not {".venv", "build"} & set(path.relative_to(ROOT).parts))


def links(text: str) -> list[str]:
    """Targets within the repository, and what is in backquotes and looks like a Markdown file."""
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    return [target for target in targets if "://" not in target] + re.findall(r"`([\w/]+\.md)`", text)


def test_links_are_found() -> None:
    assert links("[a](b/c.md#d), ![](e.png), [f](https://g.org), [h](#i), `j/k.md`, `l.py`") == ["b/c.md", "e.png", "j/k.md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document: Path) -> None:
    targets = links(document.read_text(encoding="utf-8"))
    missing = [target for target in targets if not any((folder / target).exists() for folder in (document.parent, ROOT))]
    assert not missing
