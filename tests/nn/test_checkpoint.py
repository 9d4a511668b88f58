"""Networks on disk: diffusers' layout both ways, legacy names, whole files only, and errors that name what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from small_unets import randomise

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
    model = UNet(**TINY)
    randomise(model)
    return model


def assert_same_weights(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    torch.testing.assert_close(actual.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_round_trip(model: UNet, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    model.to(memory_format=torch.channels_last).save_pretrained(folder)
    loaded = UNet.from_pretrained(folder)
    assert_same_weights(loaded, model)
    assert loaded.config == model.config
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", WEIGHTS]
    assert (folder / WEIGHTS).stat().st_mode == (folder / "config.json").stat().st_mode


def test_dtype_is_float32_unless_asked_for(model: UNet, tmp_path: Path) -> None:
    model.half().save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).stat().st_size < 2.2 * sum(p.numel() for p in model.parameters()) + 20_000
    assert_same_weights(UNet.from_pretrained(tmp_path), model.float())
    assert_same_weights(UNet.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cpu"), model.bfloat16())


@pytest.mark.parametrize("names", [None, ["cat", "dog"]])
def test_diffusers_reads_what_we_write_and_we_what_it_writes(names: list[str] | None, tmp_path: Path) -> None:
    """It keeps keys that it does not know."""
    diffusers = pytest.importorskip("diffusers")
    model = UNet(**TINY, class_names=names)
    randomise(model)
    assert model.config.get("class_names") == names
    model.save_pretrained(tmp_path / "ours")
    peer, info = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert_same_weights(peer, model)
    diffusers.DDPMPipeline(peer, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    for folder in (tmp_path / "ours", tmp_path / "pipeline", tmp_path / "pipeline" / "unet"):
        loaded = UNet.from_pretrained(folder)
        assert_same_weights(loaded, model)
        assert loaded.config == model.config


def test_a_network_without_names_is_written_as_by_diffusers(model: UNet, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model.save_pretrained(tmp_path / "ours")
    diffusers.UNet2DModel(**TINY).save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs"))
    assert ours == {key: value for key, value in theirs.items() if key != "_diffusers_version"}


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
    changes = {"layers_per_block": 2, "norm_eps": 1e-3, "class_names": ["cat", "dog"]}
    with pytest.raises(ValueError, match=r"save_pretrained: .* path .* differs in layers_per_block, norm_eps, class_names$"):
        UNet(**TINY | changes).save_pretrained(tmp_path)
    assert_same_weights(UNet.from_pretrained(tmp_path), model)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"conv_in.bias": None}, r"to fit its config\.json, got missing conv_in\.bias"),
        ({f"extra.{i}": torch.zeros(1) for i in range(7)}, r"got unexpected extra\.0, extra\.1, .* and 2 more"),
        ({"conv_in.bias": torch.zeros(5)}, r"expected conv_in\.bias to have shape \[8\] .*, got \[5\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    model: UNet, tmp_path: Path, changes: dict[str, torch.Tensor | None], wanted: str
) -> None:
    model.save_pretrained(tmp_path)
    weights = model.state_dict() | changes
    safetensors.torch.save_file({name: each for name, each in weights.items() if each is not None}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=wanted):
        UNet.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "error", "wanted"),
    [
        (WEIGHTS, safetensors.torch.save({"a": torch.zeros(9)})[:-4], ValueError, "' to be a whole safetensors file"),
        (WEIGHTS, None, FileNotFoundError, f"expected {WEIGHTS} or diffusion_pytorch_model.bin"),
        (
            *("config.json", b'{"_class_name": "UNet2DConditionModel"}', ValueError),
            r"_class_name to be UNet2DModel, got 'UNet2DConditionModel', in '.*config\.json'",
        ),
        ("config.json", b"[]", ValueError, "to hold a JSON object, got list"),
        ("config.json", b"{", ValueError, "to be JSON"),
        ("config.json", None, FileNotFoundError, r"expected config\.json in"),
    ],
)
def test_a_damaged_or_missing_file_is_named(
    model: UNet, tmp_path: Path, file: str, content: bytes | None, error: type[Exception], wanted: str
) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(error, match=wanted):
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
    with pytest.raises(ValueError, match=rf"^UNet\.from_pretrained: expected {wanted}, in '.*config\.json'$"):
        UNet.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"^UNet\.save_pretrained: expected {wanted}, in '.*config\.json'$"):
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
        (
            {"conv_in.bias": torch.full((8,), -float("inf"))},
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
    error.match(r"^UNet\.from_pretrained: .*diffusion_pytorch_model\.bin'")


def test_weights_that_are_not_finite_are_named(model: UNet, tmp_path: Path) -> None:
    with torch.no_grad():
        model.conv_in.weight[0, 0, 0, 0] = 1e5
    model.save_pretrained(tmp_path)
    wanted = rf"^UNet\.from_pretrained: expected the tensors in '.*{WEIGHTS}' to be finite, got NaN or infinity in "
    with pytest.raises(ValueError, match=wanted + r"conv_in\.weight \(torch\.float16\)$"):
        UNet.from_pretrained(tmp_path, dtype=torch.float16)
    assert UNet.from_pretrained(tmp_path).conv_in.weight.detach().max() == 1e5
