"""`plan_of`: schedulers of diffusers as plans, and schedulers that are no plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import assert_same, diffusers, generator, images, make, make_unet
from torch import Tensor, nn

from ddpm_fast import Sampler, freeze, plan_of, sample, sample_seeds, write_samples
from ddpm_fast.integrations import diffusers as schedulers

SCHEDULERS: list[tuple[str, dict[str, Any]]] = [
    ("DDPM", {}),
    ("DDIM", {}),
    ("DDIM", {"timestep_spacing": "linspace", "prediction_type": "v_prediction"}),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++", "prediction_type": "v_prediction"}),
    ("DPMSolverMultistep", {"use_karras_sigmas": True, "prediction_type": "v_prediction"}),
]


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # NumPy's, of diffusers' solver
@pytest.mark.parametrize(("kind", "settings"), SCHEDULERS, ids=str)
def test_a_plan_is_what_the_scheduler_does(kind: str, settings: dict[str, Any]) -> None:
    """`sample` draws what the pipeline's loop draws from the same noise."""
    scheduler = getattr(diffusers, f"{kind}Scheduler")(**settings)
    unet = make_unet()
    plan = plan_of(scheduler, 5)
    own = getattr(schedulers, f"{kind}Scheduler").from_config(scheduler.config)
    own.set_timesteps(5)
    own.seeds = sample_seeds(3, 2)
    x = start = torch.randn(2, 2, 16, 16, generator=generator())
    with torch.no_grad():
        for t in own.timesteps:
            x = own.step(unet(x, t).sample, t, x).prev_sample
    got = sample(freeze(unet), plan, 2, seed=3, x_T=start, progress=False)
    assert plan.timesteps.tolist() == own.timesteps.tolist()
    torch.testing.assert_close(got, x, rtol=0, atol=1e-4 * float(x.abs().max()))


def test_options_that_were_changed_later_count() -> None:
    """`from_config` of diffusers takes an option for its default if it was one when the scheduler was made."""
    scheduler, given = diffusers.DDPMScheduler(), diffusers.DDPMScheduler(clip_sample=False, prediction_type="v_prediction")
    scheduler.register_to_config(clip_sample=False, prediction_type="v_prediction")
    plan = plan_of(scheduler, 5)
    assert plan.prediction == "v_prediction"
    assert torch.equal(plan.coefficients, plan_of(given, 5).coefficients)


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # NumPy's, of diffusers' solver
def test_a_plan_takes_the_timesteps_that_are_set() -> None:
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=50)
    assert plan_of(scheduler).num_steps == 50
    scheduler.set_timesteps(10)
    assert plan_of(scheduler).timesteps.tolist() == scheduler.timesteps.tolist()
    scheduler.set_timesteps(timesteps=[40, 20, 3])
    assert plan_of(scheduler).timesteps.tolist() == [40, 20, 3]
    assert plan_of(scheduler, 5).num_steps == 5
    assert scheduler.timesteps.tolist() == [40, 20, 3]
    solver = diffusers.DPMSolverMultistepScheduler(num_train_timesteps=50)
    solver.set_timesteps(7)
    assert plan_of(solver).timesteps.tolist() == solver.timesteps.tolist()
    assert plan_of(make("DDIM"), 7, eta=0.5).is_random
    assert not plan_of(make("DDIM"), 7).is_random
    inverse = diffusers.DDIMInverseScheduler()
    inverse.set_timesteps(5)
    assert plan_of(inverse).timesteps.tolist() == inverse.timesteps.tolist()


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


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # NumPy's, of diffusers' solver
@pytest.mark.parametrize("what", SCHEDULER_CHANGES)
def test_changes_of_a_scheduler_are_named(what: str) -> None:
    kind, change, message = SCHEDULER_CHANGES[what]
    pipe = make()
    pipe.scheduler = getattr(diffusers, f"{kind}Scheduler")()
    pipe.scheduler.set_timesteps(10)
    assert plan_of(pipe).num_steps == 10
    change(pipe.scheduler)
    with pytest.raises(ValueError, match=rf"^freeze: expected x.* ({message})"):
        freeze(pipe)
    with pytest.raises(ValueError, match=rf"^plan_of: expected x.* ({message})"):
        plan_of(pipe)


