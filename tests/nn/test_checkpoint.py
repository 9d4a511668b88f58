"""Networks on disk: diffusers' layout both ways, legacy names, whole files only, and errors that name what is wrong."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ddpm_fast.nn import UNet

TINY: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "num_class_embeds": 3,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def model() -> UNet:
    torch.manual_seed(0)
    model = UNet(**TINY)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return model


def assert_same_weights(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    a, b = actual.state_dict(), expected.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in b.items():
        assert torch.equal(a[name], tensor), name


def test_round_trip(model: UNet, tmp_path: Path) -> None:
    model.to(memory_format=torch.channels_last).save_pretrained(tmp_path / "new" / "folder")
    loaded = UNet.from_pretrained(tmp_path / "new" / "folder")
    assert_same_weights(loaded, model)
    assert loaded.config == model.config
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", WEIGHTS]
    mode = (tmp_path / "new" / "folder" / WEIGHTS).stat().st_mode
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_dtype_is_float32_unless_asked_for(model: UNet, tmp_path: Path) -> None:
    model.half().save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).stat().st_size < 2.2 * sum(p.numel() for p in model.parameters()) + 20_000
    assert_same_weights(UNet.from_pretrained(tmp_path), model.float())
    assert_same_weights(UNet.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cpu"), model.bfloat16())


def test_diffusers_reads_what_we_write_and_we_what_it_writes(model: UNet, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model.save_pretrained(tmp_path / "ours")
    peer, info = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert_same_weights(peer, model)
    scheduler = diffusers.DDPMScheduler()
    diffusers.DDPMPipeline(peer, scheduler).save_pretrained(tmp_path / "pipeline")
    for folder in (tmp_path / "pipeline", tmp_path / "pipeline" / "unet"):
        loaded = UNet.from_pretrained(folder)
        assert_same_weights(loaded, model)
        assert loaded.config == model.config


def test_class_names_round_trip_and_diffusers_ignores_them(
    model: UNet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    diffusers = pytest.importorskip("diffusers")
    named = UNet(**TINY, class_names=["cat", "dog"])
    named.load_state_dict(model.state_dict())
    named.save_pretrained(tmp_path / "named")
    loaded = UNet.from_pretrained(tmp_path / "named")
    assert loaded.config["class_names"] == ["cat", "dog"]
    assert loaded.config == named.config
    peer, info = diffusers.UNet2DModel.from_pretrained(tmp_path / "named", output_loading_info=True)
    assert not any(info.values()), info
    assert_same_weights(peer, named)
    peer.save_pretrained(tmp_path / "theirs")
    assert UNet.from_pretrained(tmp_path / "theirs").config == named.config  # it keeps keys that it does not know


def test_a_network_without_names_is_written_as_before(model: UNet, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model.save_pretrained(tmp_path / "ours")
    diffusers.UNet2DModel(**TINY).save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs"))
    assert ours == {key: value for key, value in theirs.items() if key != "_diffusers_version"}
    with pytest.raises(ValueError, match=r"save_pretrained: expected path .* differs in class_names$"):
        UNet(**TINY, class_names=["cat", "dog"]).save_pretrained(tmp_path / "ours")


def test_legacy_files_of_published_ddpms(model: UNet, tmp_path: Path) -> None:
    # Google's folders: a pipeline whose network lies at its root, attention under its old names, a torch file.
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = model.state_dict()
    for new, old in renames.items():
        weights = {name.replace(new, old): tensor for name, tensor in weights.items()}
    assert weights.keys() != model.state_dict().keys()
    torch.save(weights, tmp_path / "diffusion_pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"_class_name": "UNet2DModel", "_diffusers_version": "0.0.4"}))
    (tmp_path / "model_index.json").write_text("{}")
    assert_same_weights(UNet.from_pretrained(tmp_path), model)
    torch.save(weights | model.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.bin' to hold each tensor once, got one under its names before and after"):
        UNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])  # the format since PyTorch 1.6, and the one before
def test_a_torch_file_cannot_run_code(model: UNet, tmp_path: Path, zipped: bool) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    model.save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    file = tmp_path / "diffusion_pytorch_model.bin"
    torch.save({"conv_in.weight": Payload()}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin' to .* pickle, (which|and pickle) may run any code"):
        UNet.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_saving_again_replaces_the_weights_but_never_another_network(model: UNet, tmp_path: Path) -> None:
    UNet(**TINY).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert_same_weights(UNet.from_pretrained(tmp_path), model)
    with pytest.raises(ValueError, match=r"save_pretrained: expected path .* differs in layers_per_block, norm_eps"):
        UNet(**TINY | {"layers_per_block": 2, "norm_eps": 1e-3}).save_pretrained(tmp_path)
    assert_same_weights(UNet.from_pretrained(tmp_path), model)


_KILLED_WRITER = """
import os, random, signal, sys, time
import torch
from ddpm_fast.nn import UNet
torch.set_num_threads(1)
folder = sys.argv[1]
model = UNet(block_out_channels=[64], down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"])
def fill(value):
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
fill(0)
model.save_pretrained(folder)
random = random.Random(0)
for trial in range(1, 11):
    written, writes = os.pipe()
    child = os.fork()
    if child == 0:
        value = trial
        while True:
            value += 100
            fill(value)
            model.save_pretrained(folder)
            os.write(writes, b".")
    os.close(writes)
    assert os.read(written, 1), "the child died"  # its first write is finished: a later one is killed
    time.sleep(random.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(written)
    values = {float(v) for p in UNet.from_pretrained(folder).parameters() for v in (p.min(), p.max())}
    assert len(values) == 1, values
    assert values.pop() % 100 == trial % 100  # this child's
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_killed_while_writing_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", _KILLED_WRITER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / WEIGHTS).exists()


def test_errors_name_what_is_wrong(model: UNet, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"expected path to be a folder with config\.json .* 'google/ddpm', .* hf download google/ddpm"
    ):
        UNet.from_pretrained("google/ddpm")
    with pytest.raises(FileNotFoundError, match=r"expected config\.json in"):
        UNet.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)

    def rewrite(change: Any) -> None:
        weights = model.state_dict()
        change(weights)
        safetensors.torch.save_file(weights, tmp_path / WEIGHTS)

    rewrite(lambda w: w.pop("conv_in.bias"))
    with pytest.raises(ValueError, match=r"to fit its config\.json, got missing conv_in\.bias"):
        UNet.from_pretrained(tmp_path)
    rewrite(lambda w: w.update({f"extra.{i}": torch.zeros(1) for i in range(7)}))
    with pytest.raises(ValueError, match=r"got unexpected extra\.0, extra\.1, .* and 2 more"):
        UNet.from_pretrained(tmp_path)
    rewrite(lambda w: w.update({"conv_in.bias": torch.zeros(5)}))
    with pytest.raises(ValueError, match=r"expected conv_in\.bias to have shape \[8\] .*, got \[5\]"):
        UNet.from_pretrained(tmp_path)

    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{WEIGHTS}' to be a whole safetensors file"):
        UNet.from_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"expected {WEIGHTS} or diffusion_pytorch_model.bin"):
        UNet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ValueError, match=r"_class_name to be UNet2DModel, got 'UNet2DConditionModel', in '.*config\.json'"):
        UNet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="to hold a JSON object, got list"):
        UNet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="to be JSON"):
        UNet.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"freq_shift": None}, "freq_shift to be an integer of at least 0, got None"),
        ({"dropout": "x"}, "dropout to be a number, got str"),
        ({"norm_eps": []}, "norm_eps to be a number, got list"),
        ({"mid_block_scale_factor": float("nan")}, "mid_block_scale_factor to be positive and finite, got nan"),
        ({"down_block_types": None}, "down_block_types to be a list of .*, got None"),
        ({"colour": "red"}, "keys among sample_size, .*, got 'colour'"),
        ({"block_out_channels": [10**12] * 2}, r"block_out_channels to be an integer in 1\.\.16777216, got 1000000000000"),
    ],
)
def test_a_wrong_value_of_config_json_is_named_with_the_file(
    model: UNet, tmp_path: Path, change: dict[str, Any], wanted: str
) -> None:
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=rf"^from_pretrained: expected {wanted}, in '.*config\.json'$"):
        UNet.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"^save_pretrained: expected {wanted}, in '.*config\.json'$"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (None, "to hold a dict of tensors by name, got a NoneType"),
        ([torch.zeros(1)], "to hold a dict of tensors by name, got a list"),
        (torch.zeros(1), "to hold a dict of tensors by name, got a Tensor"),
        ({1: torch.zeros(1), "a": 2}, "to hold a dict of tensors by name, got names such as 1, a"),
        ({"conv_in.bias": None}, r"expected conv_in\.bias to be a dense tensor, got None, in '"),
        (
            {"conv_in.bias": torch.zeros(8).to_sparse()},
            r"to be a dense tensor, got a cpu tensor of layout torch\.sparse_coo, in '",
        ),
        ({"conv_in.bias": torch.zeros(8, device="meta")}, "to be a dense tensor, got a meta tensor of layout"),
        ({"conv_in.bias": torch.zeros(8, dtype=torch.int64)}, r"expected conv_in\.bias to be floating, got torch\.int64, in '"),
        (
            {"conv_in.bias": torch.full((8,), float("nan"))},
            r"to be finite, got NaN or infinity in conv_in\.bias \(torch\.float32\)",
        ),
    ],
)
def test_a_torch_file_of_something_else_is_named(model: UNet, tmp_path: Path, content: Any, wanted: str) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    if isinstance(content, dict) and 1 not in content:
        content = model.state_dict() | content
    torch.save(content, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=wanted) as error:
        UNet.from_pretrained(tmp_path)
    error.match(r"^from_pretrained: .*diffusion_pytorch_model\.bin'")


def test_weights_that_are_not_finite_are_named(model: UNet, tmp_path: Path) -> None:
    with torch.no_grad():
        model.conv_in.weight[0, 0, 0, 0] = 1e5
    model.save_pretrained(tmp_path)
    wanted = rf"^from_pretrained: expected the tensors in '.*{WEIGHTS}' to be finite, got NaN or infinity in "
    with pytest.raises(ValueError, match=wanted + r"conv_in\.weight \(torch\.float16\)$"):
        UNet.from_pretrained(tmp_path, dtype=torch.float16)
    assert UNet.from_pretrained(tmp_path).conv_in.weight.detach().max() == 1e5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[-1] = -float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=wanted + r"class_embedding\.weight \(torch\.float32\), .* and \d+ more$"):
        UNet.from_pretrained(tmp_path)
