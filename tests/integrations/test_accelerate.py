"""`accelerate`: a diffusers pipeline makes the same images with this package's network and scheduler in it."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import pickle
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from small_unets import SMALL, VARIANTS, make_inputs, randomise, relative_error
from torch import Tensor, nn

from ddpm_fast import accelerate, fuse, restore

diffusers = pytest.importorskip("diffusers")
from diffusers.models.attention_processor import Attention, AttnProcessor, SlicedAttnProcessor  # noqa: E402

from ddpm_fast.integrations import diffusers as schedulers  # noqa: E402

Pipeline = Any
STEPS = 3
PIPELINES = ["DDPM", "DDIM"]
NOT_FOR_UNET = "accelerate: expected pipe.unet to be one that ddpm_fast.UNet can stand for, got: "


def make_unet(variant: str = "one-head-asymmetric", **changes: Any) -> Any:
    unet = diffusers.UNet2DModel(**(SMALL | {"out_channels": 2} | VARIANTS[variant] | changes)).eval()
    randomise(unet)
    return unet


def make(kind: str = "DDPM", *, unet: Any = None, **scheduler: Any) -> Pipeline:
    made = getattr(diffusers, f"{kind}Scheduler")(**scheduler)
    pipe = getattr(diffusers, f"{kind}Pipeline")(unet=make_unet() if unet is None else unet, scheduler=made)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(pipe: Pipeline, n: int = 2, **arguments: Any) -> Tensor:
    arguments = {"generator": generator(), "num_inference_steps": STEPS, "output_type": "pt"} | arguments
    return pipe(batch_size=n, **arguments).images


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """To the rounding of float32 networks of these sizes, over some steps, in [0, 1]."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("kind", PIPELINES)
def test_the_same_seed_gives_the_same_images(kind: str, freeze: bool) -> None:
    pipe = make(kind)
    arguments = {"eta": 0.7} if kind == "DDIM" else {}
    expected = images(pipe, 3, **arguments)
    assert accelerate(pipe, freeze=freeze) is pipe
    assert expected.std() > 0.1  # no picture of clipping
    assert_same(images(pipe, 3, **arguments), expected)


@pytest.mark.parametrize("clipped", [None, False, True])
def test_a_ddim_pipeline_derives_epsilon_again_only_if_asked(clipped: bool | None) -> None:
    pipe = make("DDIM")
    arguments = {} if clipped is None else {"use_clipped_model_output": clipped}
    expected, other = images(pipe, **arguments), images(pipe, use_clipped_model_output=not clipped)
    assert_same(images(accelerate(pipe), **arguments), expected)
    assert (other - expected).abs().max() > 1e-2  # the clip acts: the two ways differ


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "class-conditional"])
def test_any_network_that_the_package_knows(variant: str) -> None:
    unet = make_unet(variant)
    x, t, _ = make_inputs(unet.config, 2)
    with torch.no_grad():
        exact = copy.deepcopy(unet).double()(x.double(), t).sample
        allowed = 2 * relative_error(unet(x, t).sample, exact)
        pipe = accelerate(make(unet=unet))
        assert relative_error(pipe.unet(x, t).sample, exact) <= allowed
    if not variant.startswith("resampling"):  # rounding grows more from step to step in these
        expected = images(restore(pipe))
        assert_same(images(accelerate(pipe)), expected)


@pytest.mark.parametrize("settings", [{"variance_type": "fixed_large"}, {"prediction_type": "v_prediction"}], ids=str)
def test_the_scheduler_keeps_its_configuration(settings: dict[str, Any]) -> None:
    pipe = make(**settings)
    expected = images(pipe)
    accelerate(pipe)
    assert type(pipe.scheduler) is schedulers.DDPMScheduler
    assert_same(images(pipe), expected)


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
    assert_same(images(accelerate(pipe)), expected)
    assert type(pipe.scheduler) is getattr(schedulers, scheduler)
    assert pipe.scheduler.config.items() >= settings.items()
    assert restore(pipe).scheduler is own
    assert torch.equal(images(pipe), expected)
    pipe.scheduler = getattr(schedulers, scheduler).from_config(own.config)  # one of this package already
    assert_same(images(accelerate(pipe)), expected)


