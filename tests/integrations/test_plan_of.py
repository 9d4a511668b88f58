"""`plan_of`: schedulers of diffusers as plans, and schedulers that are no plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import assert_same, diffusers, images, make, make_unet
from scheduler_pairs import made
from torch import nn

from ddpm_fast import Sampler, freeze, plan_of, sample, sample_seeds, write_samples
from ddpm_fast.integrations import diffusers as schedulers

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # NumPy's, of diffusers' solver

SCHEDULERS: list[tuple[str, dict[str, Any]]] = [
    ("DDPM", {}),
    ("DDIM", {}),
    ("DDIM", {"timestep_spacing": "linspace", "prediction_type": "v_prediction"}),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++", "prediction_type": "v_prediction"}),
    ("DPMSolverMultistep", {"use_karras_sigmas": True, "prediction_type": "v_prediction"}),
]


@pytest.mark.parametrize(("kind", "settings"), SCHEDULERS, ids=str)
def test_a_plan_is_what_the_scheduler_of_this_package_does(kind: str, settings: dict[str, Any]) -> None:
    theirs, ours = (getattr(module, f"{kind}Scheduler")(**settings) for module in (diffusers, schedulers))
    ours.set_timesteps(5)
    plan, wanted = plan_of(theirs, 5), ours.sampling_plan()
    for name in ("timesteps", "coefficients", "alpha_bars", "alpha_bars_prev"):
        assert torch.equal(getattr(plan, name), getattr(wanted, name))


def test_options_that_were_changed_later_count() -> None:
    """`from_config` of diffusers takes an option for its default if it was one when the scheduler was made."""
    scheduler, given = diffusers.DDPMScheduler(), diffusers.DDPMScheduler(clip_sample=False, prediction_type="v_prediction")
    scheduler.register_to_config(clip_sample=False, prediction_type="v_prediction")
    plan = plan_of(scheduler, 5)
    assert plan.prediction == "v_prediction"
    assert torch.equal(plan.coefficients, plan_of(given, 5).coefficients)


@pytest.mark.parametrize(
    ("kind", "steps"), [("DDPM", 10), ("DDPM", [40, 20, 3]), ("DDIM", 10), ("DPMSolverMultistep", 7), ("DDIMInverse", 5)]
)
def test_a_plan_takes_the_timesteps_that_are_set(kind: str, steps: Any) -> None:
    scheduler = made(getattr(diffusers, f"{kind}Scheduler"), steps, num_train_timesteps=50)
    timesteps = scheduler.timesteps.tolist()
    assert plan_of(scheduler).timesteps.tolist() == timesteps
    assert plan_of(scheduler, 5).num_steps == 5
    assert scheduler.timesteps.tolist() == timesteps


def test_a_plan_has_the_default_timesteps_and_an_eta() -> None:
    assert plan_of(diffusers.DDPMScheduler(num_train_timesteps=50)).num_steps == 50
    assert [plan_of(make("DDIM"), 7, eta=eta).is_random for eta in (0.5, 0.0, None)] == [True, False, False]


def assigned(**attributes: Any) -> Callable[[Any], None]:
    return lambda scheduler: vars(scheduler).update(attributes)


# name -> kind of scheduler, a change to it, and what is said about it
SCHEDULER_CHANGES: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "levels": ("DDPM", assigned(alphas_cumprod=torch.linspace(0.9, 0.1, 1000)), "to have the alphas_cumprod of its"),
    "levels of a percent": ("DDIM", lambda s: s.alphas_cumprod.mul_(0.995), "to have the alphas_cumprod of its configuration"),
    "first level": ("DDPM", lambda s: s.alphas_cumprod[:1].mul_(1 - 1e-6), "to have the alphas_cumprod of its configuration"),
    "last level": ("DDPM", lambda s: s.alphas_cumprod[-1:].mul_(1 + 1e-2), "to have the alphas_cumprod of its configuration"),
    "levels in place": ("DDIM", lambda s: s.alphas_cumprod.mul_(0.5), "to have the alphas_cumprod of its configuration"),
    "final level": ("DDIM", assigned(final_alpha_cumprod=torch.tensor(0.5)), "to have the final_alpha_cumprod of its"),
    "sigmas": ("DPMSolverMultistep", lambda s: s.sigmas.mul_(0.5), "to have the sigmas of its configuration"),
    "fewer timesteps": (
        "DDIM",
        lambda s: assigned(timesteps=s.timesteps[:-3])(s),
        "to have the timesteps of its configuration",
    ),
    "last timesteps": ("DPMSolverMultistep", lambda s: assigned(timesteps=s.timesteps[3:])(s), "to have the timesteps of its"),
    "other order": ("DDIMInverse", lambda s: assigned(timesteps=s.timesteps.flip(0))(s), "to have the timesteps of its"),
    "no timesteps": ("DDPM", assigned(timesteps=None), "to have the timesteps of its|to be a "),
    "step": ("DDPM", assigned(step=lambda *args, **kwargs: None), "to have the methods of its class, got another step"),
}


@pytest.mark.parametrize("what", SCHEDULER_CHANGES)
def test_changes_of_a_scheduler_are_named(what: str) -> None:
    kind, change, message = SCHEDULER_CHANGES[what]
    pipe = make()
    pipe.scheduler = getattr(diffusers, f"{kind}Scheduler")()
    pipe.scheduler.set_timesteps(10)
    assert plan_of(pipe).num_steps == 10
    change(pipe.scheduler)
    for call in (freeze, plan_of):
        with pytest.raises(ValueError, match=rf"^{call.__name__}: expected x.* ({message})"):
            call(pipe)


def test_seeds_of_a_scheduler_stay() -> None:
    pipe = make()
    pipe.scheduler = schedulers.DDPMScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.seeds = sample_seeds(0, 2)
    assert_same(images(freeze(pipe)), images(pipe))


def test_frozen_networks_draw_files_and_in_samplers(tmp_path: Path) -> None:
    pipe = make(unet=make_unet(in_channels=3, out_channels=3), num_train_timesteps=20)
    frozen, plan = freeze(pipe), plan_of(pipe)
    sampler = Sampler(frozen.unet, plan)
    assert sampler.network is frozen.unet.frozen_unet
    assert_same(sampler(2, progress=False), sample(freeze(pipe).unet, plan, 2, progress=False))
    for _ in range(2):  # the second goes on with what the first has written
        write_samples(tmp_path / "images.npz", Sampler(freeze(pipe).unet, plan), 2, progress=False)
    with torch.no_grad():
        pipe.unet.conv_out.weight.neg_()
    with pytest.raises(ValueError, match=r"^sample: expected plan to have timesteps below 20, got 999$"):
        sample(frozen.unet, plan_of(diffusers.DDPMScheduler()), 1, progress=False)
    with pytest.raises(ValueError, match="weights"):
        write_samples(tmp_path / "images.npz", Sampler(freeze(pipe).unet, plan), 2, progress=False)


@pytest.mark.parametrize(
    ("x", "arguments", "error", "message"),
    [
        *(
            (wrong, {}, TypeError, "x to be a scheduler or pipeline of diffusers, or a GaussianDiffusion")
            for wrong in ({}, make_unet(), nn.Linear(1, 1))
        ),
        (diffusers.PNDMScheduler(), {}, TypeError, "x to be one of DDPMScheduler, .*, got a PNDMScheduler$"),
        (diffusers.DDPMScheduler(), {"eta": 0.5}, ValueError, r"eta to be None for a DDPMScheduler, got 0\.5$"),
        (make("DDIM"), {}, ValueError, "num_steps to be given, or x to have timesteps that were set, got neither"),
        (
            diffusers.DPMSolverMultistepScheduler(use_lu_lambdas=True),
            {},
            ValueError,
            "x to have a supported configuration, got: DPMSolver",
        ),
        (diffusers.DDPMScheduler(thresholding=True), {}, ValueError, "thresholding to be false"),
    ],
)
def test_what_is_no_plan_is_named(x: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^plan_of: expected {message}"):
        plan_of(x, **arguments)
