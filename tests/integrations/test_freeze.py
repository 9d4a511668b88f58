"""`freeze`: a diffusers pipeline makes the same images with a frozen network."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from changes import Change, given, hooked, negated, negated_before, negating, replaced
from pipelines import Pipeline, assert_same, assert_same_output, diffusers, generator, images, make, make_unet
from small_unets import SMALL, VARIANTS, make_inputs, relative_error
from torch import Tensor, nn

from ddpm_fast import freeze, fuse, plan_of

processors: Any = importlib.import_module("diffusers.models.attention_processor")

PIPELINES = ["DDPM", "DDIM"]
DESCRIBED = "freeze: expected x.unet to be what its class and configuration describe, got one where "
WEIGHTS = "freeze: expected the weights in 'x.unet' to fit its configuration, got "
OUTPUTS = "outputs differ by "
CONFIG = "freeze: expected x.unet to have a configuration that ddpm_fast.UNet supports, got: "


# -------------------------------------------------------------------------------------------------------------- pipelines


@pytest.mark.parametrize("kind", PIPELINES)
def test_the_same_seed_gives_the_same_images(kind: str) -> None:
    pipe = make(kind)
    unet, scheduler = pipe.unet, pipe.scheduler
    arguments: dict[str, Any] = {"eta": 0.7} if kind == "DDIM" else {}
    frozen = freeze(pipe)
    assert type(frozen) is type(pipe)
    assert (pipe.unet, pipe.scheduler) == (unet, scheduler)
    for make_generators in (generator, lambda: [generator(seed) for seed in (3, 4, 5)]):
        got, expected = (images(each, 3, generator=make_generators(), **arguments) for each in (frozen, pipe))
        assert expected.std() > 0.1  # no picture of clipping
        assert_same(got, expected)


@pytest.mark.parametrize("clipped", [None, False, True])
def test_a_ddim_pipeline_derives_epsilon_again_only_if_asked(clipped: bool | None) -> None:
    pipe = make("DDIM")
    arguments = {} if clipped is None else {"use_clipped_model_output": clipped}
    expected, other = images(pipe, **arguments), images(pipe, use_clipped_model_output=not clipped)
    assert_same(images(freeze(pipe), **arguments), expected)
    assert (other - expected).abs().max() > 1e-2  # the clip acts: the two ways differ


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_network_that_the_package_knows(variant: str) -> None:
    unet = make_unet(variant)
    x, t, labels = make_inputs(unet.config, 2)
    with torch.no_grad():
        exact = copy.deepcopy(unet).double()(x.double(), t, labels).sample
        allowed = 2 * relative_error(unet(x, t, labels).sample, exact)
        frozen = freeze(unet)
        assert relative_error(frozen(x, t, labels).sample, exact) <= allowed
        (as_tuple,) = frozen(x, t, class_labels=labels, return_dict=False)
        assert torch.equal(as_tuple, frozen(x, t, labels)["sample"])


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # NumPy's, of diffusers' solver
@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [
        *(("DDPMScheduler", {}), ("DDPMScheduler", {"variance_type": "fixed_large"}), ("DDIMScheduler", {})),
        ("DDPMScheduler", {"prediction_type": "v_prediction"}),
        # Without a clip, x_0^ from noise divides rounding in the network by sqrt(abar) = 0.006.
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "prediction_type": "v_prediction"}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "prediction_type": "v_prediction"}),
        ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
        ("DDPMScheduler", {"thresholding": True, "sample_max_value": 1.5}),
    ],
    ids=str,
)
def test_a_pipeline_keeps_its_scheduler_which_may_be_any(scheduler: str, settings: dict[str, Any]) -> None:
    pipe = make()
    pipe.scheduler = own = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **settings)
    expected = images(pipe)
    frozen = freeze(pipe)
    assert_same(images(frozen), expected)
    assert frozen.components["scheduler"] is own


class Looping(diffusers.DDIMPipeline):
    """A call of its own, which takes the timesteps that are set."""

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for t in self.scheduler.timesteps:
                x = self.scheduler.step(self.unet(x, t).sample, t, x).prev_sample
        return x


@pytest.mark.parametrize(
    ("scheduler", "settings"), [("DDIMScheduler", {"prediction_type": "v_prediction"}), ("DDIMInverseScheduler", {})]
)
def test_subclasses_of_pipelines_and_the_timesteps_that_are_set_stay(scheduler: str, settings: dict[str, Any]) -> None:
    pipe = Looping(unet=make_unet(), scheduler=diffusers.DDIMScheduler())
    pipe.scheduler = getattr(diffusers, scheduler)(**settings)
    pipe.scheduler.set_timesteps(5)
    frozen = freeze(pipe)
    assert (type(frozen), frozen.scheduler) == (Looping, pipe.scheduler)
    for timesteps in (frozen.scheduler.timesteps, plan_of(pipe).timesteps):
        assert timesteps.tolist() == pipe.scheduler.timesteps.tolist()
    x = torch.randn(2, 2, 16, 16, generator=generator())
    expected = pipe(x)
    assert_same(frozen(x) / expected.abs().max(), expected / expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bfloat16_network_is_as_right_as_that_of_diffusers(dtype: torch.dtype) -> None:
    """The state of a float32 pipeline stays float32, so its error is at most that of diffusers in bfloat16 altogether."""
    exact, half = images(make(), num_inference_steps=50), make().to(dtype=torch.bfloat16)
    allowed = relative_error(images(half, num_inference_steps=50).float(), exact)
    frozen = freeze(half) if dtype == torch.bfloat16 else freeze(make(), torch.bfloat16)
    got = images(frozen, num_inference_steps=50)
    assert frozen.unet.dtype == frozen.dtype == got.dtype == dtype
    assert frozen.unet.frozen_unet.dtype == torch.bfloat16
    assert 0 < relative_error(got.float(), exact) <= (2 if dtype == torch.bfloat16 else 1) * allowed


def test_the_number_of_timesteps_is_the_schedulers() -> None:
    assert freeze(make(num_train_timesteps=40)).unet.frozen_unet.num_timesteps == 40
    assert freeze(make(), num_timesteps=1200).unet.frozen_unet.num_timesteps == 1200
    assert freeze(make_unet()).frozen_unet.num_timesteps == 1000


def test_a_network_under_torch_compile_is_taken_out_of_it() -> None:
    pipe = make()
    expected = images(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert_same(images(freeze(pipe)), expected)
    assert type(freeze(pipe.unet)) is type(freeze(make_unet()))


def test_what_a_call_takes_is_as_before() -> None:
    """One timestep for all images, also between those of the schedule, labels of any integer dtype, and one label for all."""
    unet = make_unet("class-conditional")
    frozen = freeze(unet)
    x, _, labels = make_inputs(unet.config, 2)
    with torch.no_grad():
        numbers = (500, 499.5, [500], [500, 20], [3.5, 700.25])
        timesteps = (500, 500.7, *map(torch.tensor, numbers), torch.tensor([3], dtype=torch.int32))
        for t, y in product(timesteps, (labels, labels.int(), labels[:1])):
            assert_same_output(frozen(x, t, y).sample, unet(x, t, y).sample)
    for wrong, t, message in (
        (x.numpy(), 500, "^FrozenModule: expected x to be a Tensor, got ndarray"),
        *((x, t, "expected t to be") for t in ("3", None, [3, 4])),
    ):
        with pytest.raises(TypeError, match=message):
            frozen(wrong, t, labels)


@pytest.mark.slow
def test_a_frozen_network_compiles() -> None:
    frozen = freeze(make_unet())
    x, t, _ = make_inputs(frozen.config, 2)
    with torch.no_grad():
        got = torch.compile(frozen, backend="eager")(x, t).sample
        assert_same_output(got, frozen(x, t).sample)


def test_a_folder_with_the_old_names_of_attention(tmp_path: Path) -> None:
    """Google's DDPMs have them."""
    pipe = make(unet=make_unet(attention_head_dim=None))
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(file)
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        weights = {name.replace(f".{new}.", f".{old}."): weight for name, weight in weights.items()}
    assert weights.keys() != pipe.unet.state_dict().keys()
    safetensors.torch.save_file(weights, file)
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert_same(images(freeze(loaded)), images(pipe))


