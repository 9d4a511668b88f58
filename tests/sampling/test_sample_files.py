"""Many images as files: their content, processes that share the work, and calls that continue what was stopped."""

from __future__ import annotations

import copy
import json
import shutil
import signal
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from items import flip_bits, read_data
from launching import run_ranks
from PIL import Image
from refusals import by, refused
from torch import Tensor, nn

import ddpm_fast as d
from ddpm_fast.data.items import read_batch
from ddpm_fast.distributed import Processes
from ddpm_fast.errors import InvalidValue, UnusablePath
from ddpm_fast.files.writing import PREFIX
from ddpm_fast.inference.adapter import weights_digest
from ddpm_fast.sampling import arguments, sample_files, sample_formats
from ddpm_fast.sampling.arguments import Request
from ddpm_fast.sampling.sampler import Sampler

NAMES = ("folder", "a.npz")
NUM, BATCH = 10, 4
LABELS = [i % 4 for i in range(NUM)]
# The same in the test's process and in those that it starts.
SETUP = """
import torch
import ddpm_fast as d
torch.manual_seed(0)
blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "block_out_channels": [8, 8]}
model = d.UNet(sample_size=8, num_class_embeds=5, no_label=4, layers_per_block=1, norm_num_groups=4, **blocks)
plan = d.ddpm_plan(d.NoiseSchedule.linear(10), 3)
"""
names: dict[str, Any] = {}
exec(SETUP, names)
MODEL, PLAN = names["model"], names["plan"]


class Grey(nn.Module):
    """A network without a configuration and without classes."""

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t / 2


NETWORK = ("model", "plan", "dtype", "shape")  # arguments of a Sampler


def write(out: Path, **changes: Any) -> Path:
    arguments = {"model": MODEL, "plan": PLAN, "num_samples": NUM, "batch_size": BATCH, "class_labels": LABELS}
    arguments |= {"progress": False} | changes
    sampler = Sampler(**{name: arguments.pop(name) for name in NETWORK if name in arguments})
    return d.write_samples(out, sampler, **arguments)


