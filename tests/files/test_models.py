"""Models by their names on the Hugging Face hub: its cache, and a server on the loopback address in its place."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import run, save_model
from drawing import tiny_unet
from hub_server import Hub, commit_of, hub
from runs import train
from safetensors.torch import load_file

from ddpm_fast import NoiseSchedule, UNet, dpm_solver_plan, load_folder, push_to_hub
from ddpm_fast.plan.sampling_plan import Fit

SCHEDULE = NoiseSchedule.linear(50)
WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", tiny_unet(), SCHEDULE)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a machine without a network, of which models can be put into `hub`."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def put(cache: Path, source: Path, *left_out: str, revision: str = "main", as_bin: bool = False) -> Path:
    """Put a model into the cache as owner/name. Return its folder there."""
    repository, commit = cache / "models--owner--name", commit_of(revision)
    for file in source.rglob("*"):
        if file.is_file() and file.name not in left_out:
            copy = repository / "snapshots" / commit / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if as_bin and file.suffix == ".safetensors":
                torch.save(load_file(file), copy.with_suffix(".bin"))
            else:
                copy.write_bytes(file.read_bytes())
    (repository / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    return repository / "snapshots" / commit


@pytest.mark.parametrize("as_bin", [False, True], ids=["safetensors", "bin"])
def test_a_cached_model_is_loaded_by_name(as_bin: bool, model: Path, cache: Path) -> None:
    put(cache, model, as_bin=as_bin)
    loaded, expected = load_folder("owner/name"), load_folder(model)
    assert loaded.objective == expected.objective
    for network in (loaded.model, UNet.from_pretrained("owner/name")):
        assert all(map(torch.equal, network.state_dict().values(), expected.model.state_dict().values()))
    assert NoiseSchedule.from_pretrained("owner/name") == SCHEDULE == NoiseSchedule.from_pretrained(model)
    assert "1 image in 2 steps (ddim)" in run("sample", "--model=owner/name", "--sampler=ddim", "--steps=2", "--num=1")


def test_safetensors_come_before_bin(model: Path, cache: Path) -> None:
    folder = put(cache, model)
    (folder / "unet" / f"{WEIGHTS}.bin").write_bytes(b"damaged")
    load_folder("owner/name")


def test_damaged_weights_in_the_cache_are_refused(model: Path, cache: Path) -> None:
    """The cache names a large file by its SHA-256, and links to it."""
    file = put(cache, model) / "unet" / f"{WEIGHTS}.safetensors"
    content = file.read_bytes()
    stored = cache / "models--owner--name" / "blobs" / hashlib.sha256(content).hexdigest()
    stored.parent.mkdir()
    file.replace(stored)
    file.symlink_to(stored)
    load_folder("owner/name")
    stored.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"expected '.*{stored.name}' to have its name as SHA-256, got .*: delete it, then"):
        load_folder("owner/name")
    stored.write_bytes(content)
    file.with_suffix(".bin").symlink_to(stored.with_name("0" * 64))  # it is not read, so it may be deleted
    load_folder("owner/name")


def test_a_revision_is_a_model_of_its_own(model: Path, cache: Path) -> None:
    put(cache, model, revision="v2")
    load_folder("owner/name@v2")
    with pytest.raises(OSError, match=r"^load_folder: expected path to be .* got 'owner/name', .* not in its cache as a whole"):
        load_folder("owner/name")


def test_a_revision_cannot_leave_the_cache(cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"load_folder: expected path to be a folder that holds a model, got '.*\.\.'"):
        load_folder("owner/name@v2/../../..")


def test_a_folder_of_that_name_wins(model: Path, cache: Path) -> None:
    put(cache, model)
    save_model(Path("owner/name"), tiny_unet(), NoiseSchedule.linear(70))
    assert NoiseSchedule.from_pretrained("owner/name").num_timesteps == 70
    wanted = r"got 'owner/nam', .* did you mean 'owner/name'\? \(a local 'owner' hides the hub; rename it\)$"
    with pytest.raises(FileNotFoundError, match=wanted):
        UNet.from_pretrained("owner/nam")


@pytest.mark.parametrize(
    ("left_out", "wanted"),
    [
        (("config.json",), r"expected path to have a U-Net, with unet/config\.json or config\.json, got 'owner/name', without"),
        (
            (f"{WEIGHTS}.safetensors",),
            rf"expected path to have unet/{WEIGHTS}\.safetensors or unet/{WEIGHTS}\.bin, got 'owner/name', whose",
        ),
        (("scheduler_config.json",), r"expected scheduler/scheduler_config\.json or scheduler_config\.json in '.*owner--name"),
    ],
    ids=["config", "weights", "scheduler"],
)
def test_a_part_of_a_model_is_not_found_but_named(left_out: tuple[str, ...], wanted: str, model: Path, cache: Path) -> None:
    put(cache, model, *left_out)
    with pytest.raises(FileNotFoundError, match=wanted):
        load_folder("owner/name")


def test_another_network_is_named(model: Path, cache: Path) -> None:
    config = put(cache, model, f"{WEIGHTS}.safetensors") / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(
        ValueError, match=r"expected _class_name to be UNet2DModel, got 'UNet2DConditionModel', in '.*owner--name"
    ):
        load_folder("owner/name")


def test_an_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    missing = r"huggingface_hub is missing: install it with pip install 'ddpm_fast\[hub\]'"
    with pytest.raises(ImportError, match=f"^expected path to be .* got 'owner/name', .*; from the hub: {missing}"):
        load_folder("owner/name")
    with pytest.raises(ImportError, match=missing):
        push_to_hub("runs/mine", "owner/name")


@pytest.fixture
def server() -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub")
    with hub() as served:
        yield served


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


LOADING = """
import json, sys
from ddpm_fast import load_folder
for name in sys.argv[1:]:
    try:
        print(json.dumps(str(load_folder(name).objective.schedule.num_timesteps)))
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
"""


def test_models_are_downloaded(server: Hub, model: Path, tmp_path: Path) -> None:
    files = contents(model)
    weights, other = f"unet/{WEIGHTS}.safetensors", {"README.md": b"", "unet/model.onnx": b"x", f"unet/{WEIGHTS}.bin": b"x"}
    server.files |= {"owner/name": files | other, "owner/name@v2": files, "owner/cut": files | other}
    server.files["owner/text"] = files | {"unet/config.json": b'{"_class_name": "UNet2DConditionModel"}'}
    server.gated.add("owner/gated")
    names = ["owner/name", "owner/name@v2", "owner/name@v3", "owner/none", "owner/gated", "owner/text"]
    environment = server.environment(tmp_path / "cache")
    command = [sys.executable, "-W", "ignore", "-c", LOADING]
    done = subprocess.run([*command, *names], env=environment, capture_output=True, text=True, check=True)
    found = dict(zip(names, map(json.loads, done.stdout.splitlines()), strict=True))
    expected = "UnusablePath: load_folder: expected path to be a folder or a model of the Hugging Face hub, got "
    assert found["owner/name"] == found["owner/name@v2"] == "50"
    for name, reason in {
        "owner/name@v3": "it has no such revision",
        "owner/none": "there is no such model, or it is private: log in",
        "owner/gated": "it is gated: ask for access",
    }.items():
        absent = f"{expected}{name!r}, which does not exist: there is no folder 'owner'; from the hub: "
        assert found[name].startswith(absent + reason)
    assert "UNet2DConditionModel" in found["owner/text"]
    assert server.requested.count(weights) == 1  # both revisions have the same content, and the last is another network
    assert not set(server.requested) & other.keys()

    server.cut[weights] = 1000
    cut = subprocess.run([*command, "owner/cut"], env=environment, capture_output=True, text=True, check=True)
    assert "got 'owner/cut', which does not exist" in cut.stdout
    server.cut.clear()
    whole = subprocess.run([*command, "owner/cut"], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(whole.stdout) == "50"


def push(server: Hub, folder: Path, *arguments: str) -> tuple[Path, str]:
    """Push a model as owner/name, and return what the hub then has, as a folder, and its card."""
    command = [sys.executable, "-m", "ddpm_fast", "push", str(folder), "owner/name", "--device=cpu", *arguments]
    environment = server.environment(folder.parent / "cache")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{server.address}/owner/name/commit/")
    pushed = folder.parent / "pushed"
    shutil.rmtree(pushed, ignore_errors=True)
    for path, content in server.files["owner/name"].items():
        (pushed / path).parent.mkdir(parents=True, exist_ok=True)
        (pushed / path).write_bytes(content)
    card = (pushed / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(code, "card", "exec")
    return pushed, card


def test_a_run_is_pushed_with_a_card_and_read_by_diffusers(server: Hub, tmp_path: Path) -> None:
    train(tmp_path / "run", steps=1, channels=[8], prediction="v_prediction")
    run_of = load_folder(tmp_path / "run")
    plan = dpm_solver_plan(run_of.objective, 3, clip=run_of.clip)
    object.__setattr__(plan, "fit", Fit("another plan", 1.0, 2.0, 1.0))
    run_of.save_plan(plan, tmp_path / "run")
    figures = {"num": 2, "bits_per_dim": {"total": 3.25}, "per_image": {"total": [3]}, "data": "/home/me/data", "labels": True}
    figures |= {"x |\n\n# <b>y</b>": 2.5, "weights": run_of.digest()}
    (tmp_path / "figures.json").write_text(json.dumps(figures))
    pushed, card = push(server, tmp_path / "run", "--license=mit\ntags: [x]", f"--evaluation={tmp_path / 'figures.json'}")
    metadata = pytest.importorskip("huggingface_hub").ModelCard(card).data.to_dict()
    assert metadata | {"license": "mit\ntags: [x]", "tags": ["ddpm_fast", "diffusion"], "library_name": "diffusers"} == metadata
    for part in (
        r"| x \| \# \<b\>y\</b\> | 2.5 |",
        "![16 images that it draws](samples.png)",
        'load_folder("owner/name")',
        "| steps | 1 |",
    ):
        assert part in card
    assert r"| bits\_per\_dim total | 3.25 |" in card
    assert not re.search("per_image|/home|tmp|labels", card)
    reading = f"from diffusers import DiffusionPipeline as P; print(P.from_pretrained({str(pushed)!r}))"
    environment = server.environment(tmp_path / "cache")
    read = subprocess.run([sys.executable, "-c", reading], env=environment, capture_output=True, text=True, check=True)
    assert "UNet2DModel" in read.stdout
    assert not [line for line in read.stderr.splitlines() if line and "%|" not in line]
    loaded = load_folder(pushed)
    assert loaded.objective == run_of.objective
    assert loaded.plan is not None
    assert loaded.plan.fit == plan.fit


def test_figures_of_another_model_are_not_pushed(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("huggingface_hub")
    for figures in ({"model": "runs/other", "weights": "0" * 64}, {}):  # those of images have no weights
        (tmp_path / "figures.json").write_text(json.dumps(figures))
        with pytest.raises(ValueError, match=r"^push_to_hub: expected evaluation to have figures of '.*', got those of (i|'r)"):
            push_to_hub(model, "owner/name", evaluation=tmp_path / "figures.json")


def test_a_folder_replaces_what_was_pushed_before(server: Hub, model: Path) -> None:
    """The model has a condition, so its card has no picture."""
    server.files["owner/name"] = {"plan.json": b"{}", "unet/old.bin": b"", "kept.txt": b""}
    shutil.rmtree(model)
    save_model(model, tiny_unet(in_channels=2), SCHEDULE)
    (model / "unet" / ".env").write_text("secret")
    pushed, card = push(server, model)
    names = {"README.md", "kept.txt", "scheduler_config.json", "unet/config.json", f"unet/{WEIGHTS}.safetensors"}
    assert set(contents(pushed)) == names
    assert "c = ...  # conditions, float [16, 1, H, W]" in card
    assert load_folder(pushed).interface.condition.channels == 1
