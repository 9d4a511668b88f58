"""denoising-diffusion-pytorch: its process on a `UNet`, frozen, as a plan, and the files of its Trainer."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from changes import Change, given
from parameters import parametrize
from small_unets import randomise
from torch import Tensor, nn

from ddpm_fast import UNet, ddim_plan, freeze, plan_of, reverse_step, sample
from ddpm_fast.integrations.denoising_diffusion_pytorch import load_checkpoint

theirs = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
GaussianDiffusion = theirs.GaussianDiffusion

OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")
SCHEDULES = ("linear", "cosine", "sigmoid")
T = 40
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def unet(**changes: Any) -> UNet:
    model = UNet(**(SMALL | changes))
    randomise(model)
    return model


def make(model: Any = None, **options: Any) -> Any:
    return GaussianDiffusion(unet() if model is None else model, **{"image_size": 8, "timesteps": T, **options})


class Reweighted(GaussianDiffusion):  # type: ignore[misc, valid-type]
    pass


def drawn(process: Any, n: int = 2) -> Tensor:
    torch.manual_seed(0)
    images: Tensor = process.sample(n)
    return images


SAMPLERS: list[dict[str, Any]] = [
    {},
    {"sampling_timesteps": 7},
    {"sampling_timesteps": 7, "ddim_sampling_eta": 0.7},
]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_frozen_process_draws_the_same_images(sampler: dict[str, Any]) -> None:
    """Untrained weights that predict x_0 do not amplify rounding."""
    process = make(objective="pred_x0", **sampler).eval()
    frozen, expected = freeze(process), drawn(process)
    assert type(frozen) is type(process)
    assert expected.std() > 0.1
    torch.testing.assert_close(drawn(frozen), expected, rtol=0, atol=5e-5)


def assert_plan_follows(process: Any) -> None:
    """Each step begins at the original's state, as an untrained network amplifies rounding from step to step."""
    states: list[Tensor] = []
    hook = process.model.register_forward_pre_hook(lambda model, inputs: states.append(inputs[0].clone()))
    torch.manual_seed(0)
    states.append(process.sample(2) * 2 - 1)
    hook.remove()
    plan, network = plan_of(process), freeze(process).model
    assert len(states) == plan.num_steps + 1
    torch.manual_seed(0)
    assert torch.equal(states[0], torch.randn(2, 2, 8, 8))
    with torch.no_grad():
        for step, t in enumerate(plan.timesteps.tolist()):
            x = states[step]
            output = process.model(x, torch.full((2,), t))
            torch.testing.assert_close(network(x, torch.full((2,), t)), output, rtol=0, atol=2e-5)
            noise = torch.zeros_like(x) if step == plan.num_steps - 1 else torch.randn_like(x)  # draws nothing at the end
            x = reverse_step(x, output, step, plan, noise=noise)
            torch.testing.assert_close(x, states[step + 1], rtol=0, atol=2e-5)


@parametrize(objective=OBJECTIVES, schedule=SCHEDULES, sampler=SAMPLERS)
def test_trajectories_of_plans_are_the_originals(objective: str, schedule: str, sampler: dict[str, Any]) -> None:
    assert_plan_follows(make(objective=objective, beta_schedule=schedule, **sampler).eval())


# what is set in a process that was made -> number of its steps
SWITCHES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "ancestral with fewer": ({}, {"sampling_timesteps": 7}, T),
    "ancestral again": ({"sampling_timesteps": 7}, {"is_ddim_sampling": False}, T),
    "all timesteps of DDIM": ({}, {"is_ddim_sampling": True}, T),
    "fewer of DDIM": ({"sampling_timesteps": 7}, {"sampling_timesteps": 5, "ddim_sampling_eta": 0.5}, 5),
    "first timesteps": ({}, {"num_timesteps": 9}, 9),
    "first timesteps of DDIM": ({"sampling_timesteps": 7}, {"num_timesteps": 9}, 7),
    "training alone": ({}, {"immiscible": True, "offset_noise_strength": 0.1}, T),  # training reads them
}


