"""The variational bound: against guided-diffusion's figures, and against torch's own KL."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run as run_command
from commands import save_model
from drawing import tiny_unet
from items import read_data
from refusals import by, refused
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from ddpm_fast import NoiseSchedule, Sampler, VariationalBound, ddim_plan, ddpm_plan, load_folder, noise, sample_seeds
from ddpm_fast.data.items import read_batch, to_unit_range
from ddpm_fast.errors import ArgumentError, InvalidType, InvalidValue
from ddpm_fast.reference import philox

T = 30
SCHEDULE = NoiseSchedule.linear(T, beta_start=2e-3, beta_end=0.35)
SHAPE = (3, 2, 5, 5)


def images(n: int = 3) -> Tensor:
    """Random grey levels, black and white among them."""
    shape = (n, *SHAPE[1:])
    words = philox(sample_seeds(1, n), 0, 0, 25)[0] % 256  # [N, 25]
    pixels = words.repeat_interleave(2, dim=1).reshape(shape).to(torch.uint8)
    pixels[:, 0, 0, 0], pixels[:, 1, 2, 3] = 0, 255
    return to_unit_range(pixels, torch.float64)


class Formula(nn.Module):
    """An imperfect network as a formula: the same numbers on every machine."""

    def __init__(self, prediction: str = "epsilon", variance: str = "fixed") -> None:
        super().__init__()
        self.unit = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.prediction, self.variance = prediction, variance

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        u = (t.to(x_t.dtype) / T).reshape(-1, 1, 1, 1)
        m = (0.2 + 0.8 * u) * torch.tanh(x_t) if self.prediction == "epsilon" else (1 - u) * torch.tanh(1.2 * x_t)
        m = self.unit * m
        if self.variance == "learned":
            m = torch.cat([m, torch.cos(3 * x_t) - 4], dim=1)
        if self.variance == "learned_range":
            m = torch.cat([m, torch.sin(3 * x_t)], dim=1)
        return m


def bound_of(
    model: Any,
    x_0: Tensor,
    *,
    prediction: Any = None,
    variance: Any = None,
    clip: float | None = 1.0,
    dtype: Any = None,
    **given: Any,
) -> VariationalBound:
    """The bound with a plan of all timesteps."""
    plan = ddpm_plan(SCHEDULE, prediction=prediction, variance=variance, clip=clip)
    sampler = Sampler(model, plan, shape=x_0.shape[1:], dtype=dtype)
    return VariationalBound.of(sampler, x_0, progress=False, **given)


# Figures of openai/guided-diffusion's GaussianDiffusion.calc_bpd_loop (commit 22e0df8) for `images`, `Formula` and the noise
# of `VariationalBound.of` with seed 0, all in float64: one row an image of total, prior, L_{T-1} + ... + L_1, L_0, and the sums
# over t of xstart_mse and mse. Keys: prediction, variance, clip.
GOLDEN: dict[tuple[str, str, bool], list[list[float]]] = {
    ("epsilon", "fixed_small", True): [
        [11.994919, 0.000503754646, 7.45466604, 4.53974925, 16.9101945, 9.52919134],
        [12.3535123, 0.000518998137, 8.08357619, 4.26941709, 16.3655316, 8.70442289],
        [12.9836174, 0.000580449507, 8.53422463, 4.44881232, 16.9250543, 9.68581812],
    ],
    ("epsilon", "fixed_large", True): [
        [8.57413562, 0.000503754646, 4.03388262, 4.53974925, 16.9101945, 9.52919134],
        [8.24309324, 0.000518998137, 3.97315716, 4.26941709, 16.3655316, 8.70442289],
        [8.64867923, 0.000580449507, 4.19928646, 4.44881232, 16.9250543, 9.68581812],
    ],
    ("epsilon", "fixed_large", False): [
        [10.0908348, 0.000503754646, 5.55058175, 4.53974925, 268.641122, 15.6275859],
        [9.90994432, 0.000518998137, 5.64000823, 4.26941709, 338.194628, 14.9825506],
        [10.3206702, 0.000580449507, 5.89686954, 4.42322022, 310.212476, 16.0950459],
    ],
    ("epsilon", "learned", False): [
        [228.715194, 0.000503754646, 223.228743, 5.48594737, 268.641122, 15.6275859],
        [230.482238, 0.000518998137, 225.035326, 5.44639287, 338.194628, 14.9825506],
        [223.494911, 0.000580449507, 218.099213, 5.39511744, 310.212476, 16.0950459],
    ],
    ("epsilon", "learned_range", True): [
        [10.0945304, 0.000503754646, 5.56255567, 4.53147099, 16.9101945, 9.52919134],
        [9.92758793, 0.000518998137, 5.63982619, 4.28724275, 16.3655316, 8.70442289],
        [11.2670346, 0.000580449507, 6.82947779, 4.43697637, 16.9250543, 9.68581812],
    ],
    ("sample", "fixed_small", True): [
        [13.5597511, 0.000503754646, 7.5923824, 5.9668649, 7.27785649, 9.37306618],
        [14.5734047, 0.000518998137, 8.81964119, 5.75324448, 7.17027154, 8.96586417],
        [14.0039837, 0.000580449507, 8.22752522, 5.77587801, 7.87521059, 9.32168815],
    ],
    ("sample", "learned_range", False): [
        [11.232264, 0.000503754646, 5.35918635, 5.87257393, 7.27785649, 9.37306618],
        [11.3461145, 0.000518998137, 5.67282767, 5.67276781, 7.17027154, 8.96586417],
        [12.2164698, 0.000580449507, 6.51969509, 5.69619424, 7.87521059, 9.32168815],
    ],
}


@pytest.mark.parametrize(("prediction", "variance", "clip"), GOLDEN)
def test_figures_are_guided_diffusions(prediction: Any, variance: Any, clip: bool) -> None:
    model, options = Formula(prediction, variance), {"prediction": prediction, "variance": variance}
    bound = bound_of(model, images(), **options, clip=1.0 if clip else None)
    columns = [
        bound.total,
        bound.prior,
        bound.transitions,
        bound.reconstruction,
        bound.x_0_mse.sum(dim=1),
        bound.epsilon_mse.sum(dim=1),
    ]
    golden = torch.tensor(GOLDEN[prediction, variance, clip], dtype=torch.float64)
    # The original rounds its tables to float32, which the small prior feels most; the figures are printed with 9 digits.
    torch.testing.assert_close(torch.stack(columns, dim=1), golden, rtol=1.5e-7, atol=1.5e-8)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("clip", [None, 0.9])
def test_every_term_is_what_its_definition_says(variance: Any, clip: float | None) -> None:
    """Eq. 9-11 with torch's Normal: the KL of the two Gaussians of eq. 6-8, and the exact mass of a grey level.

    The test above has the sums and the prior.
    """
    x_0, model = images(), Formula(variance=variance)
    bound = bound_of(model, x_0, variance=variance, clip=clip, exact_cdf=True)
    seeds = sample_seeds(0, 3)

    abar = SCHEDULE.alpha_bars
    for t in range(T):
        epsilon = noise(SHAPE, seeds, stream=t, dtype=torch.float64)
        x_t = abar[t].sqrt() * x_0 + (1 - abar[t]).sqrt() * epsilon
        output = model(x_t, torch.full((3,), t)).detach()
        x_0_hat = (x_t - (1 - abar[t]).sqrt() * output[:, :2]) / abar[t].sqrt()
        if clip is not None:
            x_0_hat = x_0_hat.clamp(-clip, clip)
        from_x_0, from_x_t = SCHEDULE.posterior_mean_coef_x_0[t], SCHEDULE.posterior_mean_coef_x_t[t]
        small, large = SCHEDULE.posterior_variance[max(t, 1)], SCHEDULE.betas[t]
        f = (output[:, 2:] + 1) / 2
        variances = {
            "fixed_small": small,
            "fixed_large": large if t > 0 else small,
            "learned": output[:, 2:].exp(),
            "learned_range": large**f * small ** (1 - f),
        }
        p = Normal(from_x_0 * x_0_hat + from_x_t * x_t, variances[variance].sqrt().expand(SHAPE))
        if t > 0:
            term = kl_divergence(Normal(from_x_0 * x_0 + from_x_t * x_t, small.sqrt()), p)
        else:
            upper = torch.where(x_0 == 1, torch.inf, x_0 + 1 / 255)
            lower = torch.where(x_0 == -1, -torch.inf, x_0 - 1 / 255)
            term = -(p.cdf(upper) - p.cdf(lower)).clamp(min=1e-12).log()
        # q_sample's coefficients are rounded to float32.
        torch.testing.assert_close(bound.terms[:, t], term.mean(dim=(1, 2, 3)) / math.log(2), rtol=2e-6, atol=2e-6)
        mse = (x_0_hat - x_0).square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(bound.x_0_mse[:, t], mse, rtol=2e-6, atol=1e-8)
        if clip is None:
            error = (output[:, :2] - epsilon).square().mean(dim=(1, 2, 3))
            torch.testing.assert_close(bound.epsilon_mse[:, t], error, rtol=2e-6, atol=1e-8)


def test_an_image_has_the_same_bound_in_any_batch() -> None:
    model = Formula()
    together = bound_of(model, images(5), seed=3)
    for batch_size in (1, 2, 7):
        chunked = bound_of(model, images(5), seed=3, batch_size=batch_size)
        assert torch.equal(chunked.terms, together.terms)
        assert torch.equal(chunked.prior, together.prior)
    alone = bound_of(model, images(5)[4:], seed=sample_seeds(3, 5)[4:])
    assert torch.equal(alone.terms[0], together.terms[4])
    assert not torch.equal(bound_of(model, images(5), seed=4).terms, together.terms)


def test_a_float32_network_gives_float64_figures_and_stays_as_it_was() -> None:
    model = Formula().float()
    exact = bound_of(Formula(), images())
    bound = bound_of(model, images())
    assert {tensor.dtype for tensor in (bound.terms, bound.prior, bound.x_0_mse, bound.epsilon_mse)} == {torch.float64}
    torch.testing.assert_close(bound.total, exact.total, rtol=1e-5, atol=0)
    half = bound_of(model, images(), dtype=torch.bfloat16)
    assert not torch.equal(half.total, bound.total)
    torch.testing.assert_close(half.total, exact.total, rtol=0.05, atol=0)
    assert (model.training, model.unit.dtype) == (True, torch.float32)


def test_labels_reach_the_network() -> None:
    bound = partial(bound_of, tiny_unet(classes=3).double(), images()[:, :1, :4, :4])
    mixed = bound(class_labels=[2, 0, 3], batch_size=2)
    for row, label in enumerate([2, 0, 3]):
        torch.testing.assert_close(bound(class_labels=label).terms[row], mixed.terms[row])
        assert not torch.allclose(bound(class_labels=1).terms[row], mixed.terms[row])
    torch.testing.assert_close(bound().terms[2], mixed.terms[2])  # 3 is "no label"


X, PAIR = torch.zeros(2), [0, 1]


@pytest.mark.parametrize(
    ("x_0", "options", "error"),
    [
        (
            torch.zeros(2, *SHAPE[1:], dtype=torch.uint8),
            {},
            InvalidType("x_0", "to be float32, float64, float16 or bfloat16", "torch.uint8"),
        ),
        ([0.0], {}, InvalidType("x_0", "to be a tensor", "list")),
        (torch.zeros(0, *SHAPE[1:]), {}, InvalidValue("x_0", "to have values", "shape [0, 2, 5, 5] on cpu")),
        (torch.full((1, *SHAPE[1:]), 255.0), {}, InvalidValue("x_0", "in [-1, 1]", "values from 255 to 255")),
        (torch.full((1, *SHAPE[1:]), math.nan), {}, InvalidValue("x_0", "in [-1, 1]", "values from nan to nan")),
        (torch.zeros(1, 1, 5, 5), {}, InvalidValue("x_0", "to be [N, 2, 5, 5]", "[1, 1, 5, 5]")),
        (images(), {"batch_size": 0}, InvalidValue("batch_size", "to be a positive integer or None", "0")),
        (images(), {"seed": X}, InvalidType("seed", "to be an int64 tensor (see sample_seeds)", "torch.float32")),
        (
            images(),
            {"class_labels": [0, 1]},
            InvalidValue("class_labels", "to be an int or 3 ints", "torch.int64 of shape (2,)"),
        ),
        (
            images(),
            {"guidance_scale": 2.0},
            InvalidType("", "arguments among batch_size, class_labels, condition, progress, seed", "'guidance_scale'"),
        ),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    x_0: Any, options: dict[str, Any], error: ArgumentError, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Formula()
    sampler = Sampler(model, ddpm_plan(SCHEDULE), shape=SHAPE[1:])
    model.forward = None  # type: ignore[assignment]  # not to be called
    with refused(by("VariationalBound.of", error)):
        VariationalBound.of(sampler, x_0, **options)
    assert capsys.readouterr().err == ""  # no progress bar


WHOLE = r"^VariationalBound\.of: expected sampler to have the plan of ddpm_plan at all timesteps, got"
OTHER_PLANS = {
    "few": ddpm_plan(SCHEDULE, 10),
    "ddim": ddim_plan(SCHEDULE, T),
    "rows": replace(ddpm_plan(SCHEDULE)),
}


@pytest.mark.parametrize("plan", OTHER_PLANS.values(), ids=OTHER_PLANS)
def test_other_plans_have_no_bound(plan: Any) -> None:
    sampler = Sampler(Formula(), plan, shape=SHAPE[1:])
    with pytest.raises(ValueError, match=WHOLE):
        VariationalBound.of(sampler, images())


def test_a_network_of_other_channels_is_refused() -> None:
    class Wide(Formula):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            return torch.cat([x_t, x_t], dim=1)

    with pytest.raises(ValueError, match="expected sampler to have a model that returns 2 channels"):
        bound_of(Wide(), images())


def test_repr_is_a_line_of_means() -> None:
    bound = bound_of(Formula(), images())
    figures = [float(figure) for figure in re.findall(r"\d+\.\d+", repr(bound))]
    parts = (bound.total, bound.prior, bound.transitions, bound.reconstruction)
    assert figures == pytest.approx([float(part.mean()) for part in parts], abs=6e-5)
    assert repr(bound).startswith(f"VariationalBound(N = 3, T = {T}; mean bits per dimension: total ")


def test_command_prints_the_parts(tmp_path: Path) -> None:
    model = tiny_unet(10)
    arguments = [
        "evaluate",
        "bound",
        "--model",
        save_model(tmp_path, model, SCHEDULE),
        "--data",
        "digits",
        "--num",
        6,
        "--batch-size",
        4,
        "--seed",
        2,
    ]
    out = tmp_path / "new" / "figures.json"
    printed = run_command(*arguments, "--variance", "fixed_large", "--json", out)
    assert f"{T}/{T}" in printed  # timesteps of all batches, in the progress bar
    figures = json.loads(out.read_text())["bits_per_dim"]
    assert figures["total"] == pytest.approx(figures["prior"] + figures["transitions"] + figures["reconstruction"])
    lines = dict(line.strip().rsplit("  ", 2)[:2] for line in printed.splitlines() if line.startswith("  "))
    shown = {name.strip(): float(value) for name, value in lines.items()}
    names = {f"L_{T}": "prior", f"L_{T - 1} + ... + L_1": "transitions", "L_0": "reconstruction", "total": "total"}
    assert shown == pytest.approx({name: figures[key] for name, key in names.items()}, abs=1e-5)

    written = json.loads(out.read_text())
    assert written | {"weights": load_folder(arguments[3]).digest(), "device": "cpu", "seed": 2, "batch_size": 4} == written
    assert (written["model"], written["dtype"]) == (str(arguments[3]), "float32")
    per_image = written["per_image"]["total"]
    x_0, labels, _ = read_batch(read_data("digits", split="test", image_size=8), range(6))
    bound = bound_of(model, to_unit_range(x_0), variance="fixed_large", class_labels=labels, seed=2, batch_size=4)
    assert per_image == pytest.approx(bound.total.tolist(), rel=1e-6)
    per_timestep = json.loads(out.read_text())["per_timestep"]["terms"]
    assert per_timestep == pytest.approx(bound.terms.mean(dim=0).tolist(), rel=1e-6)