class Inversion(diffusers.DDIMPipeline):
    """Images to their x_T."""

    def __call__(self, image: Tensor, num_inference_steps: int) -> Tensor:
        self.scheduler.set_timesteps(num_inference_steps)
        with torch.no_grad():
            for t in self.scheduler.timesteps:
                image = self.scheduler.step(self.unet(image, t).sample, t, image).prev_sample
        return image


def test_a_pipeline_for_inversion() -> None:
    pipe = Inversion(unet=make_unet(), scheduler=diffusers.DDIMScheduler())
    pipe.scheduler = own = diffusers.DDIMInverseScheduler.from_config(pipe.scheduler.config)
    image = torch.rand(2, pipe.unet.config.in_channels, 16, 16, generator=generator()) - 0.5
    expected = pipe(image, STEPS)
    got = accelerate(pipe)(image, STEPS)
    assert type(pipe.scheduler) is schedulers.DDIMInverseScheduler
    assert_same(got / expected.abs().max(), expected / expected.abs().max())
    assert restore(pipe).scheduler is own


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # NumPy's, of diffusers' solver
def test_with_philox_a_solver_has_the_same_image_in_any_batch() -> None:
    pipe = make()
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", prediction_type="v_prediction")
    accelerate(pipe, noise="philox")
    assert_same(images(pipe, 1), images(pipe, 3)[:1])


@pytest.mark.parametrize("kind", PIPELINES)
def test_the_call_and_its_results_stay_the_same(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain = make(kind, unet=make_unet(in_channels=3, out_channels=3))
    pipe = accelerate(copy.deepcopy(plain))
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
    exact = images(make(unet=make_unet()), num_inference_steps=50)
    half = make().to(dtype=torch.bfloat16)
    allowed = relative_error(images(half, num_inference_steps=50).float(), exact)
    pipe = accelerate(make(), dtype=torch.bfloat16)
    assert pipe.unet.dtype == pipe.dtype == torch.float32
    seen = []
    pipe.unet.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.sample.dtype)))
    got = images(pipe, num_inference_steps=50)
    assert set(seen) == {(torch.float32, torch.float32)}
    assert 0 < relative_error(got, exact) <= allowed


def test_a_pipeline_in_bfloat16() -> None:
    pipe = make().to(dtype=torch.bfloat16)
    exact = images(make())
    allowed = relative_error(images(pipe).float(), exact)
    accelerate(pipe)
    got = images(pipe)
    assert got.dtype == torch.bfloat16
    assert relative_error(got.float(), exact) <= 2 * allowed


def test_the_network_has_the_same_parameters() -> None:
    pipe = make()
    unet = pipe.unet
    accelerate(pipe)
    assert isinstance(pipe.unet, diffusers.UNet2DModel)
    assert [(name, id(p)) for name, p in pipe.unet.named_parameters()] == [(name, id(p)) for name, p in unet.named_parameters()]
    assert pipe.unet.config == unet.config
    assert list(pipe.unet.state_dict()) == list(unet.state_dict())


@pytest.mark.parametrize("freeze", [True, False])
def test_an_accelerated_network_trains(freeze: bool) -> None:
    """If gradients are recorded, the network is not its inference form."""
    unet = make_unet().double()
    gradients = []
    for network in (unet, accelerate(make(unet=unet), freeze=freeze).unet):
        x = torch.linspace(-1, 1, 1024, dtype=torch.float64).reshape(2, 2, 16, 16).requires_grad_()
        unet.zero_grad()
        network(x, 3).sample.square().mean().backward()
        gradients.append([x.grad, *(parameter.grad.clone() for parameter in unet.parameters())])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


def test_pipelines_may_share_an_accelerated_network() -> None:
    first = accelerate(make("DDPM"))
    shared = first.unet
    second = diffusers.DDIMPipeline(**first.components)
    expected = images(second)
    assert_same(images(accelerate(second)), expected)
    assert restore(second).unet is shared
    assert first.unet is shared