# ---------------------------------------------------------------------------------------------- changes before and after


def reverse(values: Any) -> None:
    values[:] = values[::-1].copy()


def halved(layer: nn.Module) -> dict[str, Tensor]:
    return {name: value / 2 for name, value in layer.state_dict().items()}


def swap_layers(block: Any, one: str, other: str) -> None:
    first, second = getattr(block, one), getattr(block, other)
    setattr(block, one, second)
    setattr(block, other, first)


# name -> a write to a network's weights that versions, addresses or sums of the values may not show.
WRITES: dict[str, Change] = {
    "data, flipped": lambda unet: unet.conv_in.weight.data.copy_(unet.conv_in.weight.data.flip(-1)),
    "data, permuted": lambda unet: unet.conv_out.weight.data.copy_(unet.conv_out.weight.data.flip(1)),
    "numpy": lambda unet: unet.conv_out.weight.detach().numpy().__imul__(-1),
    "numpy, swapped": lambda unet: reverse(unet.conv_out.bias.detach().numpy()),
    "sign": lambda unet: unet.conv_out.weight.data.neg_(),
    "inference mode": lambda unet: torch.inference_mode()(unet.conv_out.weight.mul_)(0.9),
    "assigned": lambda unet: unet.conv_out.load_state_dict(halved(unet.conv_out), assign=True),
    "norm assigned": lambda unet: unet.conv_norm_out.load_state_dict(halved(unet.conv_norm_out), assign=True),
    "data replaced": lambda unet: setattr(unet.conv_out.weight, "data", unet.conv_out.weight.data * 0.9),
    "layers swapped": lambda unet: swap_layers(unet.down_blocks[0].resnets[1], "conv1", "conv2"),
    "weights tied": lambda unet: setattr(unet.mid_block.resnets[0].conv1, "weight", unet.mid_block.resnets[1].conv1.weight),
    "layers tied": lambda unet: setattr(unet.mid_block.resnets, "1", unet.mid_block.resnets[0]),
    "layer replaced": lambda unet: setattr(unet, "conv_out", nn.Conv2d(16, 2, 3, padding=1)),
    "channels_last": lambda unet: unet.to(memory_format=torch.channels_last).conv_out.weight.data.neg_(),
    "config that layers do not show": lambda unet: unet.register_to_config(center_input_sample=True),
}


