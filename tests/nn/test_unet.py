"""`UNet` against diffusers' `UNet2DModel` with the same random weights, and the facts of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from refusals import by, refused
from small_unets import SMALL, VARIANTS, assert_as_right, make_inputs, make_unet, randomise, relative_error
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call

from ddpm_fast import freeze, noise, sample_seeds
from ddpm_fast.errors import InvalidType, InvalidValue
from ddpm_fast.nn import CIFAR10_32, HO_256, UNet, UNetConfig
from ddpm_fast.nn.layers import ResnetBlock

diffusers = pytest.importorskip("diffusers")


def make_pair(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[UNet, torch.nn.Module]:
    model = UNet(**config).to(dtype)
    randomise(model)
    peer = diffusers.UNet2DModel(**config).to(dtype)
    peer.load_state_dict(model.state_dict())  # strict: the same names and shapes
    return model, peer


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_are_those_of_diffusers(variant: str) -> None:
    # A wrong constant or a lost term cannot hide in the rounding of float64.
    config = SMALL | VARIANTS[variant]
    model, peer = make_pair(config, torch.float64)
    x, t, labels = make_inputs(config, 3, torch.float64)
    weight = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    grads = []
    for network in (model, peer):
        leaf = x.clone().requires_grad_()
        out = network(leaf, t, labels)
        out = out if isinstance(out, Tensor) else out.sample
        (out * weight).sum().backward()
        grads.append({"output": out.detach(), "x": leaf.grad} | {name: p.grad for name, p in network.named_parameters()})
    ours, theirs = grads
    scale = max(float(g.abs().max()) for g in theirs.values())
    for name, expected in theirs.items():
        # The gradient of a key's bias is zero but for rounding: softmax does not see it.
        assert torch.allclose(ours[name], expected, rtol=1e-9, atol=1e-13 * scale), name


@pytest.mark.parametrize(
    ("config", "n", "parameters"),
    [
        pytest.param(CIFAR10_32, 2, 35_746_307, id="cifar10-32"),
        pytest.param(HO_256, 1, 113_673_219, id="256", marks=pytest.mark.slow),
    ],
)
def test_networks_of_ho_et_al(config: dict[str, Any], n: int, parameters: int) -> None:
    model, peer = make_pair(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    x, t, _ = make_inputs(config, n)
    with torch.no_grad():
        assert relative_error(model(x, t), peer(x, t).sample) <= 1e-5


def test_an_own_number_of_heads_and_width_of_sinusoids() -> None:
    """Beside diffusers' keys: the same as those, where those can say it."""
    config = SMALL | {"attention_head_dim": 8, "add_attention": False}  # the attentions are 32 wide
    model = UNet(**config)
    other = UNet(**config | {"attention_head_dim": None, "num_attention_heads": 4, "time_input_dim": 16})
    randomise(model)
    other.load_state_dict(model.state_dict())
    x, t, _ = make_inputs(config, 2)
    assert torch.equal(model(x, t), other(x, t))
    assert_as_right(freeze(other, torch.float32)(x, t), model, x, t)
    assert UNet(**config | {"time_input_dim": 24}).time_embedding.linear_1.in_features == 24


@torch.no_grad()
def test_channels_last_gives_the_same_and_stays_channels_last() -> None:
    model, config = make_unet("one-head-asymmetric")
    x, t, _ = make_inputs(config, 2)
    expected = model(x, t)
    actual = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t)
    assert expected.is_contiguous()
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(actual, expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["autocast", "weights"])
@torch.no_grad()
def test_bfloat16_error_is_that_of_diffusers(dtype: torch.dtype) -> None:
    config = SMALL | VARIANTS["class-conditional"]
    model, peer = make_pair(config)
    x, t, labels = make_inputs(config, 2)
    exact, x = model(x, t, labels), x.to(dtype)
    model, peer = model.to(dtype), peer.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        ours, theirs = model(x, t, labels), peer(x, t, labels).sample
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, exact) <= 2 * relative_error(theirs, exact)