def test_timesteps_between_those_of_the_schedule() -> None:
    pipe = make()
    x, t = torch.ones(2, 2, 16, 16), torch.tensor([3.5, 700.25])
    with torch.no_grad():
        expected = pipe.unet(x, t).sample
        assert_same(accelerate(pipe).unet(x, t).sample, expected)


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("write", ["optimizer", "data", "replaced", "load_state_dict"])
def test_what_happens_to_the_weights_later_counts(write: str, freeze: bool) -> None:
    pipe = make()
    unet = pipe.unet
    accelerate(pipe, freeze=freeze)
    before = images(pipe)
    if write == "optimizer":
        optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
        unet(torch.ones(1, 2, 16, 16), 3).sample.square().mean().backward()
        optimizer.step()
    elif write == "data":  # as diffusers' EMAModel does it
        for parameter in unet.parameters():
            parameter.data.copy_(parameter.data * 0.9)
    elif write == "replaced":
        unet.conv_out.weight = nn.Parameter(unet.conv_out.weight.detach() * 0.9)
    else:
        unet.load_state_dict({name: value * 0.9 for name, value in unet.state_dict().items()})
    after = images(pipe)
    assert relative_error(after, before) > 1e-3
    assert_same(after, images(restore(pipe)))


def with_processor(processor: Any) -> Callable[[Any], Any]:
    return lambda unet: [layer.set_processor(processor) for layer in unet.modules() if isinstance(layer, Attention)]


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
def test_every_write_to_the_weights_counts(write: str) -> None:
    pipe = accelerate(make())
    before = images(pipe)
    WRITES[write](pipe.unet)
    after = images(pipe)
    assert relative_error(after, before) > 1e-4
    assert_same(after, images(restore(pipe)))


def frozen_networks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that receives the networks that pipelines freeze."""
    module = importlib.import_module("ddpm_fast.integrations.accelerate")
    made = []

    def freeze(*args: Any, **kwargs: Any) -> Any:
        made.append(real(*args, **kwargs))
        return made[-1]

    real = module.freeze
    monkeypatch.setattr(module, "freeze", freeze)
    return made


def test_the_frozen_network_is_kept_from_call_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = frozen_networks(monkeypatch)
    pipe = accelerate(make())
    first = images(pipe)
    assert torch.equal(images(pipe), first)
    pipe.unet.train()  # which changes nothing here
    pipe.unet.enable_gradient_checkpointing()
    with_processor(AttnProcessor())(pipe.unet)
    assert torch.equal(images(pipe), first)
    assert len(frozen) == 1
    pipe.unet.conv_out.weight.data.mul_(2)
    images(pipe)
    assert len(frozen) == 2
    pipe.to(torch.float64)
    images(pipe)
    assert [network.dtype for network in frozen] == [torch.float32, torch.float32, torch.float64]


@pytest.mark.parametrize("changes", [{"downsample_type": "resnet"}, {"upsample_type": "resnet"}], ids=str)
def test_blocks_that_resample_are_frozen(changes: dict[str, str]) -> None:
    pipe = make(unet=make_unet(**changes))
    expected = images(pipe)
    assert_same(images(accelerate(pipe)), expected)  # a warning would be an error


@torch.no_grad()
def test_the_network_may_be_called_by_itself() -> None:
    """A user's loop may pass class labels and take the result without an object around it."""
    unet = make_unet("class-conditional")
    x, t, labels = make_inputs(unet.config, 2)
    expected = unet(x, t, labels).sample
    pipe = accelerate(make(unet=unet))
    assert_same(pipe.unet(x, t, class_labels=labels).sample, expected)
    assert_same(pipe.unet(x, t, labels, return_dict=False)[0], expected)


def test_dropout_goes_by_the_mode_of_the_network_that_is_not_frozen() -> None:
    pipe = accelerate(make(unet=make_unet(dropout=0.5)), freeze=False)
    unet = pipe.parts.own["unet"]
    expected = images(pipe)
    unet.train()
    torch.manual_seed(0)
    assert relative_error(images(pipe), expected) > 1e-2
    unet.eval()
    assert torch.equal(images(pipe), expected)


def test_a_copy_is_accelerated_and_apart() -> None:
    pipe = accelerate(make())
    expected = images(pipe)
    twin = copy.deepcopy(pipe)
    for parameter in pipe.unet.parameters():
        parameter.data.zero_()
    assert torch.equal(images(twin), expected)
    assert_same(images(restore(twin)), expected)


