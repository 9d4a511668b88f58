"""`why_not_frozen` and `read_network`: what a layer's forward reads is what the configuration means, or a reason."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parameters import parametrize
from small_unets import assert_as_right, make_inputs, make_unet, relative_error
from torch import Tensor, nn
from torch.nn.utils import prune

from ddpm_fast import freeze
from ddpm_fast.inference import why_not_frozen
from ddpm_fast.nn import UNet
from ddpm_fast.nn.conv import Conv3x3
from ddpm_fast.nn.layers import Attention, Downsample, GroupNormSiLU, ResnetBlock, Upsample

Change = Callable[[UNet], object]


def put(path: str, value: Any) -> Change:
    """Return a function that replaces an attribute or a layer of a model.

    Args:
        path: Its name, with dots.
        value: The new value, or a function of the old one.
    """

    def change(model: UNet) -> None:
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        is_function = callable(value) and not isinstance(value, nn.Module)
        setattr(owner, name, value(getattr(owner, name)) if is_function else value)

    return change


def all_of(*changes: Change) -> Change:
    return lambda model: [change(model) for change in changes]


def every(kind: type[nn.Module], name: str, value: Any) -> Change:
    """Return a function that sets an attribute of all layers of a class."""

    def change(model: UNet) -> None:
        for module in model.modules():
            if isinstance(module, kind):
                setattr(module, name, value)

    return change


def resnet(channels: int, out_channels: int, **options: Any) -> ResnetBlock:
    options = {"num_groups": 8, "eps": 1e-5, "dropout": 0.0, "time_scale_shift": "default"} | options
    return ResnetBlock(channels, out_channels, 64, **options)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


# ------------------------------------------------------------------------------------------------- what takes effect

MID = "mid_block.resnets.0"
ATTENTION = "mid_block.attentions.0"
ACCEPTED: dict[str, Change] = {
    "one weight in two places": lambda model: setattr(
        model.mid_block.resnets[0].conv1, "weight", model.mid_block.resnets[1].conv2.weight
    ),
    "one convolution in two places": lambda model: setattr(
        model.mid_block.resnets[0], "conv1", model.mid_block.resnets[1].conv1
    ),
    "one residual block in two places": lambda model: model.mid_block.resnets.__setitem__(1, model.mid_block.resnets[0]),
    "weights that are views": all_of(
        put("conv_norm_out.weight", lambda _: nn.Parameter(parameter(32).detach()[::2])),
        put("conv_out.bias", lambda _: nn.Parameter(torch.tensor([2.0]).expand(3))),
        put("conv_out.weight", lambda old: nn.Parameter(old.detach().contiguous(memory_format=torch.channels_last))),
        put(f"{ATTENTION}.to_q.weight", lambda old: nn.Parameter(old.detach().t())),
    ),
    "weights without gradients": lambda model: model.requires_grad_(False),
    "dropout": every(ResnetBlock, "dropout", 0.9),  # forward ignores it in eval mode
}
UNCHANGED = ("weights without gradients", "dropout")


@parametrize(
    name=list(ACCEPTED), scale_shift={"shift": False, "scale and shift": True}, packed={"packed": True, "PyTorch": False}
)
@torch.no_grad()
def test_changes_that_take_effect(name: str, scale_shift: bool, packed: bool, request: pytest.FixtureRequest) -> None:
    if not packed:
        request.getfixturevalue("no_matrix_kernels")
    options = {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8} if scale_shift else {}
    model, config = make_unet(layers_per_block=1, block_out_channels=[16, 32, 48], **options)
    inputs = make_inputs(config, 2)
    before = model(*inputs)
    ACCEPTED[name](model)
    assert (relative_error(before, model(*inputs)) > 1e-3) == (name not in UNCHANGED)
    for dtype in (torch.float64, torch.float32):
        assert_as_right(freeze(model, dtype)(*inputs), model, *inputs)


def test_a_model_that_torch_compiles_in_place_is_frozen() -> None:
    model, _ = make_unet()
    model.compile(backend="eager")
    assert why_not_frozen(model) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("matrix_kernels")
def test_weights_of_any_dtype_are_read(dtype: torch.dtype) -> None:
    model, config = make_unet("class-conditional")
    model, inputs = model.to(dtype), make_inputs(config, 2)
    for frozen in (freeze(model, torch.float64), freeze(model, torch.float32)):
        assert_as_right(frozen(*inputs), model, *inputs)


# ------------------------------------------------------------------------------------------------------ what is refused


class Adapter(nn.Linear):
    """Replacement of a linear layer by a library for fine-tuning, with all its attributes."""


class OtherUNet(UNet):
    """Subclass, whose forward may be another."""


class Subclass(Tensor):
    """Tensor that may compute something else."""


CLASSES = {"num_class_embeds": 11}
BAD_GEOMETRY = {
    "padding": ("conv_in.padding", (0, 0)),
    "stride": ("conv_in.stride", (3, 3)),
    "kernel": ("conv_in.kernel_size", (5, 5)),
    "dilation": ("conv_out.dilation", (2, 2)),
    "groups": ("conv_in.groups", 2),
    "padding of a shortcut": ("up_blocks.0.resnets.0.conv_shortcut.padding", (1, 1)),
}
# Name -> change, the reason, and changes of the configuration.
REFUSALS: dict[str, tuple[Any, ...]] = {
    # Attributes of a layer that its configuration does not mean.
    "eps of a norm": (put(f"{MID}.norm1.eps", 0.5), rf"{MID}.norm1.eps is 0.5, by its configuration it is "),
    "eps of the last norm": (put("conv_norm_out.eps", 0.5), r"conv_norm_out.eps is 0.5, "),
    "another number of groups": (put(f"{MID}.norm2.num_groups", 16), rf"{MID}.norm2.num_groups is 16, "),
    "no activation": (
        put(f"{MID}.norm1.activation", None),
        rf"{MID}.norm1.activation is None, by its configuration it is 'silu'",
    ),
    "no norm of the attention": (
        put(f"{ATTENTION}.group_norm", None),
        f"{ATTENTION}.group_norm is missing, by its configuration it is a layer of class GroupNormSiLU",
    ),
    "other heads": (put(f"{ATTENTION}.num_heads", 4), rf"{ATTENTION}.num_heads is 4, "),
    "a factor": (put(f"{MID}.output_scale_factor", 3.0), rf"{MID}.output_scale_factor is 3.0, "),
    "no bias of convolutions": (
        every(nn.Conv2d, "bias", None),
        r"conv_in.bias is missing, by its configuration it is of shape \(16,\)",
    ),
    "no bias of queries": (put(f"{ATTENTION}.to_q.bias", None), f"{ATTENTION}.to_q.bias is missing"),
    "no weights of norms": (every(GroupNormSiLU, "weight", None), r"\S+.weight is missing"),
    "a plain convolution": (
        put("conv_in", lambda _: nn.Conv2d(2, 16, 3, padding=1)),
        "conv_in is a layer of class Conv2d, by its configuration it is a layer of class Conv3x3",
    ),
    "an adapter": (
        put(f"{ATTENTION}.to_q.__class__", lambda _: Adapter),
        f"{ATTENTION}.to_q is a layer of class Adapter, by its configuration it is a layer of class Linear",
    ),
    "an adapter of the time embedding": (
        put("time_embedding.linear_1.__class__", lambda _: Adapter),
        "time_embedding.linear_1 is a layer of class Adapter, by its configuration it is a layer of class Linear",
    ),
    "another norm": (
        put("conv_norm_out", lambda _: nn.GroupNorm(8, 16)),
        "conv_norm_out is a layer of class GroupNorm, by its configuration it is a layer of class GroupNormSiLU",
    ),
    "a first convolution of 1x1": (
        put("conv_in", lambda _: nn.Conv2d(2, 16, 1)),
        "conv_in is a layer of class Conv2d, by its configuration it is a layer of class Conv3x3",
    ),
    "resampling by another layer": (
        lambda model: model.up_blocks[0].upsamplers.__setitem__(0, resnet(48, 48, resample="up")),
        "up_blocks.0.upsamplers.0",
    ),
    "an added layer": (
        lambda model: model.conv_in.add_module("extra", nn.ReLU()),
        "conv_in.extra is a layer of class ReLU, by its configuration it is missing",
    ),
    "parametrized weights": (
        lambda model: nn.utils.parametrizations.weight_norm(model.conv_out),
        "conv_out is a layer of class ParametrizedConv3x3, by its configuration it is a layer of class Conv3x3",
    ),
    "pruned weights": (
        lambda model: prune.random_unstructured(model.conv_out, "weight", 0.5),
        "conv_out has hooks",
    ),
    "a patched forward": (put("conv_out.forward", lambda _: lambda x: x), "conv_out has a patched forward"),
    "a patched forward of the model": (put("forward", lambda old: old), "it has a patched forward"),
    "a patched helper": (
        put(f"{ATTENTION}._projections", lambda old: old),
        f"{ATTENTION} has another _projections",
    ),
    "a hook": (lambda model: model.mid_block.register_forward_hook(lambda *_: None), "mid_block has hooks"),
    "a hook before": (lambda model: model.conv_in.register_forward_pre_hook(lambda *_: None), "conv_in has hooks"),
    "a hook with keywords": (
        lambda model: model.register_forward_hook(lambda *_: None, with_kwargs=True),
        "it has hooks",
    ),
    "circular padding": (
        put("conv_in.padding_mode", "circular"),
        "conv_in.padding_mode is 'circular', by its configuration it is 'zeros'",
    ),
    "reflected padding of a shortcut": (
        put("up_blocks.0.resnets.0.conv_shortcut.padding_mode", "reflect"),
        "up_blocks.0.resnets.0.conv_shortcut.padding_mode is 'reflect', ",
    ),
    **{name: (put(path, value), rf"{path} is .+, by its configuration it is ") for name, (path, value) in BAD_GEOMETRY.items()},
    "a kernel that the weights do not have": (
        put("conv_in.weight", lambda _: parameter(16, 2, 1, 1)),
        r"conv_in.weight is of shape \(16, 2, 1, 1\), ",
    ),
    # The geometry has to suit the place.
    "a strided last convolution without padding": (put("conv_out", lambda _: nn.Conv2d(16, 3, 3, 2)), "conv_out"),
    "an upsampler with a 1x1 convolution": (
        put("up_blocks.0.upsamplers.0.conv", lambda _: nn.Conv2d(48, 48, 1)),
        "up_blocks.0.upsamplers.0",
    ),
    "an upsampler with a strided convolution": (
        put("up_blocks.0.upsamplers.0.conv", lambda _: nn.Conv2d(48, 48, 3, 2, 1)),
        "up_blocks.0.upsamplers.0",
    ),
    "a downsampler that pads otherwise": (
        put("down_blocks.0.downsamplers.0.asymmetric", True),
        "down_blocks.0.downsamplers.0",
    ),
    "an upsampler on the way down": (put("down_blocks.0.downsamplers.0", lambda _: Upsample(16)), "down_blocks.0.downsamplers"),
    "a downsampler on the way up": (put("up_blocks.0.upsamplers.0", lambda _: Downsample(48, 1)), "up_blocks.0.upsamplers"),
    "several upsamplers": (
        lambda model: model.up_blocks[0].upsamplers.extend([Downsample(48, 1), Upsample(48)]),
        "up_blocks.0.upsamplers.1 is a layer of class Downsample, by its configuration it is missing",
    ),
    "another kind of layer in a place": (put("conv_in", lambda _: nn.Linear(2, 2)), "conv_in"),
    "a block in another's place": (lambda model: setattr(model, "mid_block", model.down_blocks[2]), "mid_block"),
    # Shapes within a layer.
    "a norm's weight": (put(f"{MID}.norm1.weight", lambda _: parameter(40)), rf"{MID}.norm1.(weight|bias) is of shape"),
    "a norm's bias": (put(f"{MID}.norm1.bias", lambda _: parameter(40)), rf"{MID}.norm1.(weight|bias) is of shape"),
    "a number of groups": (put("conv_norm_out.num_groups", 3), "conv_norm_out.num_groups is 3, "),
    "no groups": (put("conv_norm_out.num_groups", 0), "conv_norm_out.num_groups is 0, "),
    "a convolution's bias": (
        put("conv_out.bias", lambda _: parameter(4)),
        r"conv_out.bias is of shape \(4,\), ",
    ),
    "a linear layer's bias": (put(f"{ATTENTION}.to_v.bias", lambda _: parameter(4)), f"{ATTENTION}.to_v.bias is of shape"),
    # Shapes within a block.
    "the stride of conv1": (put(f"{MID}.conv1.stride", (2, 2)), rf"{MID}\.[\w.]+ is "),
    "conv1": (put(f"{MID}.conv1", lambda _: Conv3x3(40, 48, 3, padding=1)), rf"{MID}\.[\w.]+ is "),
    "conv2": (put(f"{MID}.conv2", lambda _: Conv3x3(48, 40, 3, padding=1)), rf"{MID}\.[\w.]+ is "),
    "norm2": (put(f"{MID}.norm2", lambda _: GroupNormSiLU(8, 40, 1e-5)), rf"{MID}\.[\w.]+ is "),
    "a shortcut": (
        put("up_blocks.0.resnets.0.conv_shortcut", lambda _: nn.Conv2d(48, 48, 1)),
        r"up_blocks.0.resnets.0.conv_shortcut\b",
    ),
    "a missing shortcut": (
        put("up_blocks.0.resnets.0.conv_shortcut", None),
        r"up_blocks.0.resnets.0.conv_shortcut\b",
    ),
    "a time projection's outputs": (
        put(f"{MID}.time_emb_proj", lambda _: nn.Linear(64, 40)),
        f"{MID}.time_emb_proj.(in|out)_features is ",
    ),
    "a time projection's inputs": (
        put(f"{MID}.time_emb_proj", lambda _: nn.Linear(60, 48)),
        f"{MID}.time_emb_proj.(in|out)_features is ",
    ),
    "scale and shift": (put(f"{MID}.scale_shift", True), rf"{MID}\.[\w.]+ is "),
    "the time embedding": (
        put("time_embedding.linear_2", lambda _: nn.Linear(60, 64)),
        "time_embedding.linear_..(in|out)_features is ",
    ),
    "the sinusoids": (
        put("time_embedding.linear_1", lambda _: nn.Linear(20, 64)),
        "time_embedding.linear_..(in|out)_features is ",
    ),
    "projections": (put(f"{ATTENTION}.to_k", lambda _: nn.Linear(48, 24)), f"{ATTENTION}.to_k.out_features is 24, "),
    "the attention's norm": (
        put(f"{ATTENTION}.group_norm", lambda _: GroupNormSiLU(8, 40, 1e-5)),
        f"{ATTENTION}.group_norm.num_channels is 40, ",
    ),
    # Shapes of neighbours.
    "conv_in's outputs": (put("conv_in", lambda _: Conv3x3(2, 24, 3, padding=1)), ""),
    "conv_in's inputs": (put("conv_in", lambda _: Conv3x3(3, 16, 3, padding=1)), ""),
    "conv_out's inputs": (put("conv_out", lambda _: Conv3x3(24, 3, 3, padding=1)), ""),
    "conv_out's outputs": (put("conv_out", lambda _: Conv3x3(16, 4, 3, padding=1)), ""),
    "the last norm": (put("conv_norm_out", lambda _: GroupNormSiLU(8, 24, 1e-5)), ""),
    "a downsampler": (put("down_blocks.0.downsamplers.0.conv", lambda _: nn.Conv2d(24, 24, 3, 2, 1)), ""),
    "an upsampler": (put("up_blocks.0.upsamplers.0.conv", lambda _: Conv3x3(24, 24, 3, padding=1)), ""),
    "an attention": (
        lambda model: model.mid_block.attentions.__setitem__(0, Attention(24, head_dim=8, num_groups=8, eps=1e-5)),
        "",
    ),
    "a residual block": (lambda model: model.mid_block.resnets.__setitem__(0, resnet(48, 32)), ""),
    "a residual block that reads a skip connection": (
        lambda model: model.up_blocks[0].resnets.__setitem__(0, resnet(80, 48)),
        "",
    ),
    "a missing residual block": (lambda model: model.up_blocks[0].resnets.__delitem__(0), ""),
    "a missing downsampler": (lambda model: model.down_blocks[0].downsamplers.__delitem__(0), ""),
    # Values.
    "heads that do not divide": (put(f"{ATTENTION}.num_heads", 5), f"{ATTENTION}.num_heads is 5, "),
    "no heads": (put(f"{ATTENTION}.num_heads", 0), f"{ATTENTION}.num_heads is 0, "),
    "a factor of 0": (put(f"{MID}.output_scale_factor", 0.0), f"{MID}.output_scale_factor is 0.0, "),
    "an attention's factor of 0": (put(f"{ATTENTION}.output_scale_factor", 0), f"{ATTENTION}.output_scale_factor is 0, "),
    "a factor that is a tensor": (
        put(f"{MID}.output_scale_factor", lambda _: torch.tensor(2.0)),
        rf"{MID}.output_scale_factor is tensor",
    ),
    "an activation": (put("conv_norm_out.activation", "gelu"), "conv_norm_out.activation is 'gelu', "),
    "a negative eps": (put("conv_norm_out.eps", -1.0), "conv_norm_out"),
    "a resampling": (put(f"{MID}.resample", "left"), f"{MID}.resample is 'left', "),
    # Parameters.
    "a meta parameter": (
        put("conv_out.weight", lambda old: nn.Parameter(old.to("meta"))),
        "conv_out.weight is on the meta",
    ),
    "a sparse parameter": (
        put(f"{ATTENTION}.to_q.weight", lambda old: nn.Parameter(old.detach().to_sparse())),
        rf"{ATTENTION}.to_q.weight is a Parameter of torch.float32 and torch.sparse_coo",
    ),
    "an integer parameter": (
        put("conv_out.weight", lambda old: nn.Parameter(old.detach().to(torch.int8), requires_grad=False)),
        "conv_out.weight is a Parameter of torch.int8",
    ),
    "a parameter of another class": (
        put("conv_out.weight", lambda old: nn.Parameter(old.detach().as_subclass(Subclass))),
        "conv_out.weight is a Subclass",
    ),
    "a missing weight": (put("conv_out.weight", None), "conv_out"),
    # Classes.
    "renormalized embeddings": (
        put("class_embedding.max_norm", 1.0),
        "class_embedding.max_norm is 1.0, by its configuration it is None",
        CLASSES,
    ),
    "a number of classes": (
        put("class_embedding", lambda _: nn.Embedding(12, 64)),
        "class_embedding.num_embeddings is 12, ",
        CLASSES,
    ),
    "a width of classes": (
        put("class_embedding", lambda _: nn.Embedding(11, 60)),
        "class_embedding.embedding_dim is 60, ",
        CLASSES,
    ),
    "missing classes": (
        put("class_embedding", None),
        "class_embedding is missing, by its configuration it is a layer of class Embedding",
        CLASSES,
    ),
    "unexpected classes": (
        put("class_embedding", lambda _: nn.Embedding(11, 64)),
        "class_embedding is a layer of class Embedding, by its configuration it is missing",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_reasons_name_the_layer(name: str) -> None:
    change, reason, *options = REFUSALS[name]
    model, _ = make_unet(layers_per_block=1, **(options[0] if options else {}))
    assert why_not_frozen(model) is None
    change(model)
    assert why_not_frozen(model) is not None  # a kernel might read past its memory: do not freeze it
    with pytest.raises(TypeError, match=f"^freeze: expected a UNet with its own layers, got one where {reason}"):
        freeze(model)


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_global_hooks_are_a_reason(register: str) -> None:
    model, _ = make_unet()
    with getattr(nn.modules.module, register)(lambda *_: None):
        assert why_not_frozen(model) == "torch's global hooks are called for every layer (torch.nn.modules.module)"
    assert why_not_frozen(model) is None


def test_only_this_class_is_frozen() -> None:
    _, config = make_unet()
    assert why_not_frozen(OtherUNet(**config)) == "the model is a OtherUNet"
    assert why_not_frozen(nn.Identity()) == "the model is a Identity"


PATCHES = [
    (Conv3x3, "forward"),
    (nn.Linear, "forward"),
    *((nn.Conv2d, name) for name in ("forward", "_conv_forward", "__init__")),
]


@pytest.mark.parametrize(("kind", "method"), PATCHES)
def test_a_class_that_is_patched_is_named(kind: type, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new network has the same patch, so a comparison with it would not show that. Seamless textures take such patches."""
    original = getattr(kind, method)
    patch = functools.wraps(original)(lambda *arguments, **options: original(*arguments, **options))
    monkeypatch.setattr(kind, method, patch)
    model, _ = make_unet(layers_per_block=1)
    with pytest.raises(TypeError, match=rf"got one where \w+\.{method} is patched by test_network"):
        freeze(model)
