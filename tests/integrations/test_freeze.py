"""`freeze`: a diffusers pipeline makes the same images with a frozen network and this package's scheduler."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from pipelines import STEPS, Pipeline, assert_same, assert_same_output, diffusers, generator, images, make, make_unet
from small_unets import SMALL, VARIANTS, make_inputs, randomise, relative_error
from torch import Tensor, nn

from ddpm_fast import UNet, freeze, fuse
from ddpm_fast.integrations import diffusers as schedulers

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
    unet, scheduler, state = pipe.unet, pipe.scheduler, copy.deepcopy(pipe.unet.state_dict())
    arguments = {"eta": 0.7} if kind == "DDIM" else {}
    expected = images(pipe, 3, **arguments)
    frozen = freeze(pipe)
    assert expected.std() > 0.1  # no picture of clipping
    assert_same(images(frozen, 3, **arguments), expected)
    assert type(frozen) is type(pipe)
    assert (pipe.unet, pipe.scheduler) == (unet, scheduler)
    assert torch.equal(images(pipe, 3, **arguments), expected)
    assert all(torch.equal(weight, state[name]) for name, weight in pipe.unet.state_dict().items())


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
    if not variant.startswith(("resampling", "class")):  # rounding grows more from step to step in the first
        pipe = make(unet=unet)
        assert_same(images(freeze(pipe)), images(pipe))


@pytest.mark.parametrize("settings", [{"variance_type": "fixed_large"}, {"prediction_type": "v_prediction"}], ids=str)
def test_the_scheduler_keeps_its_configuration(settings: dict[str, Any]) -> None:
    pipe = make(**settings)
    frozen = freeze(pipe)
    assert type(frozen.scheduler) is schedulers.DDPMScheduler
    assert_same(images(frozen), images(pipe))


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # NumPy's, of diffusers' solver
@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [
        *(("DDPMScheduler", {}), ("DDIMScheduler", {})),
        # Without a clip, x_0^ from noise divides rounding in the network by sqrt(abar) = 0.006.
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "prediction_type": "v_prediction"}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "prediction_type": "v_prediction"}),
    ],
    ids=str,
)
def test_a_ddpm_pipeline_may_hold_any_of_the_schedulers(scheduler: str, settings: dict[str, Any]) -> None:
    pipe = make()
    pipe.scheduler = own = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **settings)
    expected = images(pipe)
    frozen = freeze(pipe)
    assert_same(images(frozen), expected)
    assert type(frozen.scheduler) is getattr(schedulers, scheduler)
    assert frozen.scheduler.config.items() >= settings.items()
    pipe.scheduler = getattr(schedulers, scheduler).from_config(own.config)  # one of this package already
    assert_same(images(freeze(pipe)), expected)
    frozen.scheduler = own  # swapped back
    assert_same(images(frozen), expected)
    assert frozen.components["scheduler"] is own


class Inversion(diffusers.DDIMPipeline):
    """Images to their x_T."""

    def __call__(self, image: Tensor, num_inference_steps: int) -> Tensor:
        self.scheduler.set_timesteps(num_inference_steps)
        with torch.no_grad():
            for t in self.scheduler.timesteps:
                image = self.scheduler.step(self.unet(image, t).sample, t, image).prev_sample
        return image


def test_a_pipeline_for_inversion() -> None:
    """A subclass with a call of its own."""
    pipe = Inversion(unet=make_unet(), scheduler=diffusers.DDIMScheduler())
    pipe.scheduler = diffusers.DDIMInverseScheduler.from_config(pipe.scheduler.config)
    image = torch.rand(2, pipe.unet.config.in_channels, 16, 16, generator=generator()) - 0.5
    expected = pipe(image, STEPS)
    frozen = freeze(pipe)
    assert type(frozen) is Inversion
    assert type(frozen.scheduler) is schedulers.DDIMInverseScheduler
    assert_same(frozen(image, STEPS) / expected.abs().max(), expected / expected.abs().max())


@pytest.mark.parametrize("kind", PIPELINES)
def test_the_call_and_its_results_stay_the_same(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain = make(kind, unet=make_unet(in_channels=3, out_channels=3))
    pipe = freeze(plain)
    for output_type in ("pil", "np", "pt"):
        got, expected = (p(2, generator(), num_inference_steps=2, output_type=output_type) for p in (pipe, plain))
        assert type(got) is type(expected)
        assert type(got.images) is type(expected.images)
        both = [np.stack([np.asarray(image, dtype=np.float64) for image in result.images]) for result in (got, expected)]
        np.testing.assert_allclose(*both, rtol=0, atol=1 if output_type == "pil" else 2e-5)
    generators = [generator(3), generator(4)]
    (got,) = pipe(2, [g.clone_state() for g in generators], num_inference_steps=2, output_type="pt", return_dict=False)
    assert_same(got, plain(2, generators, num_inference_steps=2, output_type="pt").images)
    pipe.set_progress_bar_config(disable=False)
    images(pipe)
    assert f"{STEPS}/{STEPS}" in capsys.readouterr().err
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        pipe(steps=3)


def test_a_bfloat16_network_in_a_float32_pipeline() -> None:
    """The state stays float32: the error is that of the network, and no worse than with diffusers in bfloat16 altogether."""
    exact = images(make(), num_inference_steps=50)
    half = make().to(dtype=torch.bfloat16)
    allowed = relative_error(images(half, num_inference_steps=50).float(), exact)
    pipe = freeze(make(), torch.bfloat16)
    assert pipe.unet.dtype == pipe.dtype == torch.float32
    assert pipe.unet.frozen_unet.dtype == torch.bfloat16
    got = images(pipe, num_inference_steps=50)
    assert got.dtype == torch.float32
    assert 0 < relative_error(got, exact) <= allowed


def test_a_pipeline_in_bfloat16() -> None:
    pipe = make().to(dtype=torch.bfloat16)
    exact = images(make())
    allowed = relative_error(images(pipe).float(), exact)
    frozen = freeze(pipe)
    got = images(frozen)
    assert frozen.unet.frozen_unet.dtype == got.dtype == torch.bfloat16
    assert relative_error(got.float(), exact) <= 2 * allowed


def test_a_float32_pipeline_stays_float32_on_any_processor() -> None:
    assert freeze(make()).unet.frozen_unet.dtype == torch.float32
    assert freeze(make_unet()).frozen_unet.dtype == torch.float32


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


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # NumPy's, of diffusers' scheduler
def test_timesteps_between_those_of_the_schedule() -> None:
    """Schedulers that are swapped in may step there."""
    pipe = make()
    x, t = torch.ones(2, 2, 16, 16), torch.tensor([3.5, 700.25])
    with torch.no_grad():
        assert_same(freeze(pipe).unet(x, t).sample, pipe.unet(x, t).sample)
    pipe.scheduler = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction")
    frozen = freeze(make(prediction_type="v_prediction"))
    frozen.scheduler = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction")
    with torch.no_grad():
        for each in (pipe, frozen):
            each.scheduler.set_timesteps(STEPS)
            assert each.scheduler.timesteps.is_floating_point()
        got, expected = (each.unet(x, each.scheduler.timesteps[1]).sample for each in (frozen, pipe))
    assert_same(got, expected)


def test_a_fused_network_is_taken() -> None:
    pipe = make()
    expected = images(pipe)
    fuse(pipe.unet)
    assert_same(images(freeze(pipe)), expected)


def test_what_a_call_takes_is_as_before() -> None:
    """One timestep for all images, labels of any integer dtype, and one label for all."""
    unet = make_unet("class-conditional")
    frozen = freeze(unet)
    x, _, labels = make_inputs(unet.config, 2)
    with torch.no_grad():
        for t in (
            500,
            500.7,
            torch.tensor(500),
            torch.tensor([500]),
            torch.tensor([500, 20]),
            torch.tensor([3], dtype=torch.int32),
        ):
            for y in (labels, labels.int(), labels[:1]):
                assert_same_output(frozen(x, t, y).sample, unet(x, t, y).sample)
    with pytest.raises(TypeError, match="UNet2DModel: expected x to be a Tensor, got ndarray"):
        frozen(x.numpy(), 500, labels)
    for t in ("3", None, [3, 4]):
        with pytest.raises(TypeError, match="expected t to be"):
            frozen(x, t, labels)


@pytest.mark.slow
def test_a_frozen_network_compiles() -> None:
    frozen = freeze(make_unet())
    x, t, _ = make_inputs(frozen.config, 2)
    with torch.no_grad():
        got = torch.compile(frozen, backend="eager")(x, t).sample
        assert_same_output(got, frozen(x, t).sample)


def test_a_folder_of_this_package(tmp_path: Path) -> None:
    """Its configuration may have keys that diffusers does not read."""
    model = UNet(**(SMALL | {"out_channels": 2, "num_class_embeds": 3, "class_names": ["a", "b"]})).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert "class_names" in unet.config
    x, t, labels = make_inputs(unet.config, 2)
    with torch.no_grad():
        assert_same_output(freeze(unet)(x, t, labels).sample, unet(x, t, labels).sample)


def test_a_folder_in_googles_layout(tmp_path: Path) -> None:
    folder = tmp_path / "ddpm"
    write_google_folder(folder)
    pipe = diffusers.DDPMPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    expected = images(pipe)
    assert_same(images(make(unet=make_unet(attention_head_dim=None), variance_type="fixed_large")), expected)
    assert_same(images(freeze(pipe)), expected)


def write_google_folder(folder: Path) -> None:
    """Write a folder like Google's DDPMs: everything at the root, and attention's weights under old names."""
    unet = make_unet(attention_head_dim=None)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, tensor in unet.state_dict().items():
        for new_name, old_name in old.items():
            name = name.replace(f".{new_name}.", f".{old_name}.")
        weights[name] = tensor.contiguous()
    folder.mkdir()
    config = dict(unet.config) | {"_class_name": "UNet2DModel", "_diffusers_version": "0.0.4"}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "_use_default_values"}))
    safetensors.torch.save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    diffusers.DDPMScheduler(variance_type="fixed_large").save_config(folder)
    index = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    index |= {"_class_name": "DDPMPipeline", "_diffusers_version": "0.0.4"}  # type: ignore[dict-item]
    (folder / "model_index.json").write_text(json.dumps(index))


# ---------------------------------------------------------------------------------------------- changes before and after


def with_processor(processor: Any) -> Callable[[Any], Any]:
    return lambda unet: [layer.set_processor(processor) for layer in unet.modules() if isinstance(layer, processors.Attention)]


# name -> a write to a network's weights that versions, addresses or sums of the values may not show.
WRITES: dict[str, Callable[[Any], Any]] = {
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
    "layer replaced": lambda unet: setattr(unet, "conv_out", nn.Conv2d(16, 2, 3, padding=1)),
    "channels_last": lambda unet: unet.to(memory_format=torch.channels_last).conv_out.weight.data.neg_(),
}


def reverse(values: Any) -> None:
    values[:] = values[::-1].copy()


def halved(layer: nn.Module) -> dict[str, Tensor]:
    return {name: value / 2 for name, value in layer.state_dict().items()}


def swap_layers(block: Any, one: str, other: str) -> None:
    first, second = getattr(block, one), getattr(block, other)
    setattr(block, one, second)
    setattr(block, other, first)


@pytest.mark.parametrize("write", WRITES)
def test_weights_are_those_of_the_moment(write: str) -> None:
    pipe = make()
    frozen = freeze(pipe)
    before = images(frozen)
    WRITES[write](pipe.unet)
    assert torch.equal(images(frozen), before)
    after = images(freeze(pipe))
    assert relative_error(after, before) > 1e-4
    assert_same(after, images(pipe))


def given(path: str, **attributes: Any) -> Callable[[Any], Any]:
    return lambda unet: [setattr(unet.get_submodule(path), key, value) for key, value in attributes.items()]


def negating(path: str) -> Callable[[Any], Any]:
    return lambda unet: setattr(unet.get_submodule(path), "forward", lambda x: -x)


def tie(unet: Any) -> None:
    unet.mid_block.resnets[1] = unet.mid_block.resnets[0]


def replace(path: str, by: Callable[[], nn.Module]) -> Callable[[Any], Any]:
    return lambda unet: unet.set_submodule(path, by())


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
CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
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
    "activation": (replace(f"{RESNET}.nonlinearity", nn.GELU), OUTPUTS),
    "activation of time": (replace("time_embedding.act", nn.GELU), OUTPUTS),
    "activation in place": (given(f"{RESNET}.nonlinearity", inplace=True), OUTPUTS),
    "head's activation": (replace("conv_act", nn.GELU), OUTPUTS),
    "further layer": (given("time_embedding", post_act=nn.Tanh()), OUTPUTS),
    "hook": (
        lambda unet: unet.conv_out.register_forward_hook(lambda module, args, out: -out),
        "conv_out has hooks",
    ),
    "hook before": (
        lambda unet: unet.conv_out.register_forward_pre_hook(lambda module, args: (-args[0],)),
        "conv_out has hooks",
    ),
    "patched forward": (negating("conv_act"), "conv_act has a patched forward"),
    "adapter": (
        lambda unet: setattr(unet.get_submodule(ATTENTION), "to_q", Adapter(unet.get_submodule(ATTENTION).to_q)),
        f"{ATTENTION}.to_q is of class test_freeze.Adapter",
    ),
    "no bias": (given("conv_out", bias=None), "missing conv_out.bias"),
    "no affine": (given("conv_norm_out", weight=None, bias=None, affine=False), "missing conv_norm_out.bias"),
    "layer left out": (replace(f"{RESNET}.conv1", nn.Identity), f"missing {RESNET}.conv1.bias"),
    "tied": (tie, ""),
    "config against layers": (lambda unet: unet.register_to_config(norm_eps=0.5), "eps of the norms is [1e-05], not [0.5]"),
    "unsupported config": (
        lambda unet: unet.register_to_config(class_embed_type="timestep"),
        "expected class_embed_type",
    ),
    "impossible config": (lambda unet: unet.register_to_config(norm_num_groups=3), "UNet: expected block_out_channels to be"),
}
SAME = ("tied",)  # what is frozen has the change
WITHOUT_EFFECT = ("config against layers", "unsupported config", "impossible config")


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_before_is_named_or_frozen(what: str) -> None:
    change, reason = CHANGES[what]
    pipe = make()
    change(pipe.unet)
    if what in SAME:
        assert_same(images(freeze(pipe)), images(pipe))
        return
    message = rf"^(?:{re.escape(DESCRIBED)}|{re.escape(WEIGHTS)}|{re.escape(CONFIG)}).*{re.escape(reason)}"
    with pytest.raises(ValueError, match=message):
        freeze(pipe)
    with pytest.raises(ValueError, match=message.replace(r"x\.unet", "x")):
        freeze(pipe.unet)


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_afterwards_does_not_reach_what_is_frozen(what: str) -> None:
    change, _ = CHANGES[what]
    pipe = make()
    frozen = freeze(pipe)
    before = images(frozen)
    change(pipe.unet)
    if what not in WITHOUT_EFFECT:
        assert relative_error(images(pipe), before) > 1e-4
    with pytest.raises((ValueError, AttributeError), match=r"because the network is frozen|has no attribute"):
        change(frozen.unet)
    assert torch.equal(images(frozen), before)


def test_a_configuration_that_layers_do_not_show() -> None:
    pipe = make()
    frozen = freeze(pipe)
    before = images(frozen)
    pipe.unet.register_to_config(center_input_sample=True)
    assert not frozen.unet.config.center_input_sample
    assert torch.equal(images(frozen), before)
    after = images(freeze(pipe))
    assert relative_error(after, before) > 1e-2
    assert_same(after, images(pipe))


def test_global_hooks_count() -> None:
    register = nn.modules.module.register_module_forward_hook
    handle = register(lambda module, args, out: -out if isinstance(module, nn.SiLU) else None)
    try:
        with pytest.raises(ValueError, match="torch's global hooks"):
            freeze(make())
    finally:
        handle.remove()


@pytest.mark.parametrize("method", ["forward", "_conv_forward", "__init__"])
def test_patched_classes_count(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs for seamless textures patch the class, and with it layers of this package."""
    real = getattr(nn.Conv2d, method)

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return real(self, *args, **kwargs)

    monkeypatch.setattr(nn.Conv2d, method, functools.wraps(real)(patched))
    with pytest.raises(ValueError, match=f"^{re.escape(DESCRIBED)}Conv2d.{method} is patched by test_freeze"):
        freeze(make())


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


