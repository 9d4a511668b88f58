"""`freeze`: the inference form has the model's outputs in every mode of torch, and it never changes."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from kernel_calls import defaulting_to
from refusals import refused
from small_unets import VARIANTS, make_inputs, make_unet, relative_error
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from ddpm_fast import FrozenUNet, NoiseSchedule, ddim_plan, freeze, sample
from ddpm_fast.errors import InvalidType, InvalidValue
from ddpm_fast.inference import frozen as frozen_module
from ddpm_fast.inference.frozen import MAX_PROGRAMS, sampling_dtype
from ddpm_fast.inference.pytorch_layers import PyTorchLayers
from ddpm_fast.nn import UNet
from ddpm_fast.ops import backend

# float64 has no CPU kernels: PyTorch computes it.
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_are_those_of_the_model(variant: str, device: torch.device) -> None:
    model, config = make_unet(variant, dropout=0.1)
    inputs = [x if x is None else x.to(device) for x in make_inputs(config, 3)]
    model = model.to(device)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(*inputs)
        # A wrong constant or a lost term cannot hide in float64's rounding.
        assert relative_error(freeze(model, torch.float64)(*inputs), exact) <= 1e-13
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            allowed = relative_error(copy.deepcopy(model).to(dtype)(*inputs), exact)
            out = freeze(model.train(), dtype)(*inputs)  # freezing removes dropout
            assert out.dtype == dtype
            assert out.is_contiguous(memory_format=torch.channels_last)
            assert relative_error(out, exact) <= 2 * allowed
            model.eval()


def test_the_model_is_left_as_it_was_and_later_changes_of_it_have_no_effect() -> None:
    model, config = make_unet(dropout=0.1)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen, unused = freeze(model, torch.bfloat16), freeze(model, torch.bfloat16)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    inputs = make_inputs(config, 2)
    out = frozen(*inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.conv_norm_out.eps = 1.0
    model.config["out_channels"] = 1
    assert torch.equal(frozen(*inputs), out)
    assert torch.equal(unused(*inputs), out)  # packs its weights only now
    assert unused.config["out_channels"] == 3


@BOTH
def test_there_are_no_gradients_and_the_input_is_only_read(dtype: torch.dtype) -> None:
    model, config = make_unet()
    frozen = freeze(model, dtype)
    x, t, _ = make_inputs(config, 2, dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    before = x.detach().clone()
    assert not frozen(x, t).requires_grad
    assert torch.equal(x, before)


@BOTH
def test_timesteps_may_be_an_int_a_scalar_or_one_per_sample(dtype: torch.dtype) -> None:
    model, config = make_unet()
    frozen = freeze(model, dtype, num_timesteps=10)
    x, _, _ = make_inputs(config, 2)
    expected = frozen(x, torch.tensor([9, 9]))
    assert torch.equal(frozen(x, 9), expected)
    assert torch.equal(frozen(x, torch.tensor(9)), expected)
    assert torch.equal(frozen(x, torch.tensor([9, 9], dtype=torch.int32)), expected)
    assert not torch.allclose(frozen(x, torch.tensor([9, 8])), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16], ids=str)
def test_timesteps_may_be_any_integers(dtype: torch.dtype) -> None:
    model, config = make_unet()
    frozen, (x, _, _) = freeze(model, torch.float32), make_inputs(config, 2)
    t = torch.tensor([100, 7])
    assert torch.equal(frozen(x, t.to(dtype)), frozen(x, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["heads", "class-conditional", "scale-shift"])
@torch.no_grad()
def test_timesteps_may_lie_between_integers(variant: str, dtype: torch.dtype) -> None:
    """Their terms are computed, and as right as the model's. Programs of the looked up terms serve them too."""
    model, config = make_unet(variant)
    x, t, labels = make_inputs(config, 2)
    between = torch.tensor([0.25, 700.5])
    frozen = freeze(model, dtype)
    looked_up = frozen(x, t, labels)
    exact = copy.deepcopy(model).double()(x.double(), between, labels)
    allowed = relative_error(copy.deepcopy(model).to(dtype)(x.to(dtype), between, labels), exact)
    assert relative_error(frozen(x, between, labels), exact) <= 2 * allowed
    assert relative_error(frozen(x, 700.5, labels)[1:], exact[1:]) <= 3 * allowed
    assert relative_error(frozen(x, t.float(), labels), looked_up) <= 2 * allowed
    assert torch.equal(frozen(x, t, labels), looked_up)
    with pytest.raises(ValueError, match=r"FrozenUNet: expected t to be at least 0 and finite, got -0\.5"):
        frozen(x, -0.5, labels)


