"""`freeze`: the inference form has the model's outputs in every mode of torch, and it never changes."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from kernel_calls import defaulting_to, with_threads
from refusals import by, refused
from small_unets import VARIANTS, assert_as_right, make_inputs, make_unet, relative_error
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from ddpm_fast import FrozenUNet, freeze
from ddpm_fast.errors import ArgumentError, InvalidType, InvalidValue
from ddpm_fast.inference import frozen as frozen_module
from ddpm_fast.inference.frozen import MAX_PROGRAMS, sampling_dtype
from ddpm_fast.nn import UNet
from ddpm_fast.ops import backend

# float64 has no CPU kernels: PyTorch computes it.
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def make(variant: str, dtype: torch.dtype, n: int = 2) -> tuple[UNet, FrozenUNet, tuple[Tensor, Tensor, Tensor | None]]:
    """Return a network, its inference form and inputs."""
    model, config = make_unet(variant)
    return model, freeze(model, dtype), make_inputs(config, n)


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_are_those_of_the_model(variant: str, device: torch.device) -> None:
    model, config = make_unet(variant, dropout=0.1)
    inputs = [x if x is None else x.to(device) for x in make_inputs(config, 3)]
    model = model.to(device).train()  # freezing removes dropout
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        out = freeze(model, dtype)(*inputs)
        assert out.dtype == dtype
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert_as_right(out, model, *inputs)


@pytest.mark.parametrize(("own", "dtype"), [(torch.float32, torch.bfloat16), (torch.float64, torch.float64)], ids=str)
def test_the_model_is_left_as_it_was_and_later_changes_of_it_have_no_effect(own: torch.dtype, dtype: torch.dtype) -> None:
    model, config = make_unet(dropout=0.1)
    model.to(own).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen, unused = freeze(model, dtype), freeze(model, dtype)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    inputs = make_inputs(config, 2)
    out, between = frozen(*inputs), frozen(inputs[0], 500.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.conv_norm_out.eps = 1.0
    model.config["out_channels"] = 1
    assert torch.equal(frozen(*inputs), out)
    assert torch.equal(frozen(inputs[0], 500.5), between)
    assert torch.equal(unused(*inputs), out)  # packs its weights only now
    assert unused.config["out_channels"] == 3


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64], ids=["UNet", "float32", "float64"])
@torch.no_grad()
def test_timesteps_may_be_an_int_a_scalar_or_one_per_sample(dtype: torch.dtype | None) -> None:
    model, config = make_unet()
    network = model if dtype is None else freeze(model, dtype, num_timesteps=10)
    x, _, _ = make_inputs(config, 2)
    expected = network(x, torch.tensor([9, 9]))
    integers = [torch.tensor([9, 9], dtype=each) for each in (torch.int8, torch.uint8, torch.int16, torch.int32)]
    for t in (9, torch.tensor(9), *integers):
        assert torch.equal(network(x, t), expected)
    assert not torch.allclose(network(x, torch.tensor([9, 8])), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["heads", "class-conditional", "scale-shift"])
def test_timesteps_may_lie_between_integers(variant: str, dtype: torch.dtype) -> None:
    """Their terms are computed, and as right as the model's. Programs of the looked up terms serve them too."""
    model, frozen, (x, t, labels) = make(variant, dtype)
    looked_up = frozen(x, t, labels)
    for between in (torch.tensor([0.25, 700.5]), t.float()):
        assert_as_right(frozen(x, between, labels), model, x, between, labels)
    assert torch.equal(frozen(x, 700.5, labels), frozen(x, torch.tensor([700.5, 700.5]), labels))
    assert torch.equal(frozen(x, t, labels), looked_up)
    with refused(by("FrozenUNet", InvalidValue("t", "to be at least 0 and finite", "-0.5"))):
        frozen(x, -0.5, labels)


def test_the_number_of_timesteps_is_that_of_the_config_or_named() -> None:
    for configured, named, wanted in ((None, None, 1000), (50, None, 50), (50, 60, 60)):
        assert freeze(make_unet(num_train_timesteps=configured)[0], num_timesteps=named).num_timesteps == wanted


