"""Every file of `examples/` runs. Those with options run with few steps."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
OPTIONS = {
    "progressive_generation": ["--steps=6", "--num=2", "--columns=3", "--out=new/picture.png"],
    "shared_latents": ["--steps=10", "--num=2", "--out=new/picture.png"],
    "rate_distortion": ["--steps=4", "--num=2", "--rows=4", "--data=digits", "--plot=plot.png"],
}
FONTS = Path(importlib.util.find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf"  # type: ignore[union-attr, arg-type]
OPTIONS["emoji"] = ["emoji", f"--font={FONTS / 'DejaVuSans.ttf'}", "--size=8"]  # a font of outlines, which has some of them


def run(name: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    example = next(path for path in EXAMPLES if path.stem == name)
    monkeypatch.setattr(sys, "argv", [str(example), *options])
    runpy.run_path(str(example), run_name="__main__")


def check_pictures(columns: int, rows: int) -> None:
    """Expect 64x64 images in a grid."""
    with Image.open("new/picture.png") as image:
        assert image.size == (66 * columns + 2, 66 * rows + 2)
        assert np.asarray(image)[2:66, 2:66].std() > 0


def check_emoji(_: str) -> None:
    """Expect different pictures, a tenth of them apart."""
    train, test = (sorted(Path("emoji", folder).iterdir()) for folder in ("train", "test"))
    assert len(test) == (len(train) + len(test)) // 10 > 5
    pictures = [np.asarray(Image.open(path)) for path in (*train, *test)]
    assert {picture.shape for picture in pictures} == {(8, 8, 3)}
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def check_rate_distortion(printed: str) -> None:
    """Expect one curve: the rate grows from L_T to all terms but L_0, and the distortion falls."""
    lines = printed.splitlines()
    table = np.array([[float(number) for number in line.split()] for line in lines[1:5]])
    assert table[:, 0].tolist() == [1, 2, 3, 4]
    assert (np.diff(table[:, 1]) > 0).all()
    assert table[0, 2] > table[-1, 2]
    total, reconstruction = (float(word) for word in lines[5].split() if word[0].isdigit() and "." in word)
    assert table[-1, 1] == pytest.approx(total - reconstruction, abs=2e-4)


def check_tour(printed: str) -> None:
    """Expect the pictures of the page, and that the network has learned: less noise, fewer bits for the right labels."""
    assert pictures(Path("runs/tour")) == pictures(ROOT / "docs" / "tour")
    found = {name: float(number) for name, number in re.findall(r"^ *(\w+)(?: labels)?: (\d+\.\d+)", printed, re.MULTILINE)}
    assert found["drawn"] < found["noise"] / 4
    assert found["right"] < found["wrong"] < 8


def pictures(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the size of each picture in a folder."""
    sizes = {}
    for path in folder.iterdir():
        with Image.open(path) as image:
            assert np.asarray(image).std() > 0
            sizes[path.name] = image.size
    return sizes


def check_same_images(printed: str) -> None:
    assert float(printed.split("images: ")[1].split()[0]) < 1e-4


CHECKS = {
    "onnx_loop": check_same_images,
    "progressive_generation": lambda _: check_pictures(3, 2),
    "shared_latents": lambda _: check_pictures(3, 4),
    "rate_distortion": check_rate_distortion,
    "emoji": check_emoji,
    "tour": check_tour,
}


@pytest.mark.filterwarnings("default")  # as for a user: an example may meet warnings of the libraries that it shows
@pytest.mark.parametrize(
    "name", [pytest.param(path.stem, marks=() if path.stem in OPTIONS else pytest.mark.slow) for path in EXAMPLES]
)
def test_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOUR_STEPS", "120")  # a tenth
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # the tour would set it for later tests, too
    if name == "onnx_loop":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    run(name, monkeypatch, *OPTIONS.get(name, []))
    CHECKS.get(name, str)(capsys.readouterr().out)


def test_the_tour_is_written_again_after_a_change() -> None:
    """The notebook and the page have the cells of the script. If they do not, run `make tour`."""
    script = (ROOT / "examples" / "tour.py").read_text(encoding="utf-8")
    kinds, cells = zip(*re.findall(r"^# %%(.*)\n((?:(?!# %%).*\n)*)", script, re.MULTILINE), strict=True)
    code = [cell.strip() for kind, cell in zip(kinds, cells, strict=True) if not kind]
    text = [re.sub(r"^# ?", "", cell.strip(), flags=re.MULTILINE) for kind, cell in zip(kinds, cells, strict=True) if kind]
    notebook = json.loads((ROOT / "examples" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    for kind, wanted in ("code", code), ("markdown", text):
        assert ["".join(cell["source"]) for cell in notebook if cell["cell_type"] == kind] == wanted
    page = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    assert re.findall(r"^```python\n(.*?)\n```$", page, re.MULTILINE | re.DOTALL) == code
    shown = set(re.findall(r"^!\[.*?\]\(tour/(.*?)\)$", page, re.MULTILINE))
    assert shown == pictures(ROOT / "docs" / "tour").keys()
    assert sum("image/png" in str(cell.get("outputs")) for cell in notebook) == len(shown)


def test_a_plot_without_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"^--plot needs matplotlib: pip install -e '\.\[bench\]'$"):
        run("rate_distortion", monkeypatch, *OPTIONS["rate_distortion"])