def digests(out: Path) -> dict[str, str]:
    """Return a digest of each file, by its name in the folder."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file()] if out.is_dir() else [out]
    return {str(path.relative_to(out)): sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the result of one process in each format."""
    folder = tmp_path_factory.mktemp("whole")
    for name in NAMES:
        write(folder / name)
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record how many images each batch of a Sampler draws."""
    counts: list[int] = []
    call = Sampler.draw

    def draw(self: Sampler, request: Request, *frames: int) -> tuple[Tensor, Tensor]:
        counts.append(request.num_samples)
        return call(self, request, *frames)

    monkeypatch.setattr(Sampler, "draw", draw)
    return counts


# ---------------------------------------------------------------------------------------------------------------- content


def pictures(folder: Path, files: list[str]) -> np.ndarray:
    """Return PNGs as uint8 [n, H, W, C]."""
    return np.stack([np.atleast_3d(np.asarray(Image.open(folder / name))) for name in files])


def manifest_of(out: Path) -> dict[str, Any]:
    """Return the manifest in a folder or in an npz."""
    if out.is_dir():
        return json.loads((out / "manifest.json").read_text())
    with zipfile.ZipFile(out) as archive:
        return json.loads(archive.comment)


def expected(**changes: Any) -> np.ndarray:
    images = d.sample(**{"model": MODEL, "plan": PLAN, "num_samples": NUM, "batch_size": BATCH, "progress": False} | changes)
    return d.to_uint8(images).permute(0, 2, 3, 1).numpy()


def test_files_hold_the_images_of_sample(whole: Path) -> None:
    images = expected(class_labels=LABELS)
    pngs = [f"000000/{i:06d}.png" for i in range(NUM)]
    folder = whole / "folder"
    assert (pictures(folder, pngs) == images).all()
    assert json.loads((folder / "dataset.json").read_text())["labels"] == [[*pair] for pair in zip(pngs, LABELS, strict=True)]
    assert sorted(digests(folder)) == sorted([*pngs, "dataset.json", "manifest.json"])

    with np.load(whole / "a.npz", allow_pickle=False) as arrays:
        assert {name: arrays[name].dtype for name in arrays} == {"arr_0": np.uint8, "arr_1": np.int64}
        assert np.array_equal(arrays["arr_0"], images)
        assert arrays["arr_1"].tolist() == LABELS
    assert manifest_of(whole / "a.npz") == manifest_of(folder) | {"kind": "npz"}
    assert sorted(path.name for path in whole.iterdir()) == ["a.npz", "folder"]  # no parts
    rows, labels, _ = read_batch(read_data(str(whole / "a.npz")), range(NUM))
    assert (rows.permute(0, 2, 3, 1).numpy() == images).all()
    assert labels.tolist() == LABELS


def test_files_are_data_to_train_on(whole: Path) -> None:
    images, labels, _ = read_batch(read_data(str(whole / "folder")), range(NUM))
    assert labels.tolist() == LABELS
    assert (images.permute(0, 2, 3, 1).numpy() == expected(class_labels=LABELS)).all()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_modes_of_pictures_and_models_without_labels(channels: int, mode: str, tmp_path: Path) -> None:
    changes = {"model": Grey(), "shape": (channels, 4, 6), "class_labels": None, "num_samples": 2}
    write(tmp_path / "folder", **changes)
    with Image.open(tmp_path / "folder" / "000000" / "000001.png") as picture:
        assert (picture.mode, picture.size) == (mode, (6, 4))
    assert json.loads((tmp_path / "folder" / "dataset.json").read_text()) == {"labels": None}
    with np.load(write(tmp_path / "a.npz", **changes), allow_pickle=False) as arrays:
        assert np.array_equal(arrays["arr_0"], expected(**changes))
        assert "arr_1" not in arrays


@pytest.mark.parametrize(("index", "name"), [(123, "000000/000123.png"), (49_999, "049000/049999.png")])
def test_a_folder_has_folders_of_1000_images(index: int, name: str) -> None:
    assert sample_formats._png_name(index).as_posix() == name


@pytest.mark.parametrize(
    ("changes", "same", "labels"),
    [
        ({"class_labels": None}, {"class_labels": LABELS}, LABELS),  # 4 classes in turn
        ({"class_labels": "none"}, {"class_labels": 4}, None),
        ({"seed": 3, "guidance_scale": 2.0}, {"class_labels": LABELS, "seed": 3, "guidance_scale": 2.0}, LABELS),
    ],
)
def test_labels_guidance_and_seed_reach_the_sampler(changes: Any, same: Any, labels: list[int] | None, tmp_path: Path) -> None:
    with np.load(write(tmp_path / "a.npz", **changes), allow_pickle=False) as arrays:
        assert np.array_equal(arrays["arr_0"], expected(**same))
        assert (arrays["arr_1"].tolist() if "arr_1" in arrays else None) == labels
    manifest = manifest_of(tmp_path / "a.npz")
    assert manifest["guidance_scale"] == changes.get("guidance_scale")
    folder = write(tmp_path / "v1.5", **changes, batch_size=None)  # a number is no ending
    assert manifest_of(folder) == manifest | {"batch_size": 64, "kind": "folder"}


# -------------------------------------------------------------------------------------------------------------- processes

DRAW = (
    SETUP
    + f"""
for name in {NAMES}:
    assert d.write_samples(name, d.Sampler(model, plan), {NUM}, batch_size={BATCH}, class_labels={LABELS}).exists()
"""
)
OTHERS = f"""
frozen, function = d.Sampler(d.freeze(model), plan), d.Sampler(lambda x_t, t: x_t / 2, plan, shape=(3, 8, 8))
d.write_samples("other/frozen.npz", frozen, {NUM}, batch_size={BATCH}, class_labels={LABELS}, progress=False)
d.write_samples("other/function.npz", function, 4, batch_size=2, progress=False)
"""


@pytest.mark.parametrize(
    ("size", "others"), [pytest.param(2, "", id="2"), pytest.param(4, OTHERS, id="4", marks=pytest.mark.slow)]
)
def test_files_do_not_depend_on_the_number_of_processes(size: int, others: str, whole: Path, tmp_path: Path) -> None:
    done = run_ranks(size, ["-W", "error", "-c", DRAW + others], tmp_path)
    assert [each.returncode for each in done] == [0] * size, done[0].stderr
    found = digests(tmp_path)
    names = [f"other/{name}.npz" for name in ("frozen", "function")]
    assert found == digests(whole) | {name: found.get(name) for name in names if others}
    assert f"{NUM}/{NUM}" in done[0].stderr  # one bar, of the images of all processes
    assert not [each for each in done[1:] if "sampling" in each.stderr]


KILLED = (
    SETUP
    + f"""
import os, signal
from ddpm_fast.files.writing import replacing
from ddpm_fast.sampling import sample_formats
files = 0
def write_bytes(path, content):
    global files
    with replacing(path) as temporary:
        temporary.write_bytes(content)
        files += 1
        if os.environ["RANK"] == "1" and files >= (3 if path.suffix == ".png" else 1):
            os.kill(os.getpid(), signal.SIGKILL)
