"""Documents: links lead to files that are there, Python blocks run, and commands exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

import ddpm_fast
from ddpm_fast import cli

ROOT = Path(__file__).parents[2]
# Environments and builds have thousands of files, so the search never enters them.
FOLDERS = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in {".git", ".venv", "build"}]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in folder.rglob("*.md"))])
PAGES = [ROOT / "README.md", *sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "migrating").glob("*.md")])]

# A comment above a Python block says how it is run here: `<!-- test: 1000 -> 2 -->` replaces text, `<!-- test: skip: why -->`
# leaves the block out. `<!-- test: run`, lines of Python and `-->` run what a reader need not see.
_BLOCK = re.compile(
    r"(?P<markers>(?:^<!-- test: [^\n]* -->\n)*)^```python\n(?P<code>.*?)^```$|^<!-- test: run\n(?P<run>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)


def links(text: str) -> list[str]:
    """Return targets within the repository, and what is in backquotes and looks like one of its files or folders."""
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    named = re.findall(r"`([\w/]+\.md|(?:csrc|ddpm_fast|tests|docs)/[^`<*\s]*)`", text)  # not those with an <op>
    return [target for target in targets if "://" not in target] + named


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Return the Python to run, in order, and the line on which each block starts."""
    blocks = []
    for match in _BLOCK.finditer(text):
        kind = "code" if match["run"] is None else "run"
        code = match[kind]
        for marker in re.findall(r"<!-- test: (.*?) -->", match["markers"] or ""):
            old, arrow, new = marker.partition(" -> ")
            assert (arrow and old in code) or re.fullmatch(r"skip: .+", marker), f"expected another marker than {marker!r}"
            code = code.replace(old, new) if arrow else ""
        blocks.append((text.count("\n", 0, match.start(kind)) + 1, code))
    assert "<!-- test:" not in _BLOCK.sub("", text), "expected a Python block right below every marker"
    return blocks


def commands(text: str) -> list[list[str]]:
    """Return the words of every command in the shell blocks, without comments and variables in front."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    parts = [re.sub(r"^\s*(\w+=\S*\s+)*", "", part) for line in lines for part in re.split(r"&&|;|\|", line)]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Return a function that fails unless `ddpm-fast` has the command, its options and their values. Paths need not exist."""
    monkeypatch.setattr(click.Context, "invoke", lambda *_, **__: None)
    monkeypatch.setattr(click.Path, "convert", lambda self, value, *_: value)

    def parse(arguments: list[str]) -> None:
        result = CliRunner().invoke(cli.main, arguments)
        assert result.exit_code == 0, result.output

    return parse


def test_links_are_found() -> None:
    text = "[a](b/c.md#d), ![](e.png), [f](https://g.org), [h](#i), `j/k.md`, `l.py`, `tests/m`, `tests/<op>.py`"
    assert links(text) == ["b/c.md", "e.png", "j/k.md", "tests/m"]


def test_python_blocks_are_found() -> None:
    text = "a\n```python\nb\n```\n<!-- test: c -> d -->\n```python\nc\n```\n<!-- test: skip: e -->\n```python\nf\n```\n"
    assert python_blocks(text) == [(3, "b\n"), (7, "d\n"), (11, "")]
    assert python_blocks("<!-- test: run\na\nb\n-->\n```python\nc\n```\n") == [(2, "a\nb\n"), (6, "c\n")]


@pytest.mark.parametrize("marker", ["skip", "skip:", "faster", "a -> b"])
def test_bad_markers_are_found(marker: str) -> None:
    with pytest.raises(AssertionError, match="expected"):
        python_blocks(f"<!-- test: {marker} -->\n```python\nc\n```\n")


def test_commands_are_found() -> None:
    text = "```sh\nA=1 make b  # c\nd -e 'f g' \\\n    h && i\n```\n```python\nj\n```\n"
    assert commands(text) == [["make", "b"], ["d", "-e", "f g", "h"], ["i"]]


@pytest.mark.parametrize(
    "line",
    [
        "paint",
        "sample --colour 3",
        "sample --num two",
        "sample a",
        "export runs/a",
        "--paint",
        "edit",
        "edit draw a.png",
        "edit vary",
        "edit interpolate a.png",
        "edit vary a.png --num two",
    ],
)
def test_bad_commands_are_found(line: str, parse: Callable[[list[str]], None]) -> None:
    with pytest.raises(AssertionError, match=r"(?:Error|Usage): "):
        parse(line.split())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document: Path) -> None:
    targets = links(document.read_text(encoding="utf-8"))
    missing = [target for target in targets if not any((folder / target).exists() for folder in (document.parent, ROOT))]
    assert not missing


@pytest.mark.every("page")
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] if page.name in ("sampling.md", "training.md") else []) for page in PAGES],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": page.stem}
    for line, code in python_blocks(page.read_text(encoding="utf-8")):
        exec(compile("\n" * (line - 1) + code, page, "exec"), names)  # a traceback shows the page's line


def test_readme_begins_with_what_ci_runs() -> None:
    """The first commands install and draw on a fresh machine, and pass the tests. `.ci/run` and check-all call the same."""
    picture, check, *_ = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert (picture, check) == (["make", "picture"], ["make", "check"])
    assert "\nmake check\n" in (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "\nmake check-all\n" in (ROOT / ".ci/run").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (check_all,) = re.findall(r"^check-all:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert re.search(r"\$\(MAKE\) .* picture ", check_all)
    dry = subprocess.run(["make", "-n", "picture"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(r"setup EXTRAS=train\n", dry.stdout)  # what README's line for pip installs


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def test_the_version_is_the_same_everywhere() -> None:
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited == PROJECT["version"] == ddpm_fast.__version__


def test_the_table_of_extras_is_complete() -> None:
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| extra \|.*?\n\|[-|]+\|\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    named = re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)
    assert len(named) == len(table.splitlines())
    assert sorted(named) == sorted(EXTRAS)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_exist(page: Path, parse: Callable[[list[str]], None]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for words in commands(page.read_text(encoding="utf-8")):
        if words[0] == "ddpm-fast":
            parse(words[1:])
        elif words[0] == "make":
            assert set(words[1:]) <= set(targets)
        elif words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file()
        elif words[:2] == ["pip", "install"]:
            named = [name for group in re.findall(r"\.\[([\w,]+)\]", " ".join(words)) for name in group.split(",")]
            assert set(named) <= EXTRAS.keys()