def test_weights_without_values_are_named() -> None:
    """Offloading leaves them on the meta device."""
    pipe = make()
    pipe.unet.conv_out.to("meta")
    with pytest.raises(ValueError, match=rf"^{re.escape(DESCRIBED)}conv_out\.(weight|bias) is on the meta device"):
        freeze(pipe)


HARMLESS: dict[str, Callable[[Any], Any]] = {
    "training": lambda unet: unet.train(),
    "gradient checkpointing": lambda unet: unet.enable_gradient_checkpointing(),
    "AttnProcessor": with_processor(processors.AttnProcessor()),
    "sliced attention": with_processor(processors.SlicedAttnProcessor(1)),
    "upcast": given(ATTENTION, upcast_attention=True, upcast_softmax=False),
    "sample size": lambda unet: unet.register_to_config(sample_size=16, _name_or_path="elsewhere"),
    "frozen parameters": lambda unet: unet.requires_grad_(False),
    "attribute of the network": lambda unet: setattr(unet, "tag", object()),
    "dropout's probability": given(f"{RESNET}.dropout", p=0.5),
    "channels_last": lambda unet: unet.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("what", HARMLESS)
def test_harmless_changes_are_taken(what: str) -> None:
    pipe = make()
    HARMLESS[what](pipe.unet)
    expected = images(copy.deepcopy(pipe)) if what != "training" else images(make())
    assert_same(images(freeze(pipe)), expected)
    assert what != "training" or pipe.unet.training


def test_a_float64_network_is_no_part_of_what_is_frozen() -> None:
    unet = make_unet().double()
    frozen = freeze(unet)
    x = torch.ones(1, 2, 16, 16, dtype=torch.float64)
    before = [frozen(x, t).sample for t in (500, 500.5)]
    with torch.no_grad():
        for weight in unet.parameters():
            weight.mul_(2)
    assert all(torch.equal(frozen(x, t).sample, out) for t, out in zip((500, 500.5), before, strict=True))


def test_weights_are_read_past_hooks_of_state_dicts() -> None:
    unet = make_unet()
    x, t, _ = make_inputs(unet.config, 2)
    unet.register_state_dict_post_hook(lambda module, state, *args: state["conv_out.weight"].zero_())
    with torch.no_grad():
        expected = unet(x, t).sample
        assert_same(freeze(unet)(x, t).sample, expected)


def test_hooks_around_a_compiled_network_are_named() -> None:
    unet = make_unet()
    compiled = torch.compile(unet, backend="eager")
    compiled.register_forward_hook(lambda module, args, out: None)
    for x in (compiled, make(unet=compiled)):
        with pytest.raises(
            ValueError, match=r"^freeze: expected x(\.unet)? to have no hooks, got some on the wrapper of torch\.c"
        ):
            freeze(x)


def test_weights_of_another_class_are_named() -> None:
    class Other(Tensor):
        pass

    pipe = make()
    pipe.unet.conv_out.bias = nn.Parameter(pipe.unet.conv_out.bias.detach().as_subclass(Other))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"^{re.escape(DESCRIBED)}conv_out\.bias is a (Other|Parameter)"):
        freeze(pipe)


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
    message = f"FrozenUNet2DModel: expected no {what}, because the network is frozen, got one: change, move, save or train"
    with pytest.raises(ValueError, match="^" + re.escape(f"{message} the UNet2DModel")):
        REFUSED[what](frozen.unet)
    assert torch.equal(images(frozen), before)