sample_formats.write_bytes = write_bytes
import sys
d.write_samples(sys.argv[1], d.Sampler(model, plan), {NUM}, batch_size={BATCH}, class_labels={LABELS})
"""
)


@pytest.mark.slow  # tests of processes and of calls that continue find most of what this finds
@pytest.mark.parametrize("name", NAMES)
def test_a_killed_process_ends_the_others_and_the_call_continues(
    name: str, whole: Path, tmp_path: Path, drawn: list[int]
) -> None:
    done = run_ranks(2, ["-c", KILLED, name], tmp_path)
    assert done[1].returncode == -signal.SIGKILL
    assert done[0].returncode > 0  # with an error, and soon
    assert list(tmp_path.rglob(f"{PREFIX}*.tmp"))
    write(tmp_path / name)
    assert drawn == [4]  # rank 0 has written blocks 0 and 2
    assert digests(tmp_path / name) == digests(whole / name)
    assert not list(tmp_path.rglob(f"{PREFIX}*.tmp"))


@pytest.mark.parametrize(
    ("processes", "device", "model", "chosen"),
    [
        ((5, 8, 1), None, MODEL, "cuda:1"),
        ((5, 8, 1), "cuda", MODEL, "cuda:1"),
        ((5, 8, 1), "cuda:0", MODEL, "cuda:0"),
        ((5, 8, 1), "cpu", MODEL, "cpu"),
        ((5, 8, 1), None, lambda x_t, t: x_t, "cuda:0"),  # nothing can move it
        ((3, 4, 3), None, MODEL, "cuda:1"),  # two processes share it, which `write_samples` refuses
        ((0, 1, 0), None, MODEL, "cuda:0"),
    ],
)
def test_each_process_takes_a_gpu(
    processes: tuple[int, int, int], device: str | None, model: Any, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Sampler takes it for a model on a GPU, unless a device is given."""
    monkeypatch.setattr(arguments, "device_and_dtype", lambda _: (torch.device("cuda:0"), torch.float32))
    monkeypatch.setattr(arguments, "computing_device", lambda device: torch.device(device))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name, value in zip(names, (*processes, "x", 1), strict=True):
        monkeypatch.setenv(name, str(value))
    assert arguments.sampling_device(model, device) == torch.device(chosen)


@pytest.mark.parametrize(("uuids", "shared"), [(["a", "b"], False), (["a", "a"], True), (["a", "b", "b"], True)])
def test_two_processes_do_not_share_a_gpu_unawares(uuids: list[str], shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process may call its GPU cuda:0. The last one asks."""
    *others, own = uuids
    monkeypatch.setattr(Processes, "from_all", lambda self, value: [*others, value])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=own))
    processes, gpu = Processes(len(others), len(uuids)), torch.device("cuda:0")
    sample_files._check_own_gpu(processes, gpu, share_gpu=True)
    sample_files._check_own_gpu(processes, torch.device("cpu"), share_gpu=False)
    got = "cuda:0 in 2 processes; share_gpu=True allows it"
    error = InvalidValue("device", "to be another GPU in each process", got)
    with refused(error) if shared else nullcontext():
        sample_files._check_own_gpu(processes, gpu, share_gpu=False)


# ------------------------------------------------------------------------------------------------------- calls that continue


@pytest.fixture(params=NAMES)
def stopped(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The result of a call that Ctrl-C ended in the last block."""
    call, out = Sampler.draw, tmp_path / request.param

    def draw(self: Sampler, request: Request, *frames: int) -> tuple[Tensor, Tensor]:
        if request.num_samples < BATCH:
            raise KeyboardInterrupt
        return call(self, request, *frames)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "draw", draw)
        with pytest.raises(KeyboardInterrupt, match=f"8 of {NUM} images are written to .*Start it again to draw the others"):
            write(out)
    assert out.suffix == "" or not out.exists()
    return out


def test_a_call_draws_what_is_missing(stopped: Path, whole: Path, drawn: list[int]) -> None:
    (block_file(stopped).parent / f"{PREFIX}killed.tmp").touch()
    write(stopped)
    assert drawn == [2]
    assert digests(stopped) == digests(whole / stopped.name)
    write(stopped)
    assert drawn == [2]
    assert [path.name for path in stopped.parent.iterdir()] == [stopped.name]


def block_file(out: Path) -> Path:
    """Return a file of the second block."""
    if not out.suffix:
        return out / "000000" / "000005.png"
    return out.with_name(f"{out.name}.parts") / "0000000004.npy"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    flip_bits(path, -6 if path.suffix == ".png" else 60)  # the end of a PNG, the header of an npy