class Adapter(nn.Module):
    """Replacement of a linear layer by a library for fine-tuning."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.down, self.up = nn.Linear(linear.in_features, 2, bias=False), nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias) + 9 * self.up(self.down(x))


class Doubled(processors.AttnProcessor):  # type: ignore[misc]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().__call__(*args, **kwargs)


def circular(conv: nn.Conv2d) -> Callable[..., Tensor]:
    """Replace a method of the layer, as programs for seamless textures do."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    return forward


RESNET, ATTENTION = "down_blocks.0.resnets.0", "mid_block.attentions.0"
# name -> a change to a network, and what is said about it.
CHANGES: dict[str, tuple[Change, str]] = {
    "padding_mode": (given("conv_in", padding_mode="circular"), OUTPUTS),
    "_conv_forward": (
        lambda unet: setattr(unet.conv_in, "_conv_forward", circular(unet.conv_in)),
        "conv_in has another _conv_forward",
    ),
    "dilation": (given("conv_out", dilation=(2, 2), padding=(2, 2)), OUTPUTS),
    "eps": (given(f"{RESNET}.norm1", eps=0.5), "eps of the norms is [1e-05, 0.5], not [1e-05]"),
    "num_groups": (given("conv_norm_out", num_groups=2), OUTPUTS),
    "output_scale_factor": (given(RESNET, output_scale_factor=2.0), OUTPUTS),
    "skip_time_act": (given(RESNET, skip_time_act=True), OUTPUTS),
    "heads": (given(ATTENTION, heads=4), OUTPUTS),
    "rescale_output_factor": (given(ATTENTION, rescale_output_factor=2.0), OUTPUTS),
    "residual_connection": (given(ATTENTION, residual_connection=False), OUTPUTS),
    "processor": (given(ATTENTION, processor=Doubled()), f"{ATTENTION} has the processor Doubled"),
    "flip_sin_to_cos": (given("time_proj", flip_sin_to_cos=True), OUTPUTS),
    "downscale_freq_shift": (given("time_proj", downscale_freq_shift=0.0), OUTPUTS),
    "scale of time": (given("time_proj", scale=2), OUTPUTS),
    "activation": (replaced(f"{RESNET}.nonlinearity", nn.GELU()), OUTPUTS),
    "activation of time": (replaced("time_embedding.act", nn.GELU()), OUTPUTS),
    "activation in place": (given(f"{RESNET}.nonlinearity", inplace=True), OUTPUTS),
    "head's activation": (replaced("conv_act", nn.GELU()), OUTPUTS),
    "further layer": (given("time_embedding", post_act=nn.Tanh()), OUTPUTS),
    "hook": (negated("conv_out"), "conv_out has hooks"),
    "hook before": (negated_before("conv_out"), "conv_out has hooks"),
    "patched forward": (negating("conv_act"), "conv_act has a patched forward"),
    "adapter": (
        lambda unet: setattr(unet.get_submodule(ATTENTION), "to_q", Adapter(unet.get_submodule(ATTENTION).to_q)),
        f"{ATTENTION}.to_q is of class test_freeze.Adapter",
    ),
    "no bias": (given("conv_out", bias=None), "missing conv_out.bias"),
    "no affine": (given("conv_norm_out", weight=None, bias=None, affine=False), "missing conv_norm_out.bias"),
    "layer left out": (replaced(f"{RESNET}.conv1", nn.Identity()), f"missing {RESNET}.conv1.bias"),
    "config against layers": (lambda unet: unet.register_to_config(norm_eps=0.5), "eps of the norms is [1e-05], not [0.5]"),
    "unsupported config": (
        lambda unet: unet.register_to_config(class_embed_type="timestep"),
        "expected class_embed_type",
    ),
    "impossible config": (lambda unet: unet.register_to_config(norm_num_groups=3), "expected block_out_channels to be"),
}
WITHOUT_EFFECT = ("config against layers", "unsupported config", "impossible config")


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_before_is_named(what: str) -> None:
    change, reason = CHANGES[what]
    pipe = make()
    change(pipe.unet)
    message = rf"^(?:{re.escape(DESCRIBED)}|{re.escape(WEIGHTS)}|{re.escape(CONFIG)}).*{re.escape(reason)}"
    for x, expected in ((pipe, message), (pipe.unet, message.replace(r"x\.unet", "x"))):
        with pytest.raises(ValueError, match=expected):
            freeze(x)


