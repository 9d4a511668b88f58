"""`fuse`: other libraries' models compute the same with one kernel for GroupNorm, modulation and SiLU."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from changes import Change, given, hooked, negated, negated_before, negating, replaced
from other_blocks import EDMUNet, GroupNorm32, GuidedUNet, ResBlock, SiLU, UNetBlock, in_float64
from small_unets import randomise, relative_error
from torch import Tensor, nn

from ddpm_fast import UNet, fuse, unfuse
from ddpm_fast.integrations.fuse import FuseReport
from ddpm_fast.integrations.fused_blocks import Swapped, own_class

diffusers = pytest.importorskip("diffusers")
from diffusers.models.resnet import ResnetBlock2D  # noqa: E402

UNET_2D: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def unet_2d(**changes: Any) -> nn.Module:
    return diffusers.UNet2DModel(**(UNET_2D | changes))


WITH_TEXT: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
}
OF_AN_AUTOENCODER = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def with_time(channels: int) -> tuple[Tensor, ...]:
    return normal(2, channels, 8, 8), torch.tensor([3, 800])


X_AND_EMB = (normal(2, 3, 8, 8), normal(2, 12))
# name -> the network, its inputs, and how many of its norms can be fused, of all.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], int, int]] = {
    "UNet2DModel": (unet_2d, with_time(3), 17, 21),
    "scale-shift": (lambda: unet_2d(resnet_time_scale_shift="scale_shift"), with_time(3), 17, 20),
    "resnet resampling": (lambda: unet_2d(downsample_type="resnet", upsample_type="resnet"), with_time(3), 19, 23),
    "UNet2DConditionModel": (
        lambda: diffusers.UNet2DConditionModel(**(UNET_2D | WITH_TEXT)),
        (*with_time(4), normal(2, 5, 12)),
        17,
        21,
    ),
    "AutoencoderKL": (lambda: diffusers.AutoencoderKL(**(UNET_2D | OF_AN_AUTOENCODER)), (normal(2, 3, 8, 8),), 22, 24),
    "guided-diffusion": (lambda: GuidedUNet(use_scale_shift_norm=True), X_AND_EMB, 7, 7),
    "guided-diffusion, shift": (lambda: GuidedUNet(use_scale_shift_norm=False), X_AND_EMB, 7, 7),
    "improved-diffusion": (lambda: GuidedUNet(use_scale_shift_norm=True, silu=SiLU), X_AND_EMB, 7, 7),
    "EDM": (lambda: EDMUNet(adaptive_scale=True), X_AND_EMB, 8, 9),
    "EDM, shift": (lambda: EDMUNet(adaptive_scale=False), X_AND_EMB, 8, 9),
}


def make(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    network, inputs, _, _ = NETWORKS[name]
    torch.manual_seed(0)
    model = network().eval()
    randomise(model)
    return model, inputs


def output(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    result = model(*inputs)
    return result if isinstance(result, Tensor) else result.sample


def cast(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def gradients(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return the gradient of every parameter."""
    loss = output(model, inputs).square().mean()
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([grad.flatten() for grad in grads if grad is not None])


@pytest.mark.parametrize("name", NETWORKS)
def test_every_norm_before_a_silu_is_fused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make(name)
    report = fuse(model)
    assert (len(report.fused), len(report.fused) + len(report.left)) == NETWORKS[name][2:]
    # None of the names is made up, and what is fused is not computed on its own any more. A hook would be honoured.
    names = {id(model.get_submodule(path)): path for path in (*report.fused, *report.left)}
    called = set()

    def watched(forward: Callable[..., Tensor], self: nn.Module, x: Tensor) -> Tensor:
        called.add(names[id(self)])
        return forward(self, x)

    for kind in {own_class(model.get_submodule(path)) for path in names.values()}:
        monkeypatch.setattr(kind, "forward", lambda self, x, forward=kind.forward: watched(forward, self, x))
    with torch.no_grad():
        output(model, inputs)
    assert called == set(report.left)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients_are_as_right_as_before(name: str, dtype: torch.dtype) -> None:
    model, inputs = make(name)
    exact, exact_gradients = (f(in_float64(model), cast(inputs, torch.float64)) for f in (output, gradients))
    model, inputs = model.to(dtype), cast(inputs, dtype)
    if "diffusion" in name:  # its norms stay float32: GroupNorm32 has no other
        for module in model.modules():
            if isinstance(module, nn.GroupNorm):
                module.float()
    before = output(model, inputs), gradients(model, inputs)
    assert fuse(model).fused
    after = output(model, inputs), gradients(model, inputs)
    for truth, old, new in zip((exact, exact_gradients), before, after, strict=True):
        assert new.dtype == old.dtype
        # Some sums of equally many roundings are luckier than others: twice is the project's rule.
        assert relative_error(new, truth) <= 2 * relative_error(old, truth)