def test_levels_of_a_scheduler_may_be_moved_and_rounded() -> None:
    """Training scripts do that."""
    pipe = make()
    expected = images(pipe)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.to(dtype)
        frozen = freeze(pipe)
        assert frozen.scheduler.alphas_cumprod is not pipe.scheduler.alphas_cumprod
        assert_same(images(frozen), expected)


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # NumPy's, of diffusers' solver
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("kind", ["DDPM", "DDIM", "DDIMInverse", "DPMSolverMultistep"])
@pytest.mark.parametrize("total", [10, 1000])
def test_levels_of_a_scheduler_may_be_computed_in_another_way(total: int, kind: str, zero_snr: bool) -> None:
    """They may come from its betas in float64, also where float32 has few digits left at zero terminal SNR."""
    settings = {"rescale_betas_zero_snr": zero_snr, "prediction_type": "v_prediction", "num_train_timesteps": total}
    scheduler = getattr(diffusers, f"{kind}Scheduler")(**settings)
    levels = (1 - scheduler.betas.double()).cumprod(0).float()
    if kind == "DPMSolverMultistep" and zero_snr:
        levels[-1] = 2**-24
    scheduler.alphas_cumprod = levels
    assert plan_of(scheduler, 5).num_steps == 5


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("steps", [7, 30, 50])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_ddim_pipelines_draw_the_same_images_in_every_spacing(spacing: str, steps: int, eta: float, clip: bool) -> None:
    """Weights are small, as an untrained network amplifies rounding from step to step."""
    pipe = make("DDIM")
    settings = {"prediction_type": "v_prediction", "clip_sample": clip, "timestep_spacing": spacing}
    pipe.scheduler = diffusers.DDIMScheduler(**settings)
    with torch.no_grad():
        for parameter in pipe.unet.conv_out.parameters():
            parameter.mul_(0.1)
    expected = images(pipe, num_inference_steps=steps, eta=eta)
    assert expected.std() > 0.1
    assert_same(images(freeze(pipe), num_inference_steps=steps, eta=eta), expected)


class Looping(diffusers.DDIMPipeline):  # type: ignore[misc, name-defined]
    """A call that takes the timesteps that are set."""

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for t in self.scheduler.timesteps:
                x = self.scheduler.step(self.unet(x, t).sample, t, x).prev_sample
        return x


def test_timesteps_that_are_set_stay() -> None:
    pipe = Looping(unet=make_unet(), scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction"))
    pipe.scheduler.set_timesteps(5)
    frozen = freeze(pipe)
    assert frozen.scheduler.timesteps.tolist() == pipe.scheduler.timesteps.tolist()
    x = torch.randn(2, 2, 16, 16, generator=generator())
    assert_same(frozen(x), pipe(x))
    assert plan_of(pipe).timesteps.tolist() == pipe.scheduler.timesteps.tolist()


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


def test_what_is_no_plan_is_named() -> None:
    for wrong in ({}, make_unet(), nn.Linear(1, 1)):
        with pytest.raises(TypeError, match=r"^plan_of: expected x to be a scheduler or pipeline of diffusers, or a Gaussian"):
            plan_of(wrong)
    with pytest.raises(TypeError, match=r"^plan_of: expected x to be one of DDPMScheduler, .*, got a PNDMScheduler$"):
        plan_of(diffusers.PNDMScheduler())
    with pytest.raises(ValueError, match=r"^plan_of: expected eta to be None for a DDPMScheduler, got 0\.5$"):
        plan_of(diffusers.DDPMScheduler(), eta=0.5)
    with pytest.raises(
        ValueError, match=r"^plan_of: expected num_steps to be given, or x to have timesteps that were set, got nei"
    ):
        plan_of(make("DDIM"))
    with pytest.raises(ValueError, match=r"^plan_of: expected x to have a supported configuration, got: DPMSolver"):
        plan_of(diffusers.DPMSolverMultistepScheduler(use_lu_lambdas=True))
    with pytest.raises(ValueError, match=r"thresholding"):
        plan_of(diffusers.DDPMScheduler(thresholding=True))