def test_restore_undoes_it() -> None:
    pipe = make()
    unet, scheduler, kind, state, names = pipe.unet, pipe.scheduler, type(pipe), set(vars(pipe)), set(vars(pipe.unet))
    expected = images(pipe)
    accelerate(pipe)
    images(pipe)
    assert restore(pipe) is pipe
    assert (pipe.unet, pipe.scheduler, type(pipe)) == (unet, scheduler, kind)
    assert set(vars(pipe)) == state
    assert set(vars(unet)) == names
    assert torch.equal(images(pipe), expected)
    assert restore(pipe) is pipe  # nothing to undo


def test_restore_keeps_parts_that_were_assigned_meanwhile() -> None:
    pipe = accelerate(make())
    unet = pipe.parts.own["unet"]
    pipe.scheduler = other = diffusers.DDIMScheduler()
    restore(pipe)
    assert pipe.scheduler is other
    assert pipe.unet is unet


def test_accelerating_again_starts_from_the_original() -> None:
    pipe = make()
    unet = pipe.unet
    expected = images(pipe)
    accelerate(pipe, dtype=torch.bfloat16)
    accelerate(pipe)
    assert_same(images(pipe), expected)
    restore(pipe)
    assert pipe.unet is unet


def test_a_fused_network_is_taken() -> None:
    pipe = make()
    expected = images(pipe)
    fuse(pipe.unet)
    assert_same(images(accelerate(pipe)), expected)


# --------------------------------------------------------------------------------------------------------------- attributes


def given(path: str, **attributes: Any) -> Callable[[Any], Any]:
    return lambda unet: [setattr(unet.get_submodule(path), key, value) for key, value in attributes.items()]


def negating(path: str) -> Callable[[Any], Any]:
    return lambda unet: setattr(unet.get_submodule(path), "forward", lambda x: -x)


def tie(unet: Any) -> None:
    unet.mid_block.resnets[1] = unet.mid_block.resnets[0]


def replace(path: str, by: Callable[[], nn.Module]) -> Callable[[Any], Any]:
    return lambda unet: unet.set_submodule(path, by())