@pytest.mark.parametrize("name", NETWORKS)
def test_unfuse_leaves_no_trace(name: str) -> None:
    model, inputs = make(name)

    def traces() -> list[tuple[type, dict[str, Any]]]:
        return [(type(module), dict(vars(module))) for module in model.modules()]

    before, state = traces(), model.state_dict(keep_vars=True)
    expected = output(model, inputs)
    report = fuse(model)
    assert fuse(model) == report
    fused_state = model.state_dict(keep_vars=True)
    assert list(fused_state) == list(state)
    assert all(fused_state[key] is value for key, value in state.items())
    assert any(isinstance(module, Swapped) for module in model.modules())
    unfuse(model)
    assert traces() == before
    assert torch.equal(output(model, inputs), expected)


@pytest.mark.parametrize("name", ["UNet2DModel", "guided-diffusion", "EDM"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_are_fused_and_apart(name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    model, inputs = make(name)
    report = fuse(model)
    expected = output(model, inputs)
    twin = copied(model)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    unfuse(model)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(output(twin, inputs), expected)
    assert fuse(twin) == report


@pytest.mark.parametrize(
    "name", ["one level", *(pytest.param(name, marks=pytest.mark.slow) for name in ("UNet2DModel", "AutoencoderKL", "EDM"))]
)
def test_compiles_whole(name: str) -> None:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (16,)}
    model, inputs = make(name) if name in NETWORKS else (unet_2d(**blocks, add_attention=False), with_time(3))
    fuse(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert relative_error(output(compiled, inputs), output(model, inputs)) < 1e-6


@pytest.mark.parametrize("name", NETWORKS)
def test_autocast(name: str) -> None:
    model, inputs = make(name)
    exact = output(copy.deepcopy(model), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        before = output(model, inputs)
        fuse(model)
        after = output(model, inputs)
    assert after.dtype == before.dtype
    assert relative_error(after, exact) <= 2 * relative_error(before, exact)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_goes_on_as_before(checkpointing: bool) -> None:
    """With dropout, whose masks are the same, and steps of an optimizer that was made before."""
    x, t = with_time(3)
    plain = unet_2d(dropout=0.3).train()
    losses: dict[nn.Module, list[float]] = {plain: [], copy.deepcopy(plain): []}
    for model, values in losses.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if checkpointing:
            model.enable_gradient_checkpointing()
        if model is not plain:
            fuse(model)
        torch.manual_seed(0)
        for _ in range(4):
            loss = (output(model, (x, t)) - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
    before, after = losses.values()
    assert before[-1] < before[0]
    assert after == pytest.approx(before, rel=1e-4)


def test_our_own_network_has_nothing_left_to_fuse() -> None:
    network = UNet(block_out_channels=[8], down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"], norm_num_groups=4)
    assert fuse(network) == FuseReport(fused={}, left={})


def test_classes_keep_their_names_and_relatives() -> None:
    """Adapters and offloading find modules by the names of their classes."""
    model, _ = make("UNet2DModel")
    shown = repr(model)
    fuse(model)
    kind = type(model.mid_block.resnets[0])
    assert issubclass(kind, ResnetBlock2D)
    assert kind.__module__ == ResnetBlock2D.__module__
    assert repr(model) == shown


def test_what_was_done_can_be_read() -> None:
    assert str(fuse(make("UNet2DModel")[0])).splitlines() == [
        "17 of 21 group norms fused with the SiLU that follows",
        "  1 fused: UNet2DModel",
        "  16 fused: ResnetBlock2D",
        "  4 left: no known SiLU follows it in Attention",
    ]


# ---------------------------------------------------------------------------------------------------------- nn.Sequential


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_any_sequential(dims: int) -> None:
    conv = [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d][dims]
    size = () if dims == 0 else (1,)
    layers = [conv(8, 8, *size), nn.GroupNorm(2, 8), nn.SiLU(), nn.Dropout(0.5), nn.GroupNorm(4, 8, affine=False), nn.SiLU()]
    model = nn.Sequential(*layers, nn.GroupNorm(2, 8)).eval()
    randomise(model)
    x = normal(3, 8, *(5,) * dims)
    expected, slice_of_it = model(x), model[1:3](x)
    report = fuse(model)
    assert report.fused.keys() == {"1", "4"}
    assert report.left == {"6": "no known SiLU follows it in Sequential"}
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model[1:3](x), slice_of_it)
    torch.testing.assert_close(model[2:](model[:2](x)), expected)  # cut between norm and SiLU


# ------------------------------------------------------------------------------------------------------- what is left, why


def patched(path: str) -> Change:
    return lambda model: setattr(model.get_submodule(path), "forward", model.get_submodule(path).forward)


class SiLULookalike(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


SiLULookalike.__name__ = "SiLU"
LOOKALIKE = "computes something else than the known class of that name"
MID, GUIDED, EDM = "mid_block.resnets.0", "blocks.1.0", "blocks.1"
LEFT: list[tuple[str, Change, str, str]] = [
    ("UNet2DModel", hooked(f"{MID}.norm1"), f"{MID}.norm2", "ResnetBlock2D.norm1 has hooks"),
    ("UNet2DModel", hooked(f"{MID}.norm2", "register_forward_pre_hook"), f"{MID}.norm1", "ResnetBlock2D.norm2 has hooks"),
    (
        "UNet2DModel",
        hooked(f"{MID}.nonlinearity", "register_full_backward_hook"),
        f"{MID}.norm1",
        "ResnetBlock2D.nonlinearity has hooks",
    ),
    ("UNet2DModel", patched(MID), f"{MID}.norm1", "ResnetBlock2D has another forward than the known class"),
    ("UNet2DModel", patched(""), "conv_norm_out", "UNet2DModel has another forward than the known class"),
    ("UNet2DModel", patched(f"{MID}.norm1"), f"{MID}.norm1", "ResnetBlock2D.norm1 has a patched forward"),
    ("UNet2DModel", replaced(f"{MID}.nonlinearity", nn.Mish()), f"{MID}.norm2", "ResnetBlock2D.nonlinearity is a Mish"),
    ("UNet2DModel", replaced(f"{MID}.norm2", nn.BatchNorm2d(32)), f"{MID}.norm1", "ResnetBlock2D.norm2 is a BatchNorm2d"),
    ("UNet2DModel", hooked("conv_norm_out"), "conv_norm_out", "UNet2DModel.conv_norm_out has hooks"),
    ("UNet2DModel", hooked("conv_act"), "conv_norm_out", "UNet2DModel.conv_act has hooks"),
    ("UNet2DModel", replaced("conv_act", nn.GELU()), "conv_norm_out", "UNet2DModel.conv_act is a GELU"),
    ("UNet2DModel", replaced("conv_act", SiLULookalike()), "conv_norm_out", f"UNet2DModel {LOOKALIKE}"),
    ("guided-diffusion", replaced("out.1", SiLULookalike()), "out.0", f"Sequential {LOOKALIKE}"),
    (
        "UNet2DModel",
        lambda model: model.mid_block.add_module("again", model.conv_act),
        "conv_norm_out",
        "UNet2DModel.conv_act is used elsewhere, too",
    ),
    ("guided-diffusion", hooked("out.1"), "out.0", "Sequential.1 has hooks"),
    ("guided-diffusion", patched("out"), "out.0", "Sequential has another forward than the known class"),
    ("guided-diffusion", replaced("out.1", nn.Dropout(0.1)), "out.0", "no known SiLU follows it in Sequential"),
    ("EDM", hooked(f"{EDM}.norm0"), f"{EDM}.norm1", "UNetBlock.norm0 has hooks"),
    ("EDM", patched(EDM), f"{EDM}.norm1", "UNetBlock has another forward than the known class"),
]


@pytest.mark.parametrize(("name", "change", "norm", "reason"), LEFT, ids=[f"{case[0]}: {case[3]}" for case in LEFT])
def test_what_cannot_be_fused_is_left_with_the_reason(name: str, change: Change, norm: str, reason: str) -> None:
    model, inputs = make(name)
    change(model)
    model.eval()
    expected = output(model, inputs)
    report = fuse(model)
    assert report.left[norm] == reason
    assert report.fused  # the rest
    assert relative_error(output(model, inputs), expected) < 1e-5


# -------------------------------------------------------------------------------------------------------- what changes later


LATER: dict[str, tuple[str, Change]] = {
    "activation": ("UNet2DModel", replaced(f"{MID}.nonlinearity", nn.GELU())),
    "activation hooked": ("UNet2DModel", negated(f"{MID}.nonlinearity")),
    "activation patched": ("UNet2DModel", negating(f"{MID}.nonlinearity")),
    "norm of another class": ("UNet2DModel", replaced(f"{MID}.norm1", nn.InstanceNorm2d(32))),
    "norm without weights": ("UNet2DModel", given(f"{MID}.norm1", weight=None, bias=None)),
    "eps": ("UNet2DModel", given(f"{MID}.norm1", eps=1.0)),
    "groups": ("UNet2DModel", given(f"{MID}.norm2", num_groups=2)),
    "norm hooked": ("UNet2DModel", negated(f"{MID}.norm2")),
    "norm hooked before": ("UNet2DModel", negated_before(f"{MID}.norm2")),
    "norm patched": ("UNet2DModel", negating(f"{MID}.norm1")),
    "dropout": ("UNet2DModel", replaced(f"{MID}.dropout", nn.Tanh())),
    "convolution hooked": ("UNet2DModel", negated(f"{MID}.conv1")),
    "scale": ("UNet2DModel", given(f"{MID}", output_scale_factor=2.0)),
    "time without SiLU": ("UNet2DModel", given(f"{MID}", skip_time_act=True)),
    "time left out": ("UNet2DModel", given(f"{MID}", time_embedding_norm="none")),
    "head's activation": ("UNet2DModel", replaced("conv_act", nn.GELU())),
    "head's activation hooked": ("UNet2DModel", negated("conv_act")),
    "head's norm": ("UNet2DModel", replaced("conv_norm_out", nn.InstanceNorm2d(16))),
    "head's norm hooked": ("UNet2DModel", negated("conv_norm_out")),
    "head's norm patched": ("UNet2DModel", negating("conv_norm_out")),
    "head's eps": ("UNet2DModel", given("conv_norm_out", eps=1.0)),
    "AutoencoderKL's activation": ("AutoencoderKL", replaced("decoder.conv_act", nn.GELU())),
    "ResBlock's activation": ("guided-diffusion", replaced(f"{GUIDED}.in_layers.1", nn.GELU())),
    "ResBlock's norm": ("guided-diffusion", replaced(f"{GUIDED}.out_layers.0", nn.InstanceNorm2d(32))),
    "ResBlock's eps": ("guided-diffusion", given(f"{GUIDED}.out_layers.0", eps=1.0)),
    "ResBlock's layers hooked": ("guided-diffusion", negated(f"{GUIDED}.in_layers")),
    "ResBlock's layers longer": ("guided-diffusion", lambda model: model.blocks[1][0].in_layers.append(nn.Tanh())),
    "Sequential's activation": ("guided-diffusion", replaced("out.1", nn.GELU())),
    "Sequential's norm hooked": ("guided-diffusion", negated("out.0")),
    "UNetBlock's norm": ("EDM", replaced(f"{EDM}.norm0", nn.InstanceNorm2d(32))),
    "UNetBlock's norm hooked": ("EDM", negated(f"{EDM}.norm1")),
}  # fmt: skip


# Changes that a fused module sees at its next call. Others are of what it does not call.
SEEN = (
    *("norm without weights", "eps", "groups", "dropout", "convolution hooked", "scale", "time without SiLU", "head's eps"),
    *("ResBlock's eps", "Sequential's activation"),
)


@pytest.mark.parametrize("what", LATER)
def test_what_changes_later_counts(what: str) -> None:
    """At the next call, or after another `fuse`."""
    name, change = LATER[what]
    model, inputs = make(name)
    plain = copy.deepcopy(model)
    before = output(model, inputs)
    fuse(model)
    for each in (model, plain):
        change(each)
        each.eval()
    expected = output(plain, inputs)
    assert relative_error(expected, before) > 1e-4  # it matters
    if what in SEEN:
        assert relative_error(output(model, inputs), expected) < 1e-5
    fuse(model)
    assert relative_error(output(model, inputs), expected) < 1e-5
    unfuse(model)
    assert relative_error(output(model, inputs), expected) < 1e-5


def test_a_head_with_another_group_norm_is_tried() -> None:
    model, inputs = make("UNet2DModel")
    replaced("conv_norm_out", GroupNorm32(2, 16))(model)
    expected = output(model, inputs)
    assert "conv_norm_out" in fuse(model).fused
    assert relative_error(output(model, inputs), expected) < 1e-5


# ------------------------------------------------------------------------------------------------------ classes of one name


class Overriding(UNetBlock):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return super().forward(x, emb)


def other_modulation(self: Any, x: Tensor, emb: Tensor) -> Tensor:
    """scale, not 1 + scale, as in a fork of guided-diffusion that nobody knows."""
    scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
    h = self.out_layers[1:](self.out_layers[0](self.in_layers(x)) * scale + shift)
    return self.skip_connection(x) + h


def further_argument(self: Any, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
    return ResBlock._forward(self, x, emb) + context


def test_subclasses_are_taken_if_they_inherit_the_forward() -> None:
    inheriting = type("Inheriting", (ResBlock,), {})(16, 12, out_channels=16, use_scale_shift_norm=True)
    assert fuse(inheriting).fused == dict.fromkeys(("in_layers.0", "out_layers.0"), "Inheriting")
    overriding = Overriding(16, 16, 12, adaptive_scale=True)
    assert fuse(overriding).left == dict.fromkeys(("norm0", "norm1"), "Overriding has another forward than the known class")


@pytest.mark.parametrize("forward", [other_modulation, further_argument])
def test_a_class_that_only_has_the_name_and_the_parts_is_found_out(forward: Callable[..., Tensor]) -> None:
    """Also where its last layer is zero, as in a new block, which hides everything before it."""
    block = ResBlock(16, 12, out_channels=16, use_scale_shift_norm=True)
    block.__class__ = type("ResBlock", (ResBlock,), {"_forward": forward})
    model, plain = nn.ModuleList([block]), copy.deepcopy(block)
    report = fuse(model)
    assert type(block).__name__ == "ResBlock"
    assert not isinstance(block, Swapped)
    # Its two Sequentials are what they seem, and it calls their modules one by one.
    assert report.fused.keys() == {"0.in_layers.0", "0.out_layers.0"}
    inputs = (normal(2, 16, 8, 8), normal(2, 12), normal(2, 16, 8, 8))[: 3 if forward is further_argument else 2]
    for each in (block, plain):
        randomise(each)
    torch.testing.assert_close(block._forward(*inputs), plain._forward(*inputs))
    patched("0.in_layers")(model)
    patched("0.out_layers")(model)
    assert fuse(model).left == dict.fromkeys(report.fused, "Sequential has another forward than the known class")


class Uncopyable:
    """An owner of hooks that cannot be copied."""

    times = 0

    def hook(self, *args: Any) -> None:
        self.times += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise AssertionError


def test_trying_a_block_has_no_side_effects() -> None:
    """Neither on hooks, nor on random numbers, nor on the model, which may have no memory at all."""
    with torch.device("meta"):
        model = unet_2d(dropout=0.5).train()
    called = Uncopyable()
    model.mid_block.resnets[0].conv1.register_forward_hook(called.hook)
    state = torch.get_rng_state()
    assert len(fuse(model).fused) == 17
    assert torch.equal(torch.get_rng_state(), state)
    assert not called.times
    assert all(module.training for module in model.modules())
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("function", [fuse, unfuse])
@pytest.mark.parametrize(
    ("make_model", "got"),
    [
        (dict, "dict"),
        (
            lambda: diffusers.DDPMPipeline(unet=unet_2d(), scheduler=diffusers.DDPMScheduler()),
            "DDPMPipeline, whose network is pipe.unet",
        ),
    ],
)
def test_anything_but_a_module_is_refused(function: Callable[[Any], object], make_model: Callable[[], Any], got: str) -> None:
    with pytest.raises(TypeError, match=f"^{function.__name__}: expected model to be an nn.Module, got {got}$"):
        function(make_model())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch imports its own for jvp
def test_transforms_of_torch_func_go_through_a_fused_model() -> None:
    """Gradients, a sample's own gradients, and forward-mode derivatives, which are those of the model before."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 2, 3)).double()
    parameters, x = dict(model.named_parameters()), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    tangents = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    def results() -> list[Any]:
        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        _, forward = torch.func.jvp(lambda p: loss(p, x[0]), (parameters,), (tangents,))
        return [torch.func.grad(loss)(parameters, x[0]), per_sample, forward]

    expected = results()
    assert fuse(model).fused
    torch.testing.assert_close(results(), expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # it still makes such modules
def test_modules_of_torchscript_are_left_alone() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(8, 8)), nn.GroupNorm(2, 8), nn.SiLU())
    assert list(fuse(model).fused) == ["1"]