def test_the_number_of_timesteps_is_that_of_the_config() -> None:
    assert freeze(make_unet()[0]).num_timesteps == 1000
    model, _ = make_unet(num_train_timesteps=50)
    assert freeze(model).num_timesteps == 50
    assert freeze(model, num_timesteps=60).num_timesteps == 60


def test_a_dtype_and_a_device_are_those_of_the_model_or_named() -> None:
    model, config = make_unet()
    inputs = make_inputs(config, 2)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        frozen = freeze(copy.deepcopy(model).to(dtype))
        assert frozen.dtype == frozen(*inputs).dtype == dtype
    assert freeze(model).dtype == torch.float32
    assert freeze(model).device == torch.device("cpu")
    for name in ("cpu", "cpu:0"):
        frozen = freeze(model, torch.float32, device=name)
        assert torch.equal(frozen(*inputs), freeze(model, torch.float32)(*inputs))


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_float32_becomes_half_precision_on_a_gpu_alone(has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16 or including_emulation)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert sampling_dtype(torch.float32, gpu) == (torch.bfloat16 if has_bfloat16 else torch.float16)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):  # the user chose it
        assert sampling_dtype(dtype, gpu) == dtype
    # Also where a CPU multiplies faster in bfloat16.
    monkeypatch.setattr(backend, "BUILD", backend.BUILD | {"isa": "avx512_bf16", "processor": "AuthenticAMD 26"})
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        assert sampling_dtype(dtype, cpu) == dtype


@BOTH
def test_an_empty_batch_gives_an_empty_batch(dtype: torch.dtype) -> None:
    model, config = make_unet("class-conditional")
    frozen, (x, t, labels) = freeze(model, dtype), make_inputs(config, 2)
    assert labels is not None
    out = frozen(x[:0], t[:0], labels[:0])
    assert (out.shape, out.dtype) == ((0, 3, 16, 16), dtype)
    assert frozen(x[:, :, :0], t, labels).shape == (2, 3, 0, 16)