class Doubled(AttnProcessor):  # type: ignore[misc]
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
    "padding_mode": (
        given("conv_in", padding_mode="circular"),
        "conv_in.padding_mode is 'circular', its configuration says 'zeros'",
    ),
    "_conv_forward": (
        lambda unet: setattr(unet.conv_in, "_conv_forward", circular(unet.conv_in)),
        "conv_in has an attribute _conv_forward",
    ),
    "dilation": (given("conv_out", dilation=(2, 2), padding=(2, 2)), r"conv_out.padding is (2, 2), its configuration"),
    "eps": (given(f"{RESNET}.norm1", eps=0.5), f"{RESNET}.norm1.eps is 0.5, its configuration says 1e-05"),
    "num_groups": (given("conv_norm_out", num_groups=2), "conv_norm_out.num_groups is 2, its configuration says 8"),
    "output_scale_factor": (given(RESNET, output_scale_factor=2.0), f"{RESNET}.output_scale_factor is 2.0"),
    "skip_time_act": (given(RESNET, skip_time_act=True), f"{RESNET}.skip_time_act is True"),
    "heads": (given(ATTENTION, heads=4), f"{ATTENTION}.heads is 4, its configuration says 1"),
    "rescale_output_factor": (given(ATTENTION, rescale_output_factor=2.0), f"{ATTENTION}.rescale_output_factor is 2.0"),
    "residual_connection": (given(ATTENTION, residual_connection=False), f"{ATTENTION}.residual_connection is False"),
    "processor": (given(ATTENTION, processor=Doubled()), f"{ATTENTION} has a Doubled as its processor"),
    "flip_sin_to_cos": (given("time_proj", flip_sin_to_cos=True), "time_proj.flip_sin_to_cos is True"),
    "downscale_freq_shift": (given("time_proj", downscale_freq_shift=0.0), "time_proj.downscale_freq_shift is 0.0"),
    "scale of time": (given("time_proj", scale=2), "time_proj.scale is 2"),
    "activation": (replace(f"{RESNET}.nonlinearity", nn.GELU), f"{RESNET}.nonlinearity is a GELU, its configuration says SiLU"),
    "activation of time": (replace("time_embedding.act", nn.GELU), "time_embedding.act is a GELU"),
    "activation in place": (given(f"{RESNET}.nonlinearity", inplace=True), f"{RESNET}.nonlinearity.inplace is True"),
    "head's activation": (replace("conv_act", nn.GELU), "conv_act is a GELU"),
    "further layer": (given("time_embedding", post_act=nn.Tanh()), "time_embedding has no attribute post_act"),
    "hook": (
        lambda unet: unet.conv_out.register_forward_hook(lambda module, args, out: -out),
        "conv_out has hooks",
    ),
    "hook before": (
        lambda unet: unet.conv_out.register_forward_pre_hook(lambda module, args: (-args[0],)),
        "conv_out has hooks",
    ),
    "patched forward": (negating("conv_act"), "conv_act has a patched forward"),
    "no bias": (given("conv_out", bias=None), "conv_out.bias is absent, its configuration says it has the shape (2,)"),
    "no affine": (given("conv_norm_out", weight=None, bias=None, affine=False), "conv_norm_out.affine is False"),
    "layer left out": (replace(f"{RESNET}.conv1", nn.Identity), f"{RESNET}.conv1 is a Identity"),
    "tied": (tie, "mid_block.resnets.0 and mid_block.resnets.1 are one layer"),
    "config against layers": (lambda unet: unet.register_to_config(norm_eps=0.5), ".eps is 1e-05, its configuration says 0.5"),
    "unsupported config": (
        lambda unet: unet.register_to_config(class_embed_type="timestep"),
        "expected class_embed_type",
    ),
    "impossible config": (lambda unet: unet.register_to_config(norm_num_groups=3), "UNet: expected block_out_channels to be"),
}
WITHOUT_EFFECT = ("config against layers", "unsupported config", "impossible config")


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_before_is_refused(what: str) -> None:
    change, reason = CHANGES[what]
    pipe = make()
    change(pipe.unet)
    with pytest.raises(ValueError, match=f"^{re.escape(NOT_FOR_UNET)}.*{re.escape(reason)}"):
        accelerate(pipe)


@pytest.mark.parametrize(
    ("what", "freeze"),
    # The same code finds a change before, which has a test of every one. A third of them is quick.
    [
        pytest.param(what, freeze, marks=() if freeze and i % 3 == 0 else pytest.mark.slow)
        for freeze in (True, False)
        for i, what in enumerate(CHANGES)
    ],
)
def test_a_change_afterwards_counts(what: str, freeze: bool) -> None:
    """Diffusers computes the network, and one warning says why. Without the change all is as before."""
    change, reason = CHANGES[what]
    pipe = accelerate(make(), freeze=freeze)
    before = images(pipe)
    change(pipe.unet)
    with pytest.warns(RuntimeWarning) as told:
        after = images(pipe)
    assert torch.equal(images(pipe), after)  # without a second warning, which would be an error
    (message,) = [str(warning.message) for warning in told]
    assert message.startswith("the accelerated pipeline: diffusers computes its network, because ")
    assert reason in message
    assert "ddpm_fast.restore(pipe)" in message
    assert what in WITHOUT_EFFECT or relative_error(after, before) > 1e-4
    assert_same(after, images(restore(pipe)))


def test_a_change_may_be_undone() -> None:
    pipe = accelerate(make())
    before = images(pipe)
    pipe.unet.conv_in.padding_mode = "circular"
    with pytest.warns(RuntimeWarning, match="padding_mode"):
        images(pipe)
    pipe.unet.conv_in.padding_mode = "zeros"
    assert torch.equal(images(pipe), before)


@torch.no_grad()
@pytest.mark.parametrize("freeze", [True, False])
def test_the_network_by_itself_compares_too(freeze: bool) -> None:
    pipe = accelerate(make(), freeze=freeze)
    x, t, _ = make_inputs(pipe.unet.config, 2)
    before = pipe.unet(x, t).sample
    pipe.unet.conv_out.weight.data.neg_()
    assert_same(pipe.unet(x, t).sample, pipe.parts.own["unet"](x, t).sample)
    pipe.unet.conv_in.padding_mode = "circular"
    with pytest.warns(RuntimeWarning, match="padding_mode"):
        after = pipe.unet(x, t).sample
    assert torch.equal(after, pipe.parts.own["unet"](x, t).sample)
    assert relative_error(after, before) > 1e-2