def test_input_is_cast_to_the_weights_dtype() -> None:
    model, config = make_unet()
    x, t, _ = make_inputs(config, 1)
    assert torch.equal(model.bfloat16()(x, t), model(x.bfloat16(), t))


@torch.no_grad()
def test_compiles_whole_and_once() -> None:
    blocks = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    model, config = make_unet("class-conditional", block_out_channels=[16, 32], layers_per_block=1, **blocks)
    x, _, labels = make_inputs(config, 2)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for t in (torch.tensor([seed, 999 - seed]) for seed in range(3)):
        assert torch.equal(compiled(x, t, labels), model(x, t, labels))
    assert counter.frame_count == 1


@pytest.mark.parametrize("weak_shortcuts", [False, True])
def test_a_new_network_predicts_zero_and_learns_in_every_weight(weak_shortcuts: bool) -> None:
    config = SMALL | VARIANTS["class-conditional"]
    torch.manual_seed(0)
    model = UNet(**config)
    if weak_shortcuts:
        model.weaken_shortcuts()
    x, t, labels = make_inputs(config, 4)
    assert not model(x, t, labels).any()  # Ho et al.: the output convolution starts at zero
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    # The zeros open one after the other: output convolution, then residual branches, then what feeds those.
    for _ in range(4):
        optimizer.zero_grad()
        (model(x, t, labels) - 1).square().mean().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


@torch.no_grad()
def test_dropout_acts_in_training_only() -> None:
    model, config = make_unet(dropout=0.5)
    x, t, _ = make_inputs(config, 1)
    expected = model(x, t)
    assert torch.equal(model(x, t, dropout_seeds=sample_seeds(0, len(x))), expected)
    model.train()
    assert not torch.equal(model(x, t), model(x, t))