@pytest.mark.parametrize("what", [*WRITES, *CHANGES])
def test_a_change_afterwards_does_not_reach_what_is_frozen(what: str) -> None:
    """A network that is frozen afterwards has the writes to its weights."""
    change = WRITES.get(what) or CHANGES[what][0]
    pipe = make()
    frozen = freeze(pipe)
    before = images(frozen)
    change(pipe.unet)
    if what not in WITHOUT_EFFECT:
        assert relative_error(images(pipe), before) > 1e-4
    with pytest.raises((ValueError, AttributeError), match=r"because the network is frozen|has no attribute"):
        change(frozen.unet)
    assert torch.equal(images(frozen), before)
    if what in WRITES:
        assert_same(images(freeze(pipe)), images(pipe))


def test_zeros_of_a_new_network_hide_nothing() -> None:
    """Any two networks whose last layer is zero have the same outputs."""
    pipe = make()
    for weight in (pipe.unet.conv_out.weight, pipe.unet.conv_out.bias):
        nn.init.zeros_(weight)
    freeze(pipe)
    pipe.unet.conv_act = nn.GELU()
    with pytest.raises(ValueError, match=OUTPUTS):
        freeze(pipe)


def test_a_comparison_has_no_side_effects() -> None:
    unet = make_unet().train()
    state, weights = torch.get_rng_state(), copy.deepcopy(unet.state_dict())
    addresses = [weight.data_ptr() for weight in unet.parameters()]
    freeze(unet)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(layer.training for layer in unet.modules())
    assert [weight.data_ptr() for weight in unet.parameters()] == addresses
    assert all(torch.equal(weight, weights[name]) for name, weight in unet.state_dict().items())