@pytest.mark.parametrize("part", ["view", "own"])
def test_a_configuration_that_layers_do_not_show(part: str) -> None:
    """Both objects have one configuration, so that `restore` keeps it."""
    pipe = accelerate(make())
    before = images(pipe)
    unet = pipe.unet if part == "view" else pipe.parts.own["unet"]
    unet.register_to_config(center_input_sample=True)
    after = images(pipe)
    assert relative_error(after, before) > 1e-2
    assert_same(after, images(restore(pipe)))


def test_global_hooks_count() -> None:
    pipe = accelerate(make())
    before = images(pipe)
    register = nn.modules.module.register_module_forward_hook
    handle = register(lambda module, args, out: -out if isinstance(module, nn.SiLU) else None)
    try:
        with pytest.warns(RuntimeWarning, match="torch's global hooks"):
            after = images(pipe)
        assert_same(after, images(restore(pipe)))
        with pytest.raises(ValueError, match="torch's global hooks"):
            accelerate(pipe)
    finally:
        handle.remove()
    assert relative_error(after, before) > 1e-2
    assert_same(images(accelerate(pipe)), before)


@pytest.mark.parametrize("method", ["forward", "_conv_forward", "__init__"])
def test_patched_classes_count(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A constructor, because one that pads otherwise would make the layers that these are compared with."""
    pipe = accelerate(make())
    images(pipe)
    real = getattr(nn.Conv2d, method)

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return real(self, *args, **kwargs)

    monkeypatch.setattr(nn.Conv2d, method, functools.wraps(real)(patched))
    with pytest.warns(RuntimeWarning, match=f"Conv2d.{method} is patched by test_accelerate"):
        images(pipe)
    with pytest.raises(ValueError, match=f"Conv2d.{method} is patched by test_accelerate"):
        accelerate(make())


HARMLESS: dict[str, Callable[[Any], Any]] = {
    "training": lambda unet: unet.train(),
    "gradient checkpointing": lambda unet: unet.enable_gradient_checkpointing(),
    "AttnProcessor": with_processor(AttnProcessor()),
    "sliced attention": with_processor(SlicedAttnProcessor(1)),
    "upcast": given(ATTENTION, upcast_attention=True, upcast_softmax=False),
    "sample size": lambda unet: unet.register_to_config(sample_size=16, _name_or_path="elsewhere"),
    "frozen parameters": lambda unet: unet.requires_grad_(False),
    "hook of the network": lambda unet: unet.register_forward_hook(lambda *args: None),
    "attribute of the network": lambda unet: setattr(unet, "tag", object()),
    "fused": fuse,
    "dropout's probability": given(f"{RESNET}.dropout", p=0.5),
}


@pytest.mark.parametrize("what", HARMLESS)
def test_harmless_changes_are_taken(what: str) -> None:
    """Without a warning, before and after."""
    pipe = make()
    HARMLESS[what](pipe.unet)
    expected = images(copy.deepcopy(pipe)) if what != "training" else images(make())
    assert_same(images(accelerate(pipe)), expected)
    pipe = accelerate(make())
    images(pipe)
    HARMLESS[what](pipe.unet)
    assert_same(images(pipe), expected)


def test_dropout_that_the_configuration_does_not_give() -> None:
    pipe = accelerate(make(), freeze=False)
    given(f"{RESNET}.dropout", p=0.5)(pipe.unet)
    images(pipe)
    pipe.unet.train()
    torch.manual_seed(0)
    with pytest.warns(RuntimeWarning, match=r"dropout.p is 0.5, its configuration says 0.0"):
        after = images(pipe)
    torch.manual_seed(0)
    assert_same(after, images(restore(pipe)))


def test_weights_that_cannot_be_compared() -> None:
    class Other(Tensor):
        pass

    pipe = make()
    pipe.unet.conv_out.bias = nn.Parameter(pipe.unet.conv_out.bias.detach().as_subclass(Other))  # type: ignore[arg-type]
    expected = images(pipe)
    accelerate(pipe)
    with pytest.warns(RuntimeWarning, match=r"because conv_out\.bias is a Other\. "):
        assert_same(images(pipe), expected)


def test_threads_take_turns_and_each_compares() -> None:
    pipe = accelerate(make())
    x, t, _ = make_inputs(pipe.unet.config, 2)
    got = []

    def evaluate() -> None:
        with torch.no_grad():
            got.append(pipe.unet(x, t).sample)

    with torch.no_grad(), pipe.parts.engine.call():
        before = pipe.unet(x, t).sample
        pipe.unet.conv_out.weight.data.neg_()
        thread = threading.Thread(target=evaluate)
        thread.start()
        assert torch.equal(pipe.unet(x, t).sample, before)  # unsupported, but so it is
    thread.join()
    assert relative_error(got[0], before) > 1e-2


def test_an_accelerated_network_can_be_pickled() -> None:
    pipe = accelerate(make())
    expected = images(pipe)
    pipe.unet = pickle.loads(pickle.dumps(pipe.unet))
    assert torch.equal(images(pipe), expected)


# -------------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", PIPELINES)
def test_what_is_saved_is_diffusers_own(kind: str, tmp_path: Path) -> None:
    pipe = make(kind)
    pipe.save_pretrained(tmp_path / "plain")
    accelerate(pipe).save_pretrained(tmp_path / "ours")
    files = sorted(path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*") if path.is_file())
    assert len(files) == 4
    for file in files:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    assert type(pipe.scheduler).__module__ == "ddpm_fast.integrations.diffusers"  # accelerated still
    again = type(make(kind)).from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler).__module__.startswith("diffusers.")
    assert_same(images(pipe), images(again))


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


def test_a_folder_in_googles_layout(tmp_path: Path) -> None:
    folder = tmp_path / "ddpm"
    write_google_folder(folder)
    pipe = diffusers.DDPMPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    expected = images(pipe)
    assert_same(images(make(unet=make_unet(attention_head_dim=None), variance_type="fixed_large")), expected)
    assert_same(images(accelerate(pipe)), expected)


# ------------------------------------------------------------------------------------------------------------------- philox


@pytest.mark.parametrize("kind", PIPELINES)
def test_with_philox_an_image_is_the_same_in_any_batch(kind: str) -> None:
    pipe = accelerate(make(kind), noise="philox")
    arguments = {"eta": 1.0} if kind == "DDIM" else {}
    four = images(pipe, 4, **arguments)
    assert_same(images(pipe, 1, **arguments), four[:1])
    assert_same(images(pipe, 3, **arguments), four[:3])
    one, two = images(pipe, generator=[generator(5), generator(6)], **arguments)
    assert_same(images(pipe, generator=[generator(6), generator(5)], **arguments), torch.stack([two, one]))
    assert relative_error(one, two) > 0.1
    assert pipe.scheduler.seeds is None


def test_with_philox_a_generator_goes_on() -> None:
    pipe = accelerate(make(), noise="philox")
    g = generator()
    first, second = images(pipe, generator=g), images(pipe, generator=g)
    assert relative_error(first, second) > 0.1
    torch.manual_seed(1)
    first = images(pipe, generator=None)
    torch.manual_seed(1)
    assert torch.equal(images(pipe, generator=None), first)


# ------------------------------------------------------------------------------------------------------------------- errors


class Custom(diffusers.DDPMPipeline):  # type: ignore[misc, name-defined]
    def __call__(self, count: int) -> Any:
        return super().__call__(count)


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


ERRORS: list[tuple[str, Callable[[], Any], dict[str, Any], type[Exception], str]] = [
    (
        "no pipeline",
        make_unet,
        {},
        TypeError,
        "accelerate: expected pipe to be a DDPMPipeline or a DDIMPipeline, got UNet2DModel",
    ),
    ("noise", make, {"noise": "cuda"}, ValueError, "accelerate: expected noise to be one of torch, philox, got 'cuda'"),
    ("freeze", make, {"freeze": 1}, TypeError, "accelerate: expected freeze to be a bool, got int"),
    (
        "dtype",
        make,
        {"dtype": torch.int32},
        TypeError,
        "accelerate: expected dtype to be float32, float64, float16, bfloat16 or None, got torch.int32",
    ),
    (
        "dtype, not frozen",
        make,
        {"dtype": torch.bfloat16, "freeze": False},
        ValueError,
        "accelerate: expected dtype to be None or the network's, torch.float32, with freeze=False, which shares its weights, "
        "got torch.bfloat16",
    ),
    (
        "call",
        lambda: Custom(unet=make_unet(), scheduler=diffusers.DDPMScheduler()),
        {"noise": "philox"},
        ValueError,
        'accelerate: expected the call of pipe to have batch_size and generator for noise="philox", got a Custom without',
    ),
    (
        "compiled",
        part("unet", lambda pipe: torch.compile(pipe.unet, backend="eager")),
        {},
        TypeError,
        "accelerate: expected pipe.unet to be a UNet2DModel, got OptimizedModule; ddpm_fast.fuse takes any",
    ),
    (
        "configuration",
        part("unet", lambda pipe: make_unet(act_fn="gelu")),
        {},
        ValueError,
        f"{NOT_FOR_UNET}UNet: expected act_fn to be 'silu' or 'swish', got 'gelu'",
    ),
    (
        "layer",
        changed(lambda pipe: setattr(pipe.unet, "conv_in", nn.Sequential(pipe.unet.conv_in))),
        {},
        ValueError,
        f"{NOT_FOR_UNET}conv_in is a Sequential, its configuration says Conv2d",
    ),
    (
        "hook",
        changed(lambda pipe: pipe.unet.conv_out.register_forward_hook(lambda *args: None)),
        {},
        ValueError,
        f"{NOT_FOR_UNET}conv_out has hooks",
    ),
    ("patch", changed(_offloaded), {}, ValueError, f"{NOT_FOR_UNET}mid_block has a patched forward (offloading does that)"),
    (
        "processor",
        changed(lambda pipe: setattr(pipe.unet.mid_block.attentions[0], "processor", nn.Identity())),
        {},
        ValueError,
        f"{NOT_FOR_UNET}mid_block.attentions.0 has a Identity as its processor",
    ),
    (
        "scheduler",
        part("scheduler", lambda pipe: diffusers.PNDMScheduler()),
        {},
        TypeError,
        "accelerate: expected pipe.scheduler to be a DDPMScheduler, a DDIMScheduler, a DPMSolverMultistepScheduler or a "
        "DDIMInverseScheduler, got PNDMScheduler",
    ),
    (
        "scheduler's configuration",
        part("scheduler", lambda pipe: diffusers.DPMSolverMultistepScheduler(solver_order=3)),
        {},
        ValueError,
        "accelerate: expected pipe.scheduler to have a supported configuration, got: DPMSolverMultistepScheduler: expected",
    ),
    (
        "scheduler's configuration",
        part("scheduler", lambda pipe: diffusers.DDPMScheduler(beta_end=3.0)),
        {},
        ValueError,
        "accelerate: expected pipe.scheduler to have a supported configuration, got: ",
    ),
]


@pytest.mark.parametrize(("what", "pipe", "arguments", "error", "message"), ERRORS, ids=[case[0] for case in ERRORS])
def test_what_it_cannot_take_is_named(
    what: str, pipe: Callable[[], Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    made = pipe()
    state = dict(vars(made))
    with pytest.raises(error, match="^" + re.escape(message)) as raised:
        accelerate(made, **arguments)
    assert what == "scheduler's configuration" or str(raised.value) == message
    assert {name: value for name, value in vars(made).items() if name in state} == state  # left as it was


def test_restore_takes_pipelines_only() -> None:
    with pytest.raises(TypeError, match=r"^restore: expected pipe to be a DDPMPipeline or a DDIMPipeline, got dict$"):
        restore({})


def test_philox_with_a_list_of_generators_of_another_length() -> None:
    pipe = accelerate(make(), noise="philox")
    assert torch.equal(images(pipe, generator=[generator()]), images(pipe))  # as diffusers takes a list of one
    with pytest.raises(ValueError, match=r"^the accelerated pipeline: expected generator to be a list of 3, got 2$"):
        images(pipe, 3, generator=[generator(), generator()])