def test_a_dtype_and_a_device_are_those_of_the_model_or_named() -> None:
    model, config = make_unet()
    inputs = make_inputs(config, 2)
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float32):
        frozen = freeze(copy.deepcopy(model).to(dtype))
        assert frozen.dtype == frozen(*inputs).dtype == dtype
    assert frozen.device == torch.device("cpu")
    for name in ("cpu", "cpu:0"):
        assert torch.equal(freeze(model, device=name)(*inputs), frozen(*inputs))


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_float32_becomes_half_precision_on_a_gpu_alone(has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16 or including_emulation)
    # Also where a CPU multiplies faster in bfloat16.
    monkeypatch.setattr(backend, "BUILD", backend.BUILD | {"isa": "avx512_bf16", "processor": "AuthenticAMD 26"})
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):  # the user chose the others
        half = torch.bfloat16 if has_bfloat16 else torch.float16
        assert sampling_dtype(dtype, torch.device("cuda", 0)) == (half if dtype == torch.float32 else dtype)
        assert sampling_dtype(dtype, torch.device("cpu")) == dtype


@BOTH
def test_an_empty_batch_gives_an_empty_batch(dtype: torch.dtype) -> None:
    model, config = make_unet("class-conditional", attention_head_dim=4)
    x, t, labels = make_inputs(config, 2)
    assert labels is not None
    for network in (model.to(dtype), freeze(model, dtype)):
        out = network(x[:0], t[:0], labels[:0])
        assert (out.shape, out.dtype) == ((0, 3, 16, 16), dtype)
    assert network(x[:, :, :0], t, labels).shape == (2, 3, 0, 16)