HARMLESS: dict[str, Change] = {
    "training": lambda unet: unet.train(),
    "gradient checkpointing": lambda unet: unet.enable_gradient_checkpointing(),
    "AttnProcessor": given(ATTENTION, processor=processors.AttnProcessor()),
    "sliced attention": given(ATTENTION, processor=processors.SlicedAttnProcessor(1)),
    "upcast": given(ATTENTION, upcast_attention=True, upcast_softmax=False),
    "sample size": lambda unet: unet.register_to_config(sample_size=16, _name_or_path="elsewhere"),
    "frozen parameters": lambda unet: unet.requires_grad_(False),
    "attribute of the network": lambda unet: setattr(unet, "tag", object()),
    "dropout's probability": given(f"{RESNET}.dropout", p=0.5),
    "channels_last": lambda unet: unet.to(memory_format=torch.channels_last),
    "fused": fuse,
    "key of this package": lambda unet: unet.register_to_config(time_input_dim=16),  # which diffusers does not read
    "hook of state_dict": lambda unet: unet.register_state_dict_post_hook(
        lambda module, state, *args: state["conv_out.weight"].zero_()
    ),
}


@pytest.mark.parametrize("what", HARMLESS)
def test_harmless_changes_are_taken(what: str) -> None:
    pipe = make()
    HARMLESS[what](pipe.unet)
    expected = images(copy.deepcopy(pipe)) if what != "training" else images(make())
    assert_same(images(freeze(pipe)), expected)
    assert what != "training" or pipe.unet.training


def test_hooks_around_a_compiled_network_are_named() -> None:
    unet = make_unet()
    compiled = torch.compile(unet, backend="eager")
    compiled.register_forward_hook(lambda module, args, out: None)
    for x in (compiled, make(unet=compiled)):
        with pytest.raises(
            ValueError, match=r"^freeze: expected x(\.unet)? to have no hooks, got some on the wrapper of torch\.c"
        ):
            freeze(x)


# --------------------------------------------------------------------------------------------------------- what is frozen

