"""`plan_of`: schedulers of diffusers as plans, and schedulers that are no plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import assert_same, diffusers, make, make_unet
from torch import nn

from ddpm_fast import NoiseSchedule, Sampler, ddpm_plan, freeze, load_folder, plan_of, sample, write_samples
from ddpm_fast.integrations.diffusers import PlanScheduler
from ddpm_fast.plan import COLUMNS

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # NumPy's, of diffusers' solver


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
    scheduler = getattr(diffusers, f"{kind}Scheduler")(num_train_timesteps=50)
    scheduler.set_timesteps(**{"timesteps": steps} if isinstance(steps, list) else {"num_inference_steps": steps})
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
    "no timesteps": ("DDPM", assigned(timesteps=None), "to have a supported configuration, got: "),
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
    with pytest.raises(ValueError, match=rf"^plan_of: expected x.* ({message})"):
        plan_of(pipe)


def test_a_scheduler_of_this_package_has_its_plan() -> None:
    plan, pipe = ddpm_plan(NoiseSchedule.cosine(50), 10), make()
    pipe.scheduler = PlanScheduler(plan)
    assert plan_of(pipe) is plan
    assert torch.equal(plan_of(pipe.scheduler, 5).coefficients, ddpm_plan(NoiseSchedule.cosine(50), 5).coefficients)


@pytest.mark.filterwarnings("ignore")  # deprecated schedulers warn
def test_a_saved_scheduler_of_diffusers_has_its_own_levels_or_is_refused(tmp_path: Path) -> None:
    read, refused = set(), {}
    for name in (name for name in dir(diffusers) if name.endswith("Scheduler")):
        try:
            scheduler = getattr(diffusers, name)()
            scheduler.save_pretrained(tmp_path)
        except (TypeError, ImportError, AttributeError):  # it has no defaults, needs another package, or cannot be saved
            continue
        try:
            schedule = NoiseSchedule.from_pretrained(tmp_path)
        except ValueError as error:
            refused[name] = str(error)
            continue
        torch.testing.assert_close(schedule.alpha_bars.float(), scheduler.alphas_cumprod, rtol=0, atol=1e-6)
        read.add(name)
    assert len(read) >= 20
    assert {"FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "CogVideoXDDIMScheduler"} <= refused.keys()
    assert all(
        f"_class_name to be a scheduler of diffusers that has the noise levels of DDPM, such as DDPMScheduler, got '{name}'"
        in said
        for name, said in refused.items()
    )


def test_flow_sigmas_and_files_that_name_no_scheduler_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "scheduler_config.json"
    diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="epsilon").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_flow_sigmas to be false"):
        NoiseSchedule.from_pretrained(tmp_path)
    file.write_text(json.dumps({"beta_schedule": "linear"}))
    with pytest.raises(ValueError, match=r"_class_name to be a scheduler of diffusers .* got None"):
        NoiseSchedule.from_pretrained(tmp_path)
    own = NoiseSchedule.cosine(50)
    file.write_text(json.dumps({"_ddpm_fast": own.to_config()}))
    assert NoiseSchedule.from_pretrained(tmp_path) == own
    file.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "_ddpm_fast": own.to_config()}))
    with pytest.raises(ValueError, match="got 'FlowMatchEulerDiscreteScheduler'"):
        NoiseSchedule.from_pretrained(tmp_path)


def test_a_learned_variance_is_refused(tmp_path: Path) -> None:
    """Diffusers takes its square root, so negative ones give NaN. Here "learned" are logarithms."""
    pipe = make(unet=make_unet(out_channels=4), variance_type="learned")
    wanted = "expected variance_type to be 'learned_range' or fixed, got 'learned'"
    with pytest.raises(ValueError, match=wanted):
        plan_of(pipe.scheduler)
    pipe.scheduler.save_pretrained(tmp_path)
    pipe.unet.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"variance_type to be learned_range or fixed, .* got learned"):
        load_folder(tmp_path)
    file = tmp_path / "scheduler_config.json"  # a file of this package that diffusers has saved again
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_ddpm_fast": NoiseSchedule.linear().to_config()}))
    assert load_folder(tmp_path).objective.variance == "learned"


def test_timesteps_that_diffusers_should_not_list_are_left_out() -> None:
    """Its "trailing" has -1 for some numbers of steps, at which it takes the last abar for the first, and lists some twice."""
    trailing = diffusers.DDPMScheduler(num_train_timesteps=100, timestep_spacing="trailing")
    trailing.set_timesteps(29)
    assert trailing.timesteps.tolist() == [*plan_of(trailing).timesteps.tolist(), -1]
    for config in ({"timestep_spacing": "linspace"}, {"timestep_spacing": "leading"}, {"beta_schedule": "squaredcos_cap_v2"}):
        solver = diffusers.DPMSolverMultistepScheduler(num_train_timesteps=100, lambda_min_clipped=-5.1, **config)
        for steps in range(1, 80):
            solver.set_timesteps(steps)
            assert torch.equal(plan_of(solver).timesteps, solver.timesteps.unique_consecutive())


def test_a_variance_that_is_not_a_number_in_diffusers() -> None:
    """It takes the square root of a logarithm."""
    plans = [plan_of(diffusers.DDPMScheduler(variance_type=f"fixed_large{log}"), 10) for log in ("", "_log")]
    assert torch.equal(*(plan.coefficients for plan in plans))


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_the_last_step_has_no_noise_wherever_it_starts(variance: str) -> None:
    """Ho et al. 2020, Algorithm 2. diffusers leaves it out at t = 0 only: "trailing" ends elsewhere, and so may a list."""
    plan = plan_of(diffusers.DDPMScheduler(timestep_spacing="trailing", variance_type=variance), 10)
    assert plan.timesteps[-1] == 99
    assert plan.coefficients[-1, COLUMNS.index("sigma")] == 0


def test_zero_terminal_snr() -> None:
    """The noise alone does not tell x_0: diffusers divides by 0, and clips what comes of it. The solver has 2^-24 instead."""
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(ValueError, match=r"at timestep 999 \(abar = 0\) with prediction 'epsilon'"):
        plan_of(diffusers.DDPMScheduler(**config), 10)
    assert plan_of(diffusers.DDIMScheduler(**config, prediction_type="v_prediction"), 10).alpha_bars[0] == 0
    for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        solver = diffusers.DPMSolverMultistepScheduler(**config, beta_schedule=schedule, prediction_type="v_prediction")
        assert float(plan_of(solver, 10).alpha_bars[0]) == pytest.approx(2**-24)
        karras = diffusers.DPMSolverMultistepScheduler.from_config(solver.config, use_karras_sigmas=True)
        karras.set_timesteps(20)  # its timesteps depend on the last bits of a rescaled table in float32
        assert torch.equal(plan_of(karras).timesteps, karras.timesteps)


@pytest.mark.parametrize("kind", ["DDPM", "DDIM", "DPMSolverMultistep", "DDIMInverse"])
def test_tables_may_be_moved_and_rounded(kind: str) -> None:
    """Training scripts do so."""
    scheduler = getattr(diffusers, f"{kind}Scheduler")()
    levels = scheduler.alphas_cumprod
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        scheduler.alphas_cumprod = levels.to(dtype)
        assert plan_of(scheduler, 5).num_steps == 5


def test_an_unknown_variance_is_taken_for_fixed_small_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Diffusers does the same, and its tests ask for it."""
    assert plan_of(diffusers.DDPMScheduler(variance_type="other"), 5).variance == "fixed"
    assert "expected variance_type to be one of fixed_small, " in caplog.text


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
        (diffusers.PNDMScheduler(), {}, TypeError, "x to be one of DDPMScheduler, .*, PlanScheduler, got a PNDMScheduler$"),
        (diffusers.DDPMScheduler(), {"eta": 0.5}, ValueError, r"eta to be None for a DDPMScheduler, got 0\.5$"),
        (make("DDIM"), {}, ValueError, "num_steps to be given, or x to have timesteps that were set, got neither"),
        (
            diffusers.DPMSolverMultistepScheduler(use_lu_lambdas=True),
            {"num_steps": 5},
            ValueError,
            "x to have the levels of timestep_spacing or use_karras_sigmas, got use_lu_lambdas",
        ),
        (diffusers.DDPMScheduler(thresholding=True), {}, ValueError, "thresholding to be false"),
        (
            diffusers.DDPMScheduler(beta_end=3.0),
            {},
            ValueError,
            r"beta_end to be positive and at most 1, got 3\.0",
        ),
        (
            diffusers.DDPMScheduler(steps_offset=1),
            {"num_steps": 1000},
            ValueError,
            "timesteps to be strictly descending timesteps in",
        ),
    ],
)
def test_what_is_no_plan_is_named(x: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^plan_of: expected {message}"):
        plan_of(x, **arguments)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers drops it, too
def test_an_algorithm_without_a_plan_is_named() -> None:
    with pytest.raises(ValueError, match=r"^plan_of: expected algorithm_type to be one of dpmsolver\+\+, .*, got dpmsolver$"):
        plan_of(diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"), 5)