@BOTH
@pytest.mark.parametrize("variant", ["heads", "class-conditional"])
def test_a_large_batch_is_computed_in_parts(variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = make_unet(variant)
    frozen, inputs = freeze(model, dtype), make_inputs(config, 7)
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
    model, config = make_unet("resampling")
    frozen = freeze(model, dtype)
    for height, width in ((16, 16), (4, 12), (20, 8), (4, 4)):
        x, t = torch.randn(2, config["in_channels"], height, width), torch.tensor([1, 2])
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(x, t)
            allowed = 1e-13 if dtype == torch.float64 else 2 * relative_error(model(x, t), exact)
        for layout in (torch.contiguous_format, torch.channels_last):
            assert relative_error(frozen(x.contiguous(memory_format=layout), t), exact) <= allowed
        wide = torch.randn(2, 5, height, 2 * width).bfloat16()
        strided = wide[:, 1 : 1 + config["in_channels"], :, ::2]  # neither contiguous nor channels_last, another dtype
        assert torch.equal(frozen(strided, t), frozen(strided.to(dtype).contiguous(), t))


# -------------------------------------------------------------------------------------------------------- modes of torch


def test_autocast_has_no_effect() -> None:
    model, config = make_unet("class-conditional")
    frozen, inputs = freeze(model), make_inputs(config, 2)
    expected = frozen(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(*inputs), expected)
        assert torch.equal(freeze(model)(*inputs), expected)


@BOTH
@pytest.mark.parametrize(
    "context", [lambda: defaulting_to(torch.bfloat16), lambda: defaulting_to(torch.float64), lambda: torch.device("meta")]
)
def test_default_dtype_and_device_have_no_effect(
    context: Callable[[], AbstractContextManager[Any]], dtype: torch.dtype
) -> None:
    model, config = make_unet("class-conditional")
    inputs, other_inputs = make_inputs(config, 2), make_inputs(config, 3)
    frozen = freeze(model, dtype)
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
    model, config = make_unet()
    frozen, (x, t, _) = freeze(model, dtype), make_inputs(config, 6)
    outs, copies = [], []
    for part in (slice(0, 2), slice(2, 4), slice(0, 2), slice(5, 6), slice(4, 6)):
        outs.append(frozen(x[part], t[part]))
        copies.append(outs[-1].clone())
    assert len({out.untyped_storage().data_ptr() for out in outs}) == len(outs)
    assert all(map(torch.equal, outs, copies))
    assert torch.equal(outs[0], outs[2])


@BOTH
def test_freezing_and_calling_draw_no_random_numbers(dtype: torch.dtype) -> None:
    model, config = make_unet(dropout=0.1)
    inputs = make_inputs(config, 2)
    before = torch.get_rng_state()
    freeze(model, dtype)(*inputs)
    assert torch.equal(torch.get_rng_state(), before)


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
def test_the_number_of_threads_changes_no_bit(variant: str, dtype: torch.dtype) -> None:
    model, config = make_unet(variant)
    frozen, inputs = freeze(model, dtype), make_inputs(config, 3)
    if frozen.why_not_packed is not None:
        pytest.skip(frozen.why_not_packed)
    outs = []
    for count in (1, 2, 3, 8):
        with num_threads(count):
            outs += [frozen(*inputs), freeze(model, dtype)(*inputs)]
    assert all(torch.equal(out, outs[0]) for out in outs)


@BOTH
@pytest.mark.parametrize("batches", [(2, 2), (2, 3, 2, 1)], ids=["two threads", "four threads"])
def test_python_threads_may_call_at_once(batches: tuple[int, ...], dtype: torch.dtype) -> None:
    model, config = make_unet()
    frozen = freeze(model, dtype)
    jobs = [(x + i, t) for i, (x, t, _) in enumerate(make_inputs(config, n) for n in batches)]
    with num_threads(1):  # the sums of PyTorch's convolutions may depend on it
        expected = [freeze(model, dtype)(*inputs) for inputs in jobs]
    wrong: list[int | BaseException] = []
    gate = threading.Barrier(len(jobs))

    def work(i: int) -> None:
        try:
            torch.set_num_threads(1)
            gate.wait()
            wrong.extend(i for _ in range(15) if not torch.equal(frozen(*jobs[i]), expected[i]))
        except BaseException as error:
            wrong.append(error)

    before = torch.get_num_threads()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(before)
    assert wrong == []


@BOTH
def test_few_programs_are_kept(dtype: torch.dtype) -> None:
    model, config = make_unet()
    frozen = freeze(model, dtype)
    for n in (*range(1, MAX_PROGRAMS + 3), 1):
        inputs = make_inputs(config, n)
        out = frozen(*inputs)
        assert len(frozen._programs) <= MAX_PROGRAMS
        assert torch.equal(frozen(*inputs), out)
    programs = list(frozen._programs.values())
    frozen(*inputs)
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


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_a_module_are_refused(name: str) -> None:
    frozen = freeze(make_unet()[0], torch.float32)
    assert hasattr(nn.Module(), name)
    with pytest.raises(AttributeError, match=rf"no attribute '{name}': .* change or save the UNet, then freeze it again"):
        getattr(frozen, name)
    assert not hasattr(frozen, name)


def test_other_attributes_are_refused_without_advice() -> None:
    frozen = freeze(make_unet()[0], torch.float32)
    with pytest.raises(AttributeError, match=r"^'FrozenUNet' object has no attribute 'conv_in'$"):
        frozen.conv_in  # noqa: B018
    assert not isinstance(frozen, nn.Module)


@BOTH
def test_copies_compute_the_same(dtype: torch.dtype) -> None:
    model, config = make_unet()
    frozen, inputs = freeze(model, dtype), make_inputs(config, 2)
    out = frozen(*inputs)
    holder = nn.Module()
    holder.network = frozen  # type: ignore[assignment]
    for twin in (copy.copy(frozen), copy.deepcopy(frozen), copy.deepcopy(holder).network, copy.deepcopy([frozen])[0]):
        assert isinstance(twin, FrozenUNet)
        assert (twin.dtype, twin.device, twin.num_timesteps) == (dtype, torch.device("cpu"), 1000)
        assert torch.equal(twin(*inputs), out)


@pytest.mark.parametrize(
    "save", [pickle.dumps, lambda network: torch.save(network, io.BytesIO())], ids=["pickle", "torch.save"]
)
def test_pickling_is_refused(save: Callable[[FrozenUNet], object]) -> None:
    with pytest.raises(
        TypeError, match=r"it cannot be pickled: save the UNet \(save_pretrained\), load it and freeze it again"
    ):
        save(freeze(make_unet()[0], torch.float32))


# ------------------------------------------------------------------------------------------------------------------ errors


def test_bad_arguments_of_freeze_are_named() -> None:
    model, _ = make_unet()
    with pytest.raises(
        TypeError, match=r"freeze: expected x to be a ddpm_fast\.UNet, a network or pipeline of diffusers, .* got a Conv2d"
    ):
        freeze(nn.Conv2d(1, 1, 1))
    with pytest.raises(TypeError, match=r"freeze: expected dtype to be float32, .* or None, got torch\.int8"):
        freeze(model, torch.int8)
    with pytest.raises(TypeError, match=r"freeze: expected dtype to be float32, .* or None, got 'bfloat16'"):
        freeze(model, "bfloat16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"freeze: expected num_timesteps to be an integer in 1\.\.100000 or None, got -1"):
        freeze(model, num_timesteps=-1)
    with pytest.raises(TypeError, match=r"freeze: expected num_timesteps to be an integer in 1\.\.100000 or None, got True"):
        freeze(model, num_timesteps=True)
    with pytest.raises(ValueError, match=r"freeze: expected device to be a torch\.device or its name, got 'nowhere'"):
        freeze(model, device="nowhere")


@BOTH
def test_bad_arguments_of_a_call_are_named(dtype: torch.dtype) -> None:
    model, config = make_unet()
    frozen = freeze(model, dtype, num_timesteps=10)
    x, t, _ = make_inputs(config, 2)
    t = t % 10
    for wrong in (10, -1):
        with pytest.raises(ValueError, match=rf"expected t in 0\.\.9, got {wrong}"):
            frozen(x, wrong)
        with pytest.raises(ValueError, match=r"expected t in 0\.\.9, got values from"):
            frozen(x, torch.tensor([0, wrong]))
    with refused(InvalidType("FrozenUNet", "t", "to be numbers", "torch.bool")):
        frozen(x, t > 3)
    with refused(InvalidType("FrozenUNet", "x", "to be a tensor", "list")):
        frozen([1], 1)  # type: ignore[arg-type]
    with refused(InvalidValue("FrozenUNet", "class_labels", "to be None (num_class_embeds is None)", "a Tensor")):
        frozen(x, 1, t)
    with refused(InvalidValue("FrozenUNet", "x", "to have H and W that are multiples of 4", "16x3")):
        frozen(x[..., :3], 1)
    with pytest.raises(ValueError, match="expected x on cpu, got meta: freeze the model for that device"):
        frozen(x.to("meta"), 1)


@pytest.mark.parametrize("name", ["x", "t", "class_labels"])
def test_tensors_of_transforms_are_named(name: str) -> None:
    model, config = make_unet("class-conditional")
    inputs = dict(zip(("x", "t", "class_labels"), make_inputs(config, 2), strict=True))
    frozen, batched = freeze(model, torch.float32), torch.stack([inputs[name]] * 3)
    with pytest.raises(
        TypeError, match=rf"^FrozenUNet: expected {name} outside of torch\.func transforms, got a tensor of one"
    ):
        torch.vmap(lambda value: frozen(**inputs | {name: value}))(batched)


def test_labels_out_of_range_are_named() -> None:
    model, config = make_unet("class-conditional")
    x, t, _ = make_inputs(config, 2)
    for dtype in (torch.float32, torch.float64):
        with refused(InvalidValue("FrozenUNet", "class_labels", "in 0..10", "values from 0 to 11")):
            freeze(model, dtype)(x, t, torch.tensor([0, 11]))


# ---------------------------------------------------------------------------------------------------------------- sampling


def _sampled(model: UNet | FrozenUNet, **options: Any) -> Tensor:
    plan = ddim_plan(NoiseSchedule.linear(), 3)
    return sample(model, plan, 2, seed=5, progress=False, **options)


def test_a_network_that_cannot_be_frozen_samples_as_it_is() -> None:
    class Plain(nn.Module):
        def __init__(self, network: UNet) -> None:
            super().__init__()
            self.network, self.config = network, network.config

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = self.network(x, t)
            return out

    model, _ = make_unet(out_channels=2)
    expected = _sampled(Plain(model))
    ran = []
    model.mid_block.register_forward_hook(lambda *_: ran.append(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = _sampled(model)
    assert len(ran) == 3
    assert torch.equal(got, expected)
    (warning,) = caught
    assert warning.category is RuntimeWarning
    assert str(warning.message) == (
        "ddpm_fast: this UNet is not frozen, because mid_block has hooks. It runs as it is, which is slower."
    )


def test_a_network_that_can_be_frozen_samples_by_its_inference_form() -> None:
    model, _ = make_unet(out_channels=2)
    assert torch.equal(_sampled(model), _sampled(freeze(model, torch.float32)))  # warnings are errors
    assert torch.equal(_sampled(model, dtype=torch.float64), _sampled(freeze(model, torch.float64)))


@pytest.mark.usefixtures("no_matrix_kernels")
def test_why_not_packed_names_the_reason() -> None:
    frozen = freeze(make_unet()[0], torch.float32)
    assert frozen.why_not_packed == "as on a GPU"
    assert isinstance(frozen._layers, PyTorchLayers)