REFUSED: dict[str, Callable[[Any], Any]] = {
    "training mode": lambda unet: unet.train(),
    "gradients of weights": lambda unet: unet.requires_grad_(),
    "move to cpu and torch.bfloat16": lambda unet: unet.to(torch.bfloat16),
    "move to cpu and torch.float16": lambda unet: unet.half(),
    "move to meta and torch.float32": lambda unet: unet.to("meta"),
    "call of save_pretrained": lambda unet: unet.save_pretrained("nowhere"),
    "call of push_to_hub": lambda unet: unet.push_to_hub("nobody/nothing"),
    "call of state_dict": lambda unet: unet.state_dict(),
    "call of load_state_dict": lambda unet: unet.load_state_dict({}),
    "call of register_to_config": lambda unet: unet.register_to_config(norm_eps=0.5),
    "call of register_forward_hook": lambda unet: unet.register_forward_hook(print),
    "call of register_forward_pre_hook": lambda unet: unet.register_forward_pre_hook(print),
    "call of register_full_backward_hook": lambda unet: unet.register_full_backward_hook(print),
    "call of register_buffer": lambda unet: unet.register_buffer("more", torch.zeros(1)),
    "call of set_submodule": lambda unet: unet.set_submodule("conv_in", nn.Identity()),
    "assignment of conv_in": lambda unet: setattr(unet, "conv_in", nn.Identity()),
    "assignment of forward": lambda unet: setattr(unet, "forward", lambda *args: None),
    "assignment of training": lambda unet: setattr(unet, "training", True),
    "deletion of frozen_unet": lambda unet: delattr(unet, "frozen_unet"),
    "input that records gradients": lambda unet: unet(torch.ones(2, 2, 16, 16, requires_grad=True), 3),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_change_of_what_is_frozen_is_an_error(what: str) -> None:
    frozen = freeze(make())
    before = images(frozen)
    message = f"FrozenUNet2DModel: expected evaluation only, because the network is frozen, got {what}: change, move"
    with pytest.raises(ValueError, match="^" + re.escape(f"{message}, save or train the UNet2DModel")):
        REFUSED[what](frozen.unet)
    assert torch.equal(images(frozen), before)


def test_what_is_frozen_is_a_network_of_diffusers_without_weights() -> None:
    unet = make_unet()
    frozen = freeze(unet)
    assert isinstance(frozen, diffusers.UNet2DModel)
    assert frozen.frozen_unet.dtype == torch.float32  # on any processor
    assert frozen.config == unet.config
    assert frozen.config.sample_size == 16
    assert (frozen.dtype, frozen.device) == (unet.dtype, unet.device)
    assert list(frozen.named_parameters()) == list(frozen.named_buffers()) == list(frozen.children()) == []
    assert not frozen.training
    kept = {id(value) for value in vars(frozen).values()}
    assert not kept & {id(unet), *map(id, unet.children()), *map(id, unet.parameters())}
    for unchanged in (frozen.eval(), frozen.to("cpu"), frozen.to(torch.float32), frozen.float(), frozen.requires_grad_(False)):
        assert unchanged is frozen
    assert str(frozen) == "FrozenUNet2DModel()"


def test_a_pipeline_is_moved_where_it_is_and_nowhere_else(tmp_path: Path) -> None:
    frozen = freeze(make())
    assert frozen.to("cpu") is frozen
    with pytest.raises(ValueError, match=r"got move to cpu and torch\.bfloat16"):
        frozen.to(torch.bfloat16)
    with pytest.raises(ValueError, match="got call of save_pretrained"):
        frozen.save_pretrained(tmp_path / "pipe")
    assert not (tmp_path / "pipe" / "unet").exists()


def test_copies_share_the_frozen_network() -> None:
    frozen = freeze(make())
    for other in (copy.copy(frozen), copy.deepcopy(frozen)):
        assert other.unet.frozen_unet is frozen.unet.frozen_unet
        assert torch.equal(images(other), images(frozen))


@pytest.mark.parametrize(
    ("make_x", "error", "message"),
    [
        (lambda: freeze(make_unet()), ValueError, r"expected x to be an unfrozen network or pipeline, got a FrozenUNet2DModel"),
        (
            lambda: freeze(make_unet()).frozen_unet,
            ValueError,
            r"expected x to be an unfrozen network or pipeline, got a FrozenUNet",
        ),
        (
            lambda: freeze(make()),
            TypeError,
            r"expected x\.unet to be a UNet2DModel, got a FrozenUNet2DModel, which is frozen already",
        ),
    ],
)
def test_what_is_frozen_is_not_frozen_again(make_x: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^freeze: {message}$"):
        freeze(make_x())


def test_a_network_of_inference_mode_is_frozen() -> None:
    with torch.inference_mode():
        unet = make_unet()
    x, t, _ = make_inputs(unet.config, 2)
    with torch.inference_mode():
        expected = unet(x, t).sample
    assert_same_output(freeze(unet)(x, t).sample, expected)


# ----------------------------------------------------------------------------------------------------------------- errors


class Other(Tensor):
    """Weights of another class."""


def _other(parameter: Any) -> Any:
    return nn.Parameter(parameter.detach().as_subclass(Other))


def changed(change: Change) -> Callable[[], Pipeline]:
    def make_changed() -> Pipeline:
        pipe = make()
        change(pipe)
        return pipe

    return make_changed


def part(name: str, value: Callable[[Any], Any]) -> Callable[[], Pipeline]:
    return changed(lambda pipe: setattr(pipe, name, value(pipe)))


ERRORS: list[tuple[str, Callable[[], Any], dict[str, Any], type[Exception], str]] = [
    (
        "a class",
        lambda: diffusers.UNet2DModel,
        {},
        TypeError,
        "freeze: expected x to be a ddpm_fast.UNet, a network or pipeline of diffusers, a UNetModel of guided-diffusion, or a "
        "GaussianDiffusion of denoising-diffusion-pytorch, got a type",
    ),
    (
        "dtype",
        make,
        {"dtype": torch.int32},
        TypeError,
        "freeze: expected dtype to be float32, float64, float16, bfloat16 or None, got torch.int32",
    ),
    (
        "device",
        make,
        {"device": "nowhere"},
        ValueError,
        "freeze: expected device to be a torch.device or its name, got 'nowhere'",
    ),
    (
        "T",
        make,
        {"num_timesteps": 0},
        ValueError,
        "freeze: expected num_timesteps to be an integer in 1..100000 or None, got 0",
    ),
    (
        "relative",
        part("unet", lambda pipe: type("Relative", (diffusers.UNet2DModel,), {})(**(SMALL | {"out_channels": 2}))),
        {},
        TypeError,
        "freeze: expected x.unet to be a UNet2DModel, got a Relative, which ddpm_fast.fuse may make faster",
    ),
    (
        "configuration",
        part("unet", lambda pipe: make_unet(act_fn="gelu")),
        {},
        ValueError,
        f"{CONFIG}expected act_fn to be",
    ),
    (
        "layer",
        changed(lambda pipe: setattr(pipe.unet, "conv_in", nn.Sequential(pipe.unet.conv_in))),
        {},
        ValueError,
        f"{WEIGHTS}missing conv_in.bias, conv_in.weight",
    ),
    (
        "hook of the network",
        changed(lambda pipe: hooked("")(pipe.unet)),
        {},
        ValueError,
        f"{DESCRIBED}it has hooks",
    ),
    (
        "patch",
        changed(lambda pipe: setattr(pipe.unet.mid_block, "forward", pipe.unet.mid_block.forward)),
        {},
        ValueError,
        f"{DESCRIBED}mid_block has a patched forward",
    ),
    (
        "weights without values",  # offloading leaves them on the meta device
        changed(lambda pipe: pipe.unet.conv_out.to("meta")),
        {},
        ValueError,
        f"{DESCRIBED}conv_out.weight is on the meta device",
    ),
    (
        "weights of another class",
        changed(lambda pipe: setattr(pipe.unet.conv_out, "bias", _other(pipe.unet.conv_out.bias))),
        {},
        ValueError,
        f"{DESCRIBED}conv_out.bias is a ",
    ),
    (
        "processor",
        changed(lambda pipe: setattr(pipe.unet.mid_block.attentions[0], "processor", nn.Identity())),
        {},
        ValueError,
        f"{DESCRIBED}mid_block.attentions.0 has the processor Identity",
    ),
    (
        "parametrization",
        changed(lambda pipe: nn.utils.parametrize.register_parametrization(pipe.unet.conv_in, "weight", nn.Tanh())),
        {},
        ValueError,
        f"{WEIGHTS}missing conv_in.weight",
    ),
]


@pytest.mark.parametrize(("what", "make_x", "arguments", "error", "message"), ERRORS, ids=[case[0] for case in ERRORS])
def test_what_it_cannot_take_is_named(
    what: str, make_x: Callable[[], Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    x = make_x()
    state = dict(vars(x))
    with pytest.raises(error, match="^" + re.escape(message)):
        freeze(x, **arguments)
    assert dict(vars(x)) == state  # left as it was