@pytest.mark.parametrize("damage", [Path.unlink, cut, flip, lambda path: path.write_bytes(b"")])
def test_damaged_files_are_drawn_again(damage: Callable[[Path], Any], stopped: Path, whole: Path, drawn: list[int]) -> None:
    damage(block_file(stopped))
    write(stopped)
    assert drawn == [4, 2]
    assert digests(stopped) == digests(whole / stopped.name)


@pytest.mark.parametrize(("name", "left"), [("a.npz", []), ("mine.txt", ["mine.txt"])])
def test_parts_that_remain_beside_a_whole_archive_go(
    name: str, left: list[str], tmp_path: Path, whole: Path, drawn: list[int]
) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    parts = tmp_path / "copy" / "a.npz.parts"
    parts.mkdir()
    for each in ("0000000000.npy", name):
        (parts / each).touch()
    write(tmp_path / "copy" / "a.npz")
    assert [path.name for path in parts.glob("*")] == left
    assert parts.exists() == bool(left)
    assert not drawn


# ------------------------------------------------------------------------------------------------------------------ errors

OTHER = copy.deepcopy(MODEL)
OTHER.conv_out.bias.data[0] += 0.25
DIFFERENCES: list[tuple[str, dict[str, Any]]] = [
    ("num_samples", {"num_samples": 9, "class_labels": LABELS[:9]}),
    ("shape", {"shape": (3, 16, 16)}),
    ("seed", {"seed": 1}),
    ("batch_size", {"batch_size": 5}),
    ("guidance_scale", {"guidance_scale": 2.0}),
    ("dtype", {"dtype": torch.float64}),
    ("plan", {"plan": d.ddpm_plan(d.NoiseSchedule.linear(10), 4)}),
    ("weights", {"model": d.UNet(**{**MODEL.config, "norm_num_groups": 2})}),
    ("weights", {"model": OTHER}),
    ("weights", {"model": d.freeze(OTHER, torch.float32)}),
    ("labels", {"class_labels": LABELS[::-1]}),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("field", "changes"), DIFFERENCES)
def test_a_difference_is_named(field: str, changes: dict[str, Any], name: str, whole: Path, drawn: list[int]) -> None:
    before = digests(whole)
    with pytest.raises(ValueError, match=rf"^write_samples: expected {field} to be .*{name}', got .*another out"):
        write(whole / name, **changes)
    assert not drawn
    assert digests(whole) == before


def digest_inside_a_module(network: d.FrozenUNet) -> str | None:
    """Return the digest of a module with a buffer of its own, and a frozen network that is no module."""
    module = nn.Module()
    module.register_buffer("scale", torch.ones(1))
    module.network = network  # type: ignore[assignment]
    return weights_digest(module)


def test_a_frozen_network_inside_a_module_is_told_from_another() -> None:
    first, same, other = (digest_inside_a_module(d.freeze(each, torch.float32)) for each in (MODEL, MODEL, OTHER))
    assert first == same != other


UNKNOWN = (lambda x_t, t: x_t / 2, partial(lambda scale, x_t, t: scale * x_t, 0.5), Grey())


@pytest.mark.parametrize("model", UNKNOWN, ids=["function", "partial", "module"])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_weights_starts_files_and_continues_none(
    model: Any, name: str, tmp_path: Path, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"model": model, "class_labels": None, "shape": (3, 4, 4)}
    wanted = by(
        "write_samples",
        InvalidValue(
            "model",
            f"to be a module with weights or a FrozenUNet to go on with {str(tmp_path / name)!r}",
            "a function or object whose weights are unknown; choose another out",
        ),
    )
    with monkeypatch.context() as patch:
        patch.setattr(sample_files, "_values", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt, match=rf"^0 of {NUM} images .*{name}\. No call can draw the others there\.$"):
            write(tmp_path / name, **changes)
    drawn.clear()
    with refused(wanted):
        write(tmp_path / name, **changes)
    assert not drawn
    shutil.rmtree(tmp_path / (name if name == "folder" else f"{name}.parts"))
    write(tmp_path / name, **changes)
    before = digests(tmp_path)
    with refused(wanted):
        write(tmp_path / name, **changes)
    assert (sum(drawn), digests(tmp_path)) == (NUM, before)