@pytest.mark.parametrize("what", SWITCHES)
def test_plans_do_what_the_switches_of_a_process_say(what: str) -> None:
    options, attributes, num_steps = SWITCHES[what]
    process = make(**options).eval()
    for name, value in attributes.items():
        setattr(process, name, value)
    assert plan_of(process).num_steps == num_steps
    assert_plan_follows(process)


TABLES = [
    *("alphas_cumprod", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod"),
    *("sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1", "posterior_mean_coef2", "posterior_log_variance_clipped"),
]
# a change to a process, and what is said about it
NO_PLAN: list[tuple[Change, str]] = [
    *(
        (
            lambda process, name=name, factor=factor: process.get_buffer(name).mul_(factor),
            rf"x\.{name} to be what x\.betas give, .* got other values$",
        )
        for name in TABLES
        for factor in (0.995, 1 + 2e-6)
    ),
    (lambda process: process.betas.mul_(0.99), r"x\.alphas_cumprod to be what x\.betas give"),
    (lambda process: process.bfloat16(), r"x\.alphas_cumprod to be what x\.betas give"),
    (given("", objective="pred_score"), r"x\.objective to be one of pred_noise, pred_x0, pred_v, got 'pred_score'$"),
    *(
        (given("", sampling_timesteps=steps), rf"x\.sampling_timesteps to be an integer in 1\.\.40, got {steps}$")
        for steps in (0, 41, 7.0)
    ),
    (given("", __class__=Reweighted), "x to be a GaussianDiffusion itself, .*, got a Reweighted of test_"),
    (
        lambda process: setattr(process, "p_mean_variance", process.p_mean_variance),
        "x to have the methods of its class, got another p_mean_variance$",
    ),
    (given("", self_condition=True), "x to have a network without self-conditioning"),
]


@pytest.mark.parametrize(("change", "message"), NO_PLAN)
def test_processes_that_are_no_plan_are_named(change: Change, message: str) -> None:
    process = make(sampling_timesteps=7)
    change(process)
    with pytest.raises((ValueError, TypeError), match=f"^plan_of: expected {message}"):
        plan_of(process)


def test_what_no_step_reads_may_change() -> None:
    process = make(min_snr_loss_weight=True).double()
    process.loss_weight.mul_(2)
    process.compile(backend="eager")
    assert plan_of(process, 5).num_steps == 5


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timesteps", [2, 40, 1000, 4000])
def test_rounding_of_the_tables_is_no_change(timesteps: int, schedule: str) -> None:
    assert plan_of(make(timesteps=max(timesteps, 21 if schedule == "linear" else 2), beta_schedule=schedule))


def test_a_process_is_no_network_to_sample_with() -> None:
    process = make().eval()
    plan = plan_of(process, 3)
    draw: Any = partial(sample, plan=plan, num_samples=2, shape=(2, 8, 8), progress=False)
    for wrong in (process, freeze(process), Reweighted(unet(), image_size=8, timesteps=T)):
        with pytest.raises(
            TypeError,
            match=r"^sample: expected model to be a network, called as model\(x_t, t\), got a \w+ x: pass x\.model, and "
            r"plan_of\(x\) as the plan$",
        ):
            draw(wrong)

    network = theirs.Unet(8, dim_mults=(1, 2), channels=2).eval()  # is taken as it is
    namesake = copy.deepcopy(network)
    namesake.__class__ = type("GaussianDiffusion", (theirs.Unet,), {})
    for model, same in (
        *((namesake, network), (lambda x_t, t: network(x_t, t), network)),
        (freeze(process).model, partial(process.model)),
    ):
        torch.testing.assert_close(draw(model), draw(same), rtol=0, atol=2e-5)


@pytest.mark.parametrize("num_steps", [1, 7, 50, 250, 411, 413, 999])
def test_ddim_takes_the_timesteps_of_the_original(num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    process = make(timesteps=1000, sampling_timesteps=num_steps)
    expected = plan_of(process).timesteps.tolist()
    told: list[int] = []

    def predictions(x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        told.append(int(t[0]))
        return x, x

    monkeypatch.setattr(process, "model_predictions", predictions)
    process.sample(1)
    assert expected == told


def test_a_plan_may_have_other_steps_than_the_process() -> None:
    process = make(objective="pred_x0")
    assert plan_of(process).num_steps == T
    assert plan_of(process, 9).num_steps == 9
    assert not plan_of(process, 9).is_random
    assert plan_of(process, 9, eta=1.0).is_random
    fewer = make(objective="pred_x0", sampling_timesteps=9)
    assert torch.equal(plan_of(process, 9).coefficients, plan_of(fewer).coefficients)
    ddim = ddim_plan(plan_of(process).schedule, None, spacing=list(range(T))[::-1], prediction="sample", eta=0.0)
    assert torch.equal(plan_of(process, eta=0.0).coefficients, ddim.coefficients)
    with pytest.raises(ValueError, match=r"^plan_of: expected num_steps to be an integer in 1\.\.40, got 41$"):
        plan_of(process, 41)
    process.num_timesteps = T + 1  # more than there are tables for
    with pytest.raises(ValueError, match=r"to be strictly descending timesteps in 0\.\.39, got \[40, 39, "):
        plan_of(process)


def test_their_loss_has_gradients_for_a_unet() -> None:
    process = make(min_snr_loss_weight=True)
    process(torch.zeros(16, 2, 8, 8)).backward()
    assert all(parameter.grad.any() for parameter in process.parameters())


def test_a_frozen_process_is_immutable_and_leaves_its_original() -> None:
    process = make().train()
    process.register_buffer("alias", process.betas, persistent=False)
    frozen = freeze(process, torch.bfloat16)
    assert process.training
    assert isinstance(process.model, UNet)
    assert frozen.model.frozen_unet.dtype == torch.bfloat16
    assert drawn(frozen).dtype == torch.float32
    assert freeze(process).model.dtype == freeze(process).model.frozen_unet.dtype == torch.float32
    assert frozen.model.frozen_unet.num_timesteps == T
    assert list(frozen.parameters()) == []
    twice = {name: 2 * buffer for name, buffer in process.named_buffers()}
    frozen.register_forward_hook(lambda *args: None)
    assert not process._forward_hooks
    for change in (
        *(lambda: frozen.load_state_dict(twice), lambda: frozen.load_state_dict(twice, strict=False)),
        *(frozen.train, frozen.state_dict, frozen.half, lambda: setattr(frozen.model, "channels", 3)),
    ):
        with pytest.raises(
            ValueError, match=r"^FrozenModule: expected evaluation only, because the network is frozen, got .* the UNet from"
        ):
            change()
    assert torch.equal(frozen.betas, process.betas)
    for name, buffer in frozen.named_buffers(remove_duplicate=False):
        buffer.zero_()
        assert process.get_buffer(name).any(), name


def with_circular_padding() -> Any:
    process = make()
    process.model.conv_in.padding_mode = "circular"
    return process


@pytest.mark.parametrize(
    ("make_x", "message"),
    [
        (lambda: theirs.Unet(8, dim_mults=(1, 2)), r"x.* a Unet\b"),
        (
            lambda: make(theirs.Unet(8, dim_mults=(1, 2)), image_size=16),
            r"x\.model to be a ddpm_fast\.UNet, got a Unet, which freeze does not know: train a ddpm_fast\.UNet in",
        ),
        (lambda: make(unet(num_class_embeds=3)), r"x\.model to have no classes, which the process does not know"),
        (with_circular_padding, r".* got one where conv_in.padding_mode is 'circular'"),
    ],
)
def test_networks_that_a_process_cannot_be_frozen_with_are_named(make_x: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^freeze: expected {message}"):
        freeze(make_x())


# ----------------------------------------------------------------------------------------------------------- checkpoints


def save(path: Path, **changes: Any) -> Any:
    """Write a file like their Trainer's. The moving average is half of the weights."""
    process = make()
    ema = theirs.EMA(process)
    with torch.no_grad():
        for parameter in ema.ema_model.parameters():
            parameter.mul_(0.5)
    optimizer = torch.optim.Adam(process.parameters())
    content = {"step": 30, "model": process.state_dict(), "opt": optimizer.state_dict(), "ema": ema.state_dict()}
    torch.save(content | {"scaler": None, "version": "2.3.4"} | changes, path)
    return process


@pytest.mark.parametrize(("weights", "factor"), [({}, 0.5), ({"weights": "ema"}, 0.5), ({"weights": "model"}, 1.0)])
def test_checkpoints_load_with_either_weights(weights: Any, factor: float, tmp_path: Path) -> None:
    saved, process = save(tmp_path / "model-1.pt"), make(UNet(**SMALL))
    assert load_checkpoint(process, str(tmp_path / "model-1.pt"), **weights) == 30
    for name, weight in process.model.named_parameters():
        assert torch.equal(weight, factor * saved.model.get_parameter(name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"opt": argparse.Namespace(a=1)},
            r"to hold tensors and plain values, got a argparse\.Namespace, which needs pickle, and pickle may run any code",
        ),
        ({"model": None}, "to be a Trainer's checkpoint, with step, model and ema, got one with step, model, opt, ema"),
        ({"step": "x"}, "to be a Trainer's checkpoint"),
        ({"model": {}}, r"expected the weights in '.*' to fit the model, got missing alphas_cumprod, .* more"),
        ({"model": make(unet(layers_per_block=2)).state_dict()}, "to fit the model, got unexpected model"),
        ({"model": make(timesteps=T + 1).state_dict()}, r"expected betas to have shape \[40\] \(by the model\), got \[41\]"),
    ],
)
def test_checkpoints_that_do_not_fit_leave_the_model_as_it_was(tmp_path: Path, changes: Any, message: str) -> None:
    save(tmp_path / "model-1.pt", **changes)
    process = make(UNet(**SMALL))
    before = copy.deepcopy(process.state_dict())
    with pytest.raises(ValueError, match="load_checkpoint: .*" + message):
        load_checkpoint(process, tmp_path / "model-1.pt", weights="model")
    for name, tensor in process.state_dict().items():
        assert torch.equal(tensor, before[name])


WHOLE = r"'.*' to be a whole file of torch\.save, got"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(b""), WHOLE),
        (lambda file: file.write_bytes(b"hello"), WHOLE),
        (lambda file: file.write_bytes(file.read_bytes()[:5000]), WHOLE),
        (lambda file: torch.save([1, 2], file), ".* with step, model and ema, got one with no names"),
    ],
)
def test_files_that_are_no_checkpoints(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    save(tmp_path / "model-1.pt")
    damage(tmp_path / "model-1.pt")
    with pytest.raises(ValueError, match=f"load_checkpoint: expected {message}"):
        load_checkpoint(make(), tmp_path / "model-1.pt")


@pytest.mark.parametrize(
    ("process", "weights", "error", "message"),
    [
        (make(), "ema", FileNotFoundError, r"expected path to be a file, got '.*model-1\.pt'"),
        (make(), "average", ValueError, "expected weights to be one of ema, model, got 'average'"),
        (nn.Linear(1, 1), "ema", TypeError, r"expected process to be a GaussianDiffusion of .*, got Linear"),
    ],
)
def test_bad_arguments_are_named(process: Any, weights: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=f"^load_checkpoint: {message}"):
        load_checkpoint(process, tmp_path / "model-1.pt", weights=weights)