@BOTH
@pytest.mark.parametrize("variant", ["heads", "class-conditional"])
def test_a_large_batch_is_computed_in_parts(variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    _, frozen, inputs = make(variant, dtype, 7)
    whole = frozen(*inputs)
    monkeypatch.setattr(frozen_module, "_CACHED_BYTES", 3 * whole[0, 0].numel() * 16 * dtype.itemsize)
    parts = [[x if x is None else x[part] for x in inputs] for part in (slice(3), slice(3, 6), slice(6, 7))]
    expected = torch.cat([frozen(*part) for part in parts])
    out = frozen(*inputs)
    assert torch.equal(out, expected)
    assert relative_error(out, whole) <= (1e-14 if dtype == torch.float64 else 1e-6)
    assert out.is_contiguous(memory_format=torch.channels_last)


@BOTH
def test_sizes_may_change(dtype: torch.dtype) -> None:
    model, frozen, _ = make("resampling", dtype)
    for height, width in ((16, 16), (4, 12), (20, 8), (4, 4)):
        x, t = torch.randn(2, 2, height, width), torch.tensor([1, 2])
        for layout in (torch.contiguous_format, torch.channels_last):
            assert_as_right(frozen(x.contiguous(memory_format=layout), t), model, x, t)
        wide = torch.randn(2, 5, height, 2 * width).bfloat16()
        strided = wide[:, 1:3, :, ::2]  # neither contiguous nor channels_last, another dtype
        assert torch.equal(frozen(strided, t), frozen(strided.to(dtype).contiguous(), t))


# -------------------------------------------------------------------------------------------------------- modes of torch


@BOTH
@pytest.mark.parametrize(
    "context",
    [
        *(lambda: defaulting_to(torch.bfloat16), lambda: defaulting_to(torch.float64)),
        *(lambda: torch.device("meta"), lambda: torch.autocast("cpu", torch.bfloat16)),
    ],
    ids=["bfloat16", "float64", "meta", "autocast"],
)
def test_autocast_and_the_default_dtype_and_device_have_no_effect(
    context: Callable[[], AbstractContextManager[Any]], dtype: torch.dtype
) -> None:
    model, frozen, inputs = make("class-conditional", dtype)
    other_inputs = make("class-conditional", dtype, 3)[2]
    expected, other = frozen(*inputs), frozen(*other_inputs)
    with context():
        made = freeze(model, dtype)
        assert torch.equal(frozen(*inputs), expected)
        assert torch.equal(made(*inputs), expected)  # a new program
        assert torch.equal(frozen(inputs[0], 7, inputs[2]), made(inputs[0], torch.tensor(7, device="cpu"), inputs[2]))
    assert torch.equal(made(*other_inputs), other)


@BOTH
@pytest.mark.parametrize("first", [True, False], ids=["inference mode first", "inference mode second"])
@pytest.mark.parametrize("variant", ["class-conditional", "one-head-asymmetric"])
def test_inference_mode_and_ordinary_mode_take_turns(variant: str, first: bool, dtype: torch.dtype) -> None:
    model, config = make_unet(variant)
    inputs = make_inputs(config, 2)
    expected = freeze(model, dtype)(*inputs)
    with torch.inference_mode(first):
        network = freeze(model, dtype)
    for mode in (first, not first, first):
        with torch.inference_mode(mode):
            out = network(*inputs)
        assert out.is_inference() == mode
        assert torch.equal(out, expected)


@BOTH
def test_results_share_no_memory(dtype: torch.dtype) -> None:
    _, frozen, (x, t, _) = make("heads", dtype, 6)
    outs, copies = [], []
    for part in (slice(0, 2), slice(2, 4), slice(0, 2), slice(5, 6), slice(4, 6)):
        outs.append(frozen(x[part], t[part]))
        copies.append(outs[-1].clone())
    assert len({out.untyped_storage().data_ptr() for out in outs}) == len(outs)
    assert all(map(torch.equal, outs, copies))
    assert torch.equal(outs[0], outs[2])


@BOTH
def test_freezing_and_calling_leave_the_generator_and_the_input_as_they_were(dtype: torch.dtype) -> None:
    model, config = make_unet(dropout=0.1)
    x, t, _ = make_inputs(config, 2, dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    before, state = x.detach().clone(), torch.get_rng_state()
    with torch.no_grad():
        assert not freeze(model, dtype)(x, t).requires_grad
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="FrozenUNet: expected x to record no gradients, got one that does: call the UNet"):
        freeze(model, dtype)(x, t)


# The last has weights of more than a megabyte. Two levels have every kind of layer, and compile in half the time of three.
@pytest.mark.parametrize(
    ("variant", "channels"),
    [
        ("resampling", [16, 32]),
        pytest.param("class-conditional", [16, 32], marks=pytest.mark.slow),
        pytest.param("heads", [16, 192], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiles_as_one_graph(variant: str, channels: list[int]) -> None:
    torch._dynamo.reset()
    blocks = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    blocks = {name: VARIANTS[variant].get(name, types)[:2] for name, types in blocks.items()}
    model, config = make_unet(variant, block_out_channels=channels, layers_per_block=1, **blocks)
    frozen, inputs = freeze(model, torch.float32), make_inputs(config, 2)
    compiled = torch.compile(frozen, fullgraph=True, backend="eager")
    out = compiled(*inputs)  # before a call in eager mode packs any weights
    assert torch.equal(out, frozen(*inputs))
    assert torch.equal(compiled(*inputs), out)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.usefixtures("no_matrix_kernels")
def test_a_dynamic_graph_of_pytorchs_layers_serves_any_batch(dtype: torch.dtype) -> None:
    """GPUs use these layers. Sizes of weights have to stay constants: symbolic ones nest, and compiling takes hours."""
    torch._dynamo.reset()
    blocks = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    model, config = make_unet(block_out_channels=[16, 32], **blocks)
    frozen, counter = freeze(model, dtype), CompileCounter()
    compiled = torch.compile(frozen, fullgraph=True, dynamic=True, backend=counter)
    for n in (2, 3, 5):
        inputs = make_inputs(config, n)
        torch.testing.assert_close(compiled(*inputs), frozen(*inputs))
    assert counter.frame_count <= 2  # 2 is also the number of channels, which is a constant


# ---------------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["resampling-scale-shift", "class-conditional"])
@pytest.mark.usefixtures("matrix_kernels")
def test_the_number_of_threads_changes_no_bit(variant: str, dtype: torch.dtype) -> None:
    model, frozen, inputs = make(variant, dtype, 3)
    if frozen.why_not_packed is not None:
        pytest.skip(frozen.why_not_packed)
    outs = [with_threads(count, lambda: [frozen(*inputs), freeze(model, dtype)(*inputs)]) for count in (1, 2, 3, 8)]
    assert all(torch.equal(out, outs[0][0]) for pair in outs for out in pair)


@BOTH
@pytest.mark.parametrize("batches", [(2, 2), (2, 3, 2, 1)], ids=["two threads", "four threads"])
def test_python_threads_may_call_at_once(batches: tuple[int, ...], dtype: torch.dtype) -> None:
    model, config = make_unet()
    frozen = freeze(model, dtype)
    jobs = [(x + i, t) for i, (x, t, _) in enumerate(make_inputs(config, n) for n in batches)]
    gate = threading.Barrier(len(jobs))
    # The sums of PyTorch's convolutions may depend on the number of threads.
    expected = with_threads(1, lambda: [freeze(model, dtype)(*inputs) for inputs in jobs])

    def is_right(i: int) -> bool:
        gate.wait()
        return all(torch.equal(frozen(*jobs[i]), expected[i]) for _ in range(15))

    with ThreadPoolExecutor(len(jobs), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        assert all(with_threads(1, lambda: list(pool.map(is_right, range(len(jobs))))))


@BOTH
def test_few_programs_are_kept(dtype: torch.dtype) -> None:
    model, config = make_unet()
    frozen = freeze(model, dtype)
    for n in (*range(1, MAX_PROGRAMS + 3), 1):
        inputs = make_inputs(config, n)
        out, programs = frozen(*inputs), list(frozen._programs.values())
        assert len(programs) <= MAX_PROGRAMS
        assert torch.equal(frozen(*inputs), out)
        assert list(frozen._programs.values()) == programs  # a shape that is known needs no other program


# ------------------------------------------------------------------------------------------------------------ it is immutable


@pytest.mark.parametrize("name", ["dtype", "num_timesteps", "config", "new"])
def test_attributes_cannot_be_set(name: str) -> None:
    frozen = freeze(make_unet()[0])
    with pytest.raises(
        AttributeError, match=f"FrozenUNet: {name} cannot be set, because it is immutable: freeze the model again"
    ):
        setattr(frozen, name, None)
    with pytest.raises(TypeError, match="does not support item assignment"):
        frozen.config["in_channels"] = 1  # type: ignore[index]


METHODS = (
    *(
        "to",
        "half",
        "float",
        "double",
        "bfloat16",
        "type",
        "cpu",
        "cuda",
        "to_empty",
        "load_state_dict",
        "state_dict",
        "training",
    ),
    *("parameters", "named_parameters", "buffers", "modules", "children", "apply", "train", "eval", "requires_grad_"),
    *("zero_grad", "register_forward_hook", "register_forward_pre_hook", "register_buffer", "add_module", "compile", "forward"),
    *("set_submodule", "share_memory", "get_parameter"),
)


@pytest.mark.parametrize("name", [*METHODS, "conv_in"])
def test_methods_of_a_module_are_refused_with_advice_and_other_names_without(name: str) -> None:
    advice = ": .* change or save the UNet, then freeze it again$" if hasattr(nn.Module(), name) else "$"
    assert (advice == "$") == (name == "conv_in")
    with pytest.raises(AttributeError, match=f"^'FrozenUNet' object has no attribute '{name}'{advice}"):
        getattr(freeze(make_unet()[0]), name)


def test_a_copy_is_the_network_itself() -> None:
    frozen = freeze(make_unet()[0])
    holder = nn.Module()
    holder.network = frozen  # type: ignore[assignment]
    for twin in (copy.copy(frozen), copy.deepcopy(frozen), copy.deepcopy(holder).network, copy.deepcopy([frozen])[0]):
        assert twin is frozen


@pytest.mark.parametrize(
    "save", [pickle.dumps, lambda network: torch.save(network, io.BytesIO())], ids=["pickle", "torch.save"]
)
def test_pickling_is_refused(save: Callable[[FrozenUNet], object]) -> None:
    with pytest.raises(
        TypeError, match=r"it cannot be pickled: save the UNet \(save_pretrained\), load it and freeze it again"
    ):
        save(freeze(make_unet()[0], torch.float32))


# ------------------------------------------------------------------------------------------------------------------ errors


KINDS = (
    "to be a ddpm_fast.UNet, a network or pipeline of diffusers, a UNetModel of guided-diffusion, or a "
    "GaussianDiffusion of denoising-diffusion-pytorch"
)
DTYPES = "to be float32, float64, float16, bfloat16 or None"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"x": nn.Conv2d(1, 1, 1)}, by("freeze", InvalidType("x", KINDS, "a Conv2d"))),
        ({"dtype": torch.int8}, by("freeze", InvalidType("dtype", DTYPES, "torch.int8"))),
        ({"dtype": "bfloat16"}, by("freeze", InvalidType("dtype", DTYPES, "'bfloat16'"))),
        ({"num_timesteps": -1}, by("freeze", InvalidValue("num_timesteps", "to be an integer in 1..100000 or None", "-1"))),
        ({"num_timesteps": True}, by("freeze", InvalidType("num_timesteps", "to be an integer in 1..100000 or None", "True"))),
        ({"device": "nowhere"}, by("freeze", InvalidValue("device", "to be a torch.device or its name", "'nowhere'"))),
    ],
)
def test_bad_arguments_of_freeze_are_named(changes: dict[str, Any], error: ArgumentError) -> None:
    with refused(error):
        freeze(**{"x": make_unet()[0]} | changes)


@BOTH
def test_bad_arguments_of_a_call_are_named(dtype: torch.dtype) -> None:
    model, config = make_unet()
    plain, classed = freeze(model, dtype, num_timesteps=10), make("class-conditional", dtype)[1]
    x, t, _ = make_inputs(config, 2)
    on_cpu = "meta: freeze the model for that device"
    for network, arguments, error in (
        (plain, (x, 10), by("FrozenUNet", InvalidValue("t", "in 0..9", "10"))),
        (plain, (x, -1), by("FrozenUNet", InvalidValue("t", "in 0..9", "-1"))),
        (plain, (x, torch.tensor([0, 10])), by("FrozenUNet", InvalidValue("t", "in 0..9", "values from 0 to 10"))),
        (plain, (x, torch.tensor([0, -1])), by("FrozenUNet", InvalidValue("t", "in 0..9", "values from -1 to 0"))),
        (plain, (x, t > 3), by("FrozenUNet", InvalidType("t", "to be numbers", "torch.bool"))),
        (plain, ([1], 1), by("FrozenUNet", InvalidType("x", "to be a tensor", "list"))),
        (plain, (x, 1, t), by("FrozenUNet", InvalidValue("class_labels", "to be None (num_class_embeds is None)", "a Tensor"))),
        (plain, (x[..., :3], 1), by("FrozenUNet", InvalidValue("x", "to have H and W that are multiples of 4", "16x3"))),
        (plain, (x.to("meta"), 1), by("FrozenUNet", InvalidValue("x", "on cpu", on_cpu))),
        (
            classed,
            (x, 1, torch.tensor([0, 11])),
            by("FrozenUNet", InvalidValue("class_labels", "in 0..10", "values from 0 to 11")),
        ),
    ):
        with refused(error):
            network(*arguments)


@pytest.mark.parametrize("name", ["x", "t", "class_labels"])
def test_tensors_of_transforms_are_named(name: str) -> None:
    model, config = make_unet("class-conditional")
    inputs = dict(zip(("x", "t", "class_labels"), make_inputs(config, 2), strict=True))
    frozen, batched = freeze(model, torch.float32), torch.stack([inputs[name]] * 3)
    with pytest.raises(
        TypeError, match=rf"^FrozenUNet: expected {name} outside of torch\.func transforms, got a tensor of one"
    ):
        torch.vmap(lambda value: frozen(**inputs | {name: value}))(batched)