@pytest.mark.parametrize("variant", ["class-conditional", "resampling"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_seeds_decide_what_dropout_drops(variant: str, layout: torch.memory_format) -> None:
    model, config = make_unet(variant, dropout=0.3)
    model.train()
    dropped: dict[str, Tensor] = {}
    blocks = {name: block for name, block in model.named_modules() if isinstance(block, ResnetBlock)}
    for name, block in blocks.items():
        block.conv2.register_forward_pre_hook(lambda _, inputs, name=name: dropped.update({name: inputs[0] == 0}))
    x, t, labels = make_inputs(config, 4)
    model, x, seeds = model.to(memory_format=layout), x.contiguous(memory_format=layout), sample_seeds(7, 4)
    state = torch.get_rng_state()
    model(x, t, labels, dropout_seeds=seeds)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({block.dropout_stream for block in blocks.values()}) == len(blocks)
    for name, block in blocks.items():
        z = noise(dropped[name].shape, seeds, stream=block.dropout_stream)
        assert torch.equal(dropped[name], z < -0.5244005), name  # the normal distribution is 0.3 there
    # The gradients follow them.
    name = "down_blocks.0.resnets.0.norm2.weight"

    def total(weight: Tensor) -> Any:
        return functional_call(model, {name: weight}, (x, t, labels), {"dropout_seeds": seeds}).square().sum()

    assert torch.autograd.gradcheck(total, model.double().get_parameter(name), rtol=1e-5, atol=0, fast_mode=True)


@pytest.mark.slow
def test_dropout_by_seeds_compiles() -> None:
    # Without attention at 8x8, which kernels compute in eager mode and PyTorch in compiled code.
    model, config = make_unet(dropout=0.3, down_block_types=["DownBlock2D"] * 3, up_block_types=["UpBlock2D"] * 3)
    x, t, _ = make_inputs(config, 2)
    compiled = torch.compile(model.train(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, t, dropout_seeds=sample_seeds(3, 2)), model(x, t, dropout_seeds=sample_seeds(3, 2)))


def test_dropout_by_seeds_keeps_the_mean() -> None:
    block = ResnetBlock(32, 32, 4, num_groups=1, eps=1e-5, dropout=0.25, time_scale_shift="default")
    x, emb = torch.randn(8, 32, 16, 16), torch.zeros(8, 4)
    with torch.no_grad():
        block.conv2.weight.zero_()[range(32), range(32), 1, 1] = 1  # so the branch's output is what dropout leaves
        block.conv2.bias.zero_()
        kept, whole = block(x, emb, dropout_seeds=sample_seeds(0, 8)) - x, block.eval()(x, emb) - x
    # Both are differences from x, whose float32 rounding they have.
    torch.testing.assert_close(kept[kept != 0], whole[kept != 0] / 0.75, rtol=1e-4, atol=1e-5)


def test_config_round_trip_and_bookkeeping_keys() -> None:
    model = UNet(_class_name="UNet2DModel", _diffusers_version="0.0", **SMALL)
    assert model.config == UNet(**model.config).config
    assert model.config["block_out_channels"] == [16, 32, 48]
    defaults = {k: v for k, v in diffusers.UNet2DModel(**SMALL).config.items() if not k.startswith("_")}
    assert UNetConfig(**SMALL) == UNetConfig(**defaults)  # every key diffusers writes is known, with the same default


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("colour", "blue", "expected keys among sample_size, .*, got 'colour'"),
        ("time_embedding_type", "fourier", "to be positional"),
        ("mid_block_type", None, "to be UNetMidBlock2D"),
        ("downsample_type", "pool", "one of conv, resnet"),
        ("num_attention_heads", 5, "None or a divisor"),
        ("time_input_dim", 33, "even first"),
        ("downsample_padding", 2, "one of 0, 1"),
        ("act_fn", "gelu", "one of silu, swish"),
        ("resnet_time_scale_shift", "spatial", "one of default, scale_shift"),
        ("class_embed_type", "timestep", "to be None"),
        ("down_block_types", ["DownBlock2D"], "3 types"),
        ("up_block_types", ["SkipUpBlock2D"] * 3, "one of UpBlock2D, AttnUpBlock2D, ResnetUpsampleBlock2D"),
        ("block_out_channels", [], "1 to 16 integers"),
        ("block_out_channels", 32, "a list of integers"),
        ("freq_shift", 8, "below 8"),
        ("block_out_channels", [17, 32, 48], "even"),
        ("block_out_channels", [20, 32, 48], "multiples of norm_num_groups = 8"),
        ("attention_head_dim", 20, "divisor of every attention width"),
        ("attn_norm_num_groups", 7, "divisor of 48"),
        ("layers_per_block", 0, "in 1..64"),
        ("num_class_embeds", -1, "in 1..16777216 or None"),
        ("class_names", "cat", "a list of strings"),
        ("class_names", [], "None or a list of non-empty strings"),
        ("class_names", ["cat", ""], "None or a list of non-empty strings"),
        ("class_names", ["cat", 1], "a list of strings"),
        ("class_names", ["cat", "cat"], "without repetitions"),
        ("class_names", ["cat"], "None or at most 0 names, as labels have"),
        (
            "class_names",
            {"num_class_embeds": 1, "class_names": ["cat", "dog"]},
            r"None or at most 1 names, as labels have, got \('cat', 'dog'\)",
        ),
        (
            "class_names",
            {"num_class_embeds": 2, "class_names": ["cat", "dog"], "no_label": 1},
            "None or at most 1 names, as labels have",
        ),
        ("no_label", {"num_class_embeds": 2, "no_label": 2}, "None or below num_class_embeds = 2, got 2"),
        ("no_label", 0, "None or below num_class_embeds = None, got 0"),
        ("dropout", 1.0, "at least 0 and below 1"),
        ("norm_eps", 0.0, "positive"),
        ("mid_block_scale_factor", 0.0, "positive"),
        ("mid_block_scale_factor", None, "a number"),
        ("norm_eps", "x", "a number"),
        ("dropout", None, "a number"),
        ("freq_shift", None, "an integer of at least 0"),
        ("freq_shift", -1, "an integer of at least 0"),
        ("layers_per_block", 65, "in 1..64"),
        ("layers_per_block", "2", "in 1..64"),
        ("block_out_channels", [8] * 17, "1 to 16 integers"),
        ("block_out_channels", [8, None, 8], r"a list of integers, got \[8, None, 8\]"),
        ("block_out_channels", [10**12] * 3, "in 1..16777216, got 1000000000000"),
        ("num_class_embeds", 10**13, "in 1..16777216 or None, got 10000000000000"),
        ("in_channels", 10**400, "in 1..16777216, got 10"),
        ("down_block_types", None, "a list of strings"),
        ("up_block_types", "UpBlock2D", "a list of strings"),
        ("up_block_types", [["UpBlock2D"]] * 3, "a list of strings"),
        ("downsample_padding", True, "one of 0, 1, got True"),
        ("center_input_sample", None, "a bool"),
        ("flip_sin_to_cos", 1, "a bool"),
        ("add_attention", "false", "a bool"),
        ("sample_size", "big", "a width and height such as 64"),
        ("sample_size", [8, 0], "in 1..65536"),
        ("sample_size", [8], "a pair of integers, or one"),
        ("num_train_timesteps", "x", "in 1..16777216 or None"),
    ],
)
def test_unsupported_configuration_is_named(key: str, value: object, wanted: str) -> None:
    with pytest.raises((TypeError, ValueError), match=wanted) as error:
        UNet(**SMALL | (value if isinstance(value, dict) else {key: value}))
    error.match(f"^UNet: .*{key}")