@pytest.mark.parametrize(
    ("old", "new", "changes", "wanted"),
    [
        ("", "", {"seed": 1}, "seed to be 0, .* got 1"),
        ('"npz"', '"folder"', {}, "kind to be 'folder', .* got 'npz'"),
        ('"format": 1', '"format": 2', {}, r"'.*json' to have valid fields, got: Invalid enum value 2 - at `\$\.format`"),
    ],
)
def test_a_difference_of_an_interrupted_archive_is_named(old: str, new: str, changes: Any, wanted: str, tmp_path: Path) -> None:
    manifest = json.dumps(manifest_of(write(tmp_path / "a.npz")))
    (tmp_path / "a.npz").unlink()
    (tmp_path / "a.npz.parts").mkdir()
    (tmp_path / "a.npz.parts" / "manifest.json").write_text(manifest.replace(old, new))
    with pytest.raises(ValueError, match=f"^write_samples: expected {wanted}"):
        write(tmp_path / "a.npz", **changes)


@pytest.mark.parametrize("name", ["a.zip", "a.png", "a.npy"])
def test_other_archives_are_no_folders(name: str, tmp_path: Path) -> None:
    with refused(by("write_samples", InvalidValue("out", "to be a folder or an .npz", repr(str(tmp_path / name))))):
        write(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "file", "wanted"),
    [
        ("folder", "folder/mine.txt", "'.*folder', which has 'mine.txt'"),
        ("a.npz", "a.npz.parts/mine.txt", "'.*a.npz.parts', which has 'mine.txt'"),
        ("c.npz", "c.npz", "'.*c.npz' without a manifest: File is not a zip file"),
    ],
)
def test_files_of_others_are_left_alone(name: str, file: str, wanted: str, tmp_path: Path, drawn: list[int]) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("mine")
    before = digests(tmp_path)
    with pytest.raises(UnusablePath, match=f"^write_samples: expected out to be new or .*, got {wanted}"):
        write(tmp_path / name)
    assert digests(tmp_path) == before
    assert not drawn


@pytest.mark.parametrize("name", NAMES)
def test_a_second_call_is_refused_while_one_writes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "draw", lambda *_, **__: write(tmp_path / name))
        with pytest.raises(BlockingIOError, match=r"expected no other process to write to '.*', got one that holds .*lock"):
            write(tmp_path / name)
    assert write(tmp_path / name).exists()


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"num_samples": 0}, "expected num_samples to be an integer in 1"),
        ({"batch_size": 0}, "expected batch_size to be a positive integer or None"),
        ({"seed": torch.zeros(NUM, dtype=torch.int64)}, "expected seed to be an integer in"),
        ({"seed": 1 << 64}, "expected seed to be an integer in"),
        ({"class_labels": [5] * NUM}, r"expected class_labels to be in 0\.\.4"),
        ({"class_labels": [0]}, "expected class_labels to be an int or 10 ints"),
        ({"guidance_scale": 2.0, "class_labels": "none"}, "expected guidance_scale to be None or 1"),
        (
            {"model": Grey(), "class_labels": None, "shape": (2, 8, 8)},
            r"expected shape to be \(C, H, W\) with C one of 1, 3, 4",
        ),
        ({"out": ""}, "expected out to be a path, got an empty text"),
        ({"out": "/dev/null"}, "expected out to be in a folder, got '/dev/null', and '/dev/null' is a file"),
        ({"out": "file/dir"}, "expected out to be in a folder, got 'file/dir', and '.*file' is a file"),
        ({"out": "dir.npz"}, "expected out to be a file, got 'dir.npz', which is a folder or a device"),
        ({"out": "x" * 300}, "expected out to be a path that can be written"),
    ],
)
def test_arguments_are_checked_before_work(
    changes: dict[str, Any], wanted: str, tmp_path: Path, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("dir.npz").mkdir()
    with pytest.raises((ValueError, TypeError, OSError), match=f"^write_samples: {wanted}"):
        write(**{"out": "new/folder"} | changes)
    assert not drawn
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dir.npz", "file"]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_cannot_be_made_is_named(
    name: str, tmp_path: Path, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = FileNotFoundError(2, "No such file or directory")  # as in /proc, where all looks writable to root
    monkeypatch.setattr(Path, "mkdir", lambda *arguments, **options: (_ for _ in ()).throw(reason))
    with refused(by("write_samples", UnusablePath("out", "to be a path whose folders can be made", reason))):
        write(tmp_path / "new" / name)
    assert not drawn


@pytest.mark.parametrize("name", NAMES)
def test_an_image_that_is_not_finite_is_named(name: str, tmp_path: Path) -> None:
    last = torch.tensor([1.0, torch.nan])[:, None, None, None]  # the last block has images 8 and 9

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        return x_t * (last if len(x_t) == 2 else 0.5)

    changes = {"model": network, "shape": (1, 4, 4), "class_labels": None}
    with refused(by("write_samples", InvalidValue("images", "to be finite", "NaN or infinity in image 9"))):
        write(tmp_path / name, **changes)
