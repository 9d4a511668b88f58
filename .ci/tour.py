"""Run examples/tour.py. Write it with its outputs as examples/tour.ipynb, and as docs/tour.md with the pictures in docs/tour.

The outputs are printed text and PNGs. Progress bars and times are left out, so a second run changes nothing.
"""

import base64
import posixpath
import re
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
HEAD = "<!-- `make tour` writes this page from examples/tour.py. -->\n"
SKIP = "<!-- test: skip: tests/repository/test_examples.py runs these lines -->\n"


def kept(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Return one output with what was printed, and one with the picture, if there are such."""
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    texts = [nbformat.v4.new_output("stream", name="stdout", text=printed)] if printed else []
    return texts + [nbformat.v4.new_output("display_data", {"image/png": picture.strip()}) for picture in pictures]


def executed() -> nbformat.NotebookNode:
    notebook = jupytext.read(ROOT / "examples" / "tour.py", fmt="py:percent")
    with tempfile.TemporaryDirectory() as folder:
        where = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=None, kernel_name="python3", record_timing=False, resources=where).execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = kept(cell.outputs)
    return notebook


def moved(text: str) -> str:
    """Return text whose links lead from docs/ to the files to which they led from examples/."""

    def relative(link: re.Match[str]) -> str:
        return f"]({posixpath.relpath(posixpath.join('examples', link[1]), 'docs')})"

    return re.sub(r"\]\((?!https?:)([^)]+)\)", relative, text)


def page(notebook: nbformat.NotebookNode, pictures: Path) -> str:
    """Return the notebook as Markdown, and write its pictures to a folder."""
    blocks = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            blocks.append(f"{moved(cell.source)}\n")
            continue
        blocks.append(f"{SKIP}```python\n{cell.source}\n```\n")
        for output in cell.outputs:
            if output.output_type == "stream":
                blocks.append(f"```text\n{output.text.rstrip()}\n```\n")
                continue
            name = re.findall(r'^show\(.*?, "(\w+)", ', cell.source, re.MULTILINE)[-1]
            (pictures / f"{name}.png").write_bytes(base64.b64decode(output.data["image/png"]))
            blocks.append(f"![{name.replace('_', ' ').capitalize()}]({pictures.name}/{name}.png)\n")
    return "\n".join([HEAD, *blocks])


def main() -> None:
    notebook = executed()
    pictures = ROOT / "docs" / "tour"
    pictures.mkdir(exist_ok=True)
    for old in pictures.glob("*.png"):
        old.unlink()
    (ROOT / "docs" / "tour.md").write_text(page(notebook, pictures), encoding="utf-8")
    nbformat.write(notebook, ROOT / "examples" / "tour.ipynb")


if __name__ == "__main__":
    main()