def test_bad_inputs_are_named() -> None:
    plain, conditional = UNet(**SMALL), UNet(**SMALL | {"num_class_embeds": 3})
    x = torch.zeros(2, 2, 16, 16)
    labels = torch.zeros(2, dtype=torch.int64)
    for network, arguments, message, *error in [
        (plain, ("x", 0), "x to be a tensor, got str", TypeError),
        (plain, (x, "a"), "t to be an int or a tensor, got str", TypeError),
        (conditional, (x, 0, [0, 1]), r"class_labels to be int64 \[2\], got list", TypeError),
        (conditional, (x, 0, labels + 3), r"class_labels in 0\.\.2, got values from 3 to 3"),
        (conditional, (x, 0, labels - 1), r"class_labels in 0\.\.2, got values from -1 to -1"),
        (plain, (x[0], 0), r"x to be \[N, 2, H, W\], got \(2, 16, 16\)"),
        (plain, (x[:, :1], 0), r"x to be \[N, 2, H, W\]"),
        (plain, (x[..., :15], 0), "x to have H and W that are multiples of 4"),
        (plain, (x, torch.zeros(3)), r"t to be an int or of shape \[\] or \[2\], got \(3,\)"),
        (plain, (x, 0, labels), "class_labels to be None"),
        (conditional, (x, 0), r"class_labels to be int64 \[N\] \(num_class_embeds is 3\), got None"),
        (conditional, (x, 0, labels[:1]), r"class_labels to be int64 \[2\], got torch.int64 \(1,\)"),
        (conditional, (x, 0, labels.float()), r"class_labels to be int64 \[2\], got torch.float32"),
    ]:
        with pytest.raises(error[0] if error else ValueError, match=f"UNet: expected {message}"):
            network(*arguments)
    with refused(by("UNet", InvalidValue("dropout_seeds", "to have shape [2], one per sample", "[3]"))):
        plain(x, 0, dropout_seeds=sample_seeds(0, 3))
    with refused(by("UNet", InvalidType("dropout_seeds", "to be an int64 tensor (see sample_seeds)", "int"))):
        plain(x, 0, dropout_seeds=3)
