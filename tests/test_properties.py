"""Properties that hold for any values, shapes and options. Hypothesis draws them, and shrinks what breaks one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from op_calls import make_call
from op_cases import SCHEDULE, Case
from parity import Expected, evaluate
from torch import Tensor

from ddpm_fast import (
    NoiseSchedule,
    SamplingPlan,
    UNet,
    ddim_plan,
    ddpm_plan,
    dpm_solver_plan,
    heun_plan,
)
from ddpm_fast.nn import UNetConfig
from ddpm_fast.ops import why_not
from ddpm_fast.predictions import TARGETS
from ddpm_fast.schedule.noise_schedule import BUILDERS

hypothesis = pytest.importorskip("hypothesis")
providers = pytest.importorskip("hypothesis.internal.conjecture.providers")

from hypothesis import assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

# The same examples in every run, without a time limit or a folder of earlier failures.
hypothesis.settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=100,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("fixed")
# Constants of loaded modules would become examples, which would then depend on the tests that ran before.
providers.is_local_module_file = lambda _: False

NARROW = (torch.float32, torch.bfloat16, torch.float16)  # float64 has no wider truth to compare with
SIZES = st.integers(1, 9)


# --------------------------------------------------------------------------------------------------------------------- ops


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a case of one of the elementwise ops or of the norm, in any shape."""
    op = draw(st.sampled_from(["q_sample", "reverse_step", "denoising_loss", "group_norm_silu"]))
    groups = draw(st.integers(1, 5))
    channels = groups * draw(st.integers(1, 6))
    shape = (draw(st.integers(1, 4)), channels, *draw(st.lists(SIZES, max_size=3)))
    options: dict[str, Any] = {"strided": draw(st.booleans())}
    if op == "group_norm_silu":
        assume(channels // groups * math.prod(shape[2:]) > 1)  # one value has no variance
        options |= {"groups": groups, "activation": draw(st.sampled_from(["silu", None]))}
        options |= {name: draw(st.booleans()) for name in ("affine", "shift", "scale_shift", "float32_parameters")}
    else:
        options["source"] = draw(st.sampled_from(["seeds", "noise"]))
    if op == "reverse_step":
        variance = draw(st.sampled_from(["fixed_small", "fixed_large", "learned", "learned_range"]))
        clip = draw(st.sampled_from([None, 0.5, 1.0]))
        options["plan"] = ddpm_plan(SCHEDULE, draw(st.integers(1, 12)), spacing="linspace", variance=variance, clip=clip)
        options["guidance_scale"] = draw(st.sampled_from([None, 0.0, 1.0, -2.5, 7.5]))
        options |= {"step": draw(st.sampled_from(["device", "sample"])), "return_x_0": draw(st.booleans())}
    if op == "denoising_loss":
        options |= {"prediction": draw(st.sampled_from([*TARGETS])), "weight": draw(st.booleans())}
        options["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
    return Case(op, "drawn", shape, options)


@settings(max_examples=250)
@given(case=cases(), dtype=st.sampled_from(NARROW), channels_last=st.booleans())
def test_kernels_agree_with_the_reference_on_any_shape(case: Case, dtype: torch.dtype, channels_last: bool) -> None:
    reason = why_not("native", case.op, torch.device("cpu"), dtype)
    if reason is not None:
        pytest.skip(reason)
    call = make_call(case, dtype, channels_last=channels_last and len(case.shape) == 4)
    expected, got = Expected(case, call), evaluate(call, "native")
    if case.op not in ("q_sample", "reverse_step"):
        # Gradients of the others are sums that may cancel. Few values then make a lucky reference. test_parity has them.
        expected.truth, got = replace(expected.truth, grads={}), replace(got, grads={})
    expected.check(got)


# ----------------------------------------------------------------------------------------------------- schedules and plans


@st.composite
def schedules(draw: st.DrawFn) -> NoiseSchedule:
    name = draw(st.sampled_from(BUILDERS))
    if name == "from_betas":
        return NoiseSchedule.from_betas(draw(st.lists(st.floats(1e-5, 0.99), min_size=1, max_size=40)))
    options: dict[str, Any] = {"num_timesteps": draw(st.integers(1, 300))}
    if name in ("linear", "scaled_linear", "sigmoid_betas"):
        options |= {"beta_start": draw(st.floats(1e-5, 0.5)), "beta_end": draw(st.floats(1e-5, 0.5))}
    if name in ("cosine", "sigmoid", "laplace"):
        options["max_beta"] = draw(st.floats(0.05, 0.999))
    return getattr(NoiseSchedule, name)(**options)  # type: ignore[no-any-return]


def assert_close(actual: Tensor, expected: Tensor | float, scale: Tensor | float = 1.0) -> None:
    """Compare float64 values up to roundings of numbers as large as `scale`."""
    assert bool(((actual - expected).abs() <= 1e-11 * torch.as_tensor(scale).abs().clamp(min=1)).all())


@given(schedules())
def test_schedules_have_the_identities_of_the_posterior(schedule: NoiseSchedule) -> None:
    """q(x_{t-1} | x_0) follows from q(x_t | x_0) and the posterior of eq. 7-8, here in variance."""
    s, abar, before = schedule, schedule.alpha_bars, schedule.alpha_bars_prev
    assert bool((abar.diff() < 0).all())
    assert bool(((abar[:-1] > 0) & (abar < 1).all()).all())
    assert bool(abar[-1] > 0) != (schedule.name == "flow")  # whose last timestep holds noise alone
    assert_close(s.posterior_variance + s.posterior_mean_coef_x_t.square() * (1 - abar), 1 - before)
    assert s.posterior_variance[0] == 0
    assert NoiseSchedule.from_config(json.loads(json.dumps(schedule.to_config()))) == schedule


@st.composite
def plans(draw: st.DrawFn) -> tuple[SamplingPlan, bool]:
    """Draw a plan without a clip, so that a step is linear in x_t and the prediction, and whether its sigma^2 is beta."""
    schedule = draw(schedules())
    assume(schedule.name != "flow")  # epsilon does not determine x_0 at its last timestep
    options: dict[str, Any] = {"num_steps": draw(st.integers(1, schedule.num_timesteps)), "clip": None}
    options["spacing"] = draw(st.sampled_from(["leading", "trailing", "linspace"]))
    kind = draw(st.sampled_from(["fixed_small", "fixed_large", "ddim"]))
    if kind == "ddim":
        return ddim_plan(schedule, **options, eta=draw(st.floats(0, 1))), False
    return ddpm_plan(schedule, **options, variance=kind), kind == "fixed_large"


@given(plans())
def test_steps_lead_from_each_noise_level_to_the_next(drawn: tuple[SamplingPlan, bool]) -> None:
    """x_t of any x_0 and epsilon, with the true epsilon as the prediction, becomes x_s with the signal and noise of s."""
    plan, has_beta = drawn
    abar = plan.schedule.alpha_bars[plan.timesteps]
    after = torch.cat([abar[1:], torch.ones(1, dtype=torch.float64)])
    _, _, _, k1, k2, _, _, sigma, *_ = plan.coefficients.unbind(1)
    from_epsilon = k1 * (1 - abar).sqrt() + k2
    scale = k1 + k2.abs()  # the two cancel in `from_epsilon`
    assert bool((plan.timesteps.diff() < 0).all())
    assert_close(k1 * abar.sqrt(), after.sqrt(), scale)
    variance = sigma.square()
    if has_beta:  # the upper bound on the posterior's variance
        assert_close(variance[:-1], (1 - abar / after)[:-1])
        variance = (1 - after) / (1 - abar) * (1 - abar / after)
    assert_close(from_epsilon.square() + variance, 1 - after, scale.square())
    assert sigma[-1] == 0
    assert plan.is_random == bool((sigma > 0).any())


@st.composite
def solver_plans(draw: st.DrawFn) -> SamplingPlan:
    """Draw a plan of a solver, with a clip, so that x_0^ has a column of its own."""
    schedule = draw(schedules())
    assume(schedule.num_timesteps >= 3)
    spacing = draw(st.sampled_from(["leading", "trailing", "linspace", "karras"]))
    num_steps = draw(st.integers(1, schedule.num_timesteps - (spacing in ("leading", "linspace"))))
    options: dict[str, Any] = {"spacing": spacing, "prediction": draw(st.sampled_from([*TARGETS]))}
    is_heun = draw(st.booleans())
    assume(schedule.name != "flow" or not (is_heun or spacing == "karras" or options["prediction"] == "epsilon"))  # abar = 0
    if is_heun:
        return heun_plan(schedule, num_steps, **options)
    options |= {"order": draw(st.integers(1, 3)), "solver": draw(st.sampled_from(["midpoint", "heun"]))}
    eta = st.sampled_from([0, 1]) if options["order"] == 3 else st.floats(0, 1)
    options |= {"eta": draw(eta), "final": draw(st.sampled_from(["zero", "sigma_min"]))}
    return dpm_solver_plan(schedule, num_steps, **options)


@given(solver_plans())
def test_solvers_keep_the_signal_and_the_noise_of_each_level(plan: SamplingPlan) -> None:
    """If x_0^ is the true x_0 at each step, x_t = sqrt(abar) x_0 + sqrt(1 - abar) epsilon holds on arrival, with any eta."""
    after = plan.alpha_bars_prev
    abar = torch.cat([plan.schedule.alpha_bars[plan.timesteps[:1]], after[:-1]])
    _, _, k0, k1, _, k3, k4, sigma, *_ = plan.coefficients.unbind(1)
    assert_close(k0 + k1 * abar.sqrt() + k3 + k4, after.sqrt(), 1 + k0.abs() + k3.abs() + k4.abs())
    assert_close((k1 * (1 - abar).sqrt()).square() + sigma.square(), 1 - after)
    assert bool((plan.timesteps.diff() <= 0).all())
    assert k3[0] == k4[0] == 0


# ---------------------------------------------------------------------------------------------------------- configurations


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a configuration of a tiny network. Half of them contradict themselves."""
    levels = draw(st.integers(1, 3))

    def blocks(*kinds: str) -> list[str]:
        return draw(st.lists(st.sampled_from(kinds), min_size=levels, max_size=levels))

    small = st.none() | st.integers(1, 8)
    return {
        "in_channels": draw(st.integers(1, 3)),
        "out_channels": draw(st.integers(1, 3)),
        "layers_per_block": draw(st.integers(1, 2)),
        "block_out_channels": draw(st.lists(st.sampled_from([4, 8, 9]), min_size=levels, max_size=levels)),
        "down_block_types": blocks("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": blocks("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "norm_num_groups": draw(st.sampled_from([1, 2, 4, 3])),
        "attention_head_dim": draw(small),
        "attn_norm_num_groups": draw(small),
        "num_class_embeds": draw(small),
        "time_embedding_dim": draw(small),
        "freq_shift": draw(st.integers(0, 2)),
        "downsample_padding": draw(st.integers(0, 1)),
        "resnet_time_scale_shift": draw(st.sampled_from(["default", "scale_shift"])),
        "add_attention": draw(st.booleans()),
        "center_input_sample": draw(st.booleans()),
    }


@settings(max_examples=60)
@given(configs())
def test_configurations_are_refused_by_name_or_build_a_network(config: dict[str, Any]) -> None:
    try:
        parsed = UNetConfig.from_dict(config)
    except ValueError:
        with pytest.raises(ValueError, match=rf"^UNet: expected (?:{'|'.join(config)}) to be "):
            UNet(**config)
        return
    assert UNetConfig.from_dict(json.loads(json.dumps(parsed.to_dict()))) == parsed
    model = UNet(**config)
    assert model.config == parsed.to_dict()
    x = torch.randn(2, config["in_channels"], 8, 4, generator=torch.Generator().manual_seed(0))
    labels = None if config["num_class_embeds"] is None else torch.zeros(2, dtype=torch.int64)
    assert model(x, 3, labels).shape == (2, config["out_channels"], 8, 4)