def test_what_is_frozen_is_a_network_of_diffusers_without_weights() -> None:
    unet = make_unet()
    frozen = freeze(unet)
    assert isinstance(frozen, diffusers.UNet2DModel)
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
    with pytest.raises(ValueError, match=r"expected no move to cpu and torch\.bfloat16"):
        frozen.to(torch.bfloat16)
    with pytest.raises(ValueError, match="expected no call of save_pretrained"):
        frozen.save_pretrained(tmp_path / "pipe")
    assert not (tmp_path / "pipe" / "unet").exists()


def test_copies_share_the_frozen_network() -> None:
    frozen = freeze(make())
    for other in (copy.copy(frozen), copy.deepcopy(frozen)):
        assert other.unet.frozen_unet is frozen.unet.frozen_unet
        assert torch.equal(images(other), images(frozen))
    with pytest.raises(TypeError, match=r"it cannot be pickled: save the UNet"):
        pickle.dumps(frozen.unet)


@pytest.mark.parametrize("x", [lambda: freeze(make_unet()), lambda: freeze(make_unet()).frozen_unet])
def test_what_is_frozen_is_not_frozen_again(x: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"^freeze: expected x to be an unfrozen network or pipeline, got a Frozen\w+$"):
        freeze(x())


def test_a_network_of_inference_mode_is_frozen() -> None:
    with torch.inference_mode():
        unet = make_unet()
    x, t, _ = make_inputs(unet.config, 2)
    with torch.inference_mode():
        expected = unet(x, t).sample
    assert_same_output(freeze(unet)(x, t).sample, expected)


def test_pipelines_may_share_a_frozen_network() -> None:
    first = freeze(make())
    second = diffusers.DDIMPipeline(**first.components)
    second.set_progress_bar_config(disable=True)
    assert_same(images(second), images(make("DDIM")))
    with pytest.raises(
        TypeError, match=r"expected x\.unet to be a UNet2DModel, got a FrozenUNet2DModel, which is frozen already$"
    ):
        freeze(first)


# ----------------------------------------------------------------------------------------------------------------- errors


def changed(change: Callable[[Any], Any]) -> Callable[[], Pipeline]:
    def make_changed() -> Pipeline:
        pipe = make()
        change(pipe)
        return pipe

    return make_changed


def part(name: str, value: Callable[[Any], Any]) -> Callable[[], Pipeline]:
    return changed(lambda pipe: setattr(pipe, name, value(pipe)))


def _offloaded(pipe: Pipeline) -> None:
    pipe.unet.mid_block.forward = pipe.unet.mid_block.forward


class Relative(diffusers.UNet2DModel):  # type: ignore[misc, name-defined]
    pass


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
        part("unet", lambda pipe: Relative(**(SMALL | {"out_channels": 2}))),
        {},
        TypeError,
        "freeze: expected x.unet to be a UNet2DModel, got a Relative, which ddpm_fast.fuse may make faster",
    ),
    (
        "configuration",
        part("unet", lambda pipe: make_unet(act_fn="gelu")),
        {},
        ValueError,
        f"{CONFIG}UNet: expected act_fn to be",
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
        changed(lambda pipe: pipe.unet.register_forward_hook(lambda *args: None)),
        {},
        ValueError,
        f"{DESCRIBED}it has hooks",
    ),
    ("patch", changed(_offloaded), {}, ValueError, f"{DESCRIBED}mid_block has a patched forward"),
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
    (
        "scheduler",
        part("scheduler", lambda pipe: diffusers.PNDMScheduler()),
        {},
        TypeError,
        "freeze: expected x.scheduler to be one of DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, "
        "DDIMInverseScheduler, got a PNDMScheduler",
    ),
    (
        "scheduler's configuration",
        part("scheduler", lambda pipe: diffusers.DPMSolverMultistepScheduler(use_lu_lambdas=True)),
        {},
        ValueError,
        "freeze: expected x.scheduler to have a supported configuration, got: DPMSolverMultistepScheduler: expected",
    ),
    (
        "scheduler's betas",
        part("scheduler", lambda pipe: diffusers.DDPMScheduler(beta_end=3.0)),
        {},
        ValueError,
        "freeze: expected x.scheduler to have a supported configuration, got: ",
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
