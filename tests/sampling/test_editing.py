"""Variations, interpolation, inversion and inpainting of images."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawing import Gaussian, tiny_unet
from items import read_data
from PIL import Image
from torch import Tensor

from ddpm_fast import (
    NoiseSchedule,
    Sampler,
    SamplingPlan,
    ddim_inversion_plan,
    ddim_plan,
    ddpm_plan,
    dpm_solver_plan,
    heun_plan,
    initial_noise,
    inpaint,
    interpolate,
    invert,
    load_builtin,
    load_image,
    noise,
    repaint_plan,
    sample,
    sample_seeds,
    vary,
)
from ddpm_fast.data.items import read_batch, to_unit_range
from ddpm_fast.reference import STREAM_KNOWN

SCHEDULE = NoiseSchedule.linear()
IMAGES = torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
NETWORK = Gaussian(SCHEDULE, 0.2, 0.5)
PLANS = {
    "ddpm": lambda: ddpm_plan(SCHEDULE, 10),
    "ddim": lambda: ddim_plan(SCHEDULE, 10),
    "dpm_solver": lambda: dpm_solver_plan(SCHEDULE, 10, eta=1.0),
    "karras": lambda: dpm_solver_plan(SCHEDULE, 10, spacing="karras"),
    "heun": lambda: heun_plan(SCHEDULE, 10),
}
QUIET: Any = {"progress": False}


def drawing(plan: SamplingPlan, model: Any = NETWORK, shape: tuple[int, int, int] = (3, 4, 4)) -> Sampler:
    return Sampler(model, plan, shape=shape)


@pytest.mark.parametrize(("strength", "left"), [(0.4, 4), (1.0, 10), (0.01, 1)])  # the least strength changes the image too
@pytest.mark.parametrize("name", PLANS)
def test_a_variation_is_the_rest_of_the_plan_from_the_noised_image(name: str, strength: float, left: int) -> None:
    plan, seeds = PLANS[name](), sample_seeds(3, 2)
    levels = plan.timesteps.unique_consecutive()
    assert len(levels) == 10
    t = int(levels[-left])
    abar = float(plan.alpha_bars[plan.timesteps == t][0])
    start = math.sqrt(abar) * IMAGES + math.sqrt(1 - abar) * initial_noise(IMAGES.shape, seeds)
    expected = sample(NETWORK, plan.starting_at(t), 2, seed=seeds, x_T=start, shape=(3, 4, 4), **QUIET)
    assert torch.equal(vary(drawing(plan), IMAGES, strength, seed=3, **QUIET), expected)


def test_an_image_is_read_in_the_size_and_the_colours_of_the_sampler(tmp_path: Path) -> None:
    sampler, picture = Sampler(tiny_unet(), ddim_plan(SCHEDULE, 2)), Image.new("RGB", (60, 40))
    picture.paste((255, 0, 0), (10, 0, 50, 40))  # the central square
    picture.save(tmp_path / "wide.png")
    for given in (picture, tmp_path / "wide.png", str(tmp_path / "wide.png")):
        image = load_image(given, sampler)
        torch.testing.assert_close(image, torch.full((1, 1, 8, 8), 2 * 76 / 255 - 1))
    assert torch.equal(vary(sampler, image, 0.0, progress=False), image)
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ValueError, match=r"load_image: expected image to be an image, got '.*text\.png': cannot identify"):
        load_image(tmp_path / "text.png", sampler)
    two = Sampler(tiny_unet(in_channels=2, out_channels=2), ddim_plan(SCHEDULE, 2))
    with pytest.raises(ValueError, match=r"load_image: expected sampler to draw pictures, .* got \(2, 8, 8\)"):
        load_image(picture, two)


def test_strength_0_copies_the_images() -> None:
    same = vary(drawing(ddpm_plan(SCHEDULE, 10)), IMAGES, 0.0, **QUIET)
    assert torch.equal(same, IMAGES)
    assert same.data_ptr() != IMAGES.data_ptr()


def karras_alpha_bar(betas: np.ndarray, step: int, num_steps: int) -> float:
    """Return abar at a step of Karras's levels, (sigma / alpha)^(1/7) evenly spaced (Karras et al. 2022, eq. 5)."""
    abar = np.cumprod(1 - betas)
    high, low = (((1 - a) / a) ** (1 / 14) for a in (abar[-1], abar[0]))
    return float(1 / (1 + (high + step / (num_steps - 1) * (low - high)) ** 14))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("build", [heun_plan, dpm_solver_plan, "slice"])
def test_edits_begin_at_the_noise_level_of_karras_and_not_of_its_rounded_timestep(build: Any, kind: str) -> None:
    schedule = getattr(NoiseSchedule, kind)()
    betas = np.linspace(1e-4, 0.02, 1000)
    if kind == "cosine":
        edges = np.cos((np.linspace(0, 1, 1001) + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - edges[1:] / edges[:-1], 0.999)
    num_steps, z = 20, initial_noise((1, 3, 4, 4), sample_seeds(5, 1))
    seen: list[Tensor] = []

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(x_t.clone())
        return torch.zeros_like(x_t)

    level_errors = []
    for step in range(1, 12):
        first = step
        if build == "slice":
            plan = dpm_solver_plan(schedule, num_steps, spacing="karras", order=1)[step:]
        else:
            levels = build(schedule, num_steps, spacing="karras").timesteps[:: 2 if build is heun_plan else 1]
            first = int((levels == levels[step]).nonzero()[0])  # two levels may share a timestep
            plan = build(schedule, num_steps, spacing="karras", start=int(levels[step]))
        abar = karras_alpha_bar(betas, first, num_steps)
        level_errors.append(abs(float(schedule.alpha_bars[plan.timesteps[0]]) / abar - 1))
        expected = math.sqrt(abar) * IMAGES[:1] + math.sqrt(1 - abar) * z
        seen.clear()
        vary(drawing(plan, network), IMAGES[:1], 1.0, seed=5, **QUIET)
        torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)
        interpolate(drawing(plan, network), IMAGES[:1], IMAGES[:1], 2, strength=1.0, seed=5, **QUIET)
        torch.testing.assert_close(seen[plan.num_steps][:1], expected, rtol=1e-5, atol=1e-5)
    assert max(level_errors) > 0.005  # otherwise the timestep's level would do


def test_an_interpolation_shares_its_noise_and_ends_at_variations() -> None:
    a, b = IMAGES, IMAGES.flip(3)
    plan = ddpm_plan(SCHEDULE, 10)
    between = interpolate(drawing(plan), a, b, 5, seed=1, **QUIET)
    assert between.shape == (2, 5, 3, 4, 4)
    torch.testing.assert_close(between[:, 0], vary(drawing(plan), a, seed=1, **QUIET), rtol=0, atol=0)
    torch.testing.assert_close(between[:, -1], vary(drawing(plan), b, seed=1, **QUIET), rtol=0, atol=0)
    # The best network for normal data is affine, so without a clip the result is affine in the weight.
    linear = interpolate(drawing(ddpm_plan(SCHEDULE, 10, clip=None)), a, b, 3, **QUIET)
    torch.testing.assert_close(linear[:, 1], (linear[:, 0] + linear[:, 2]) / 2, rtol=1e-4, atol=1e-4)


def test_labels_of_pairs_are_those_of_all_their_images() -> None:
    sampler = Sampler(tiny_unet(classes=3), ddpm_plan(SCHEDULE, 4))
    a, b = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)
    between = interpolate(sampler, a, b, 3, class_labels=[0, 2], **QUIET)
    torch.testing.assert_close(between[1:, 0], vary(sampler, a, seed=0, class_labels=[0, 2], **QUIET)[1:])


@pytest.mark.parametrize("told", ["start", "arrival"])
def test_inversion_returns_to_normal_data(told: Any) -> None:
    """With the best network for normal data, DDIM's inversion scales x_0 to x_T, and DDIM scales it back."""
    model = Gaussian(SCHEDULE, 0.0, 0.5)
    x_T = invert(drawing(ddim_inversion_plan(SCHEDULE, 1000, evaluate_at=told, clip=None), model), IMAGES, **QUIET)
    torch.testing.assert_close(x_T, 2 * IMAGES, rtol=0.05, atol=0.02)  # variance 1 for x_0 with variance 1/4
    again = sample(model, ddim_plan(SCHEDULE, 1000, clip=None), 2, x_T=x_T, shape=(3, 4, 4), **QUIET)
    torch.testing.assert_close(again, IMAGES, rtol=0, atol=0.02)


def test_inversion_evaluated_at_the_arrival_equals_its_formula() -> None:
    """A step is x = sqrt(abar') x_0^ + sqrt(1 - abar') epsilon, with epsilon given the timestep of abar' (diffusers)."""
    plan = ddim_inversion_plan(SCHEDULE, 20, evaluate_at="arrival", clip=None)
    x, abar = IMAGES.double(), torch.tensor(1.0, dtype=torch.float64)
    for t in plan.timesteps:
        epsilon = NETWORK(x, t[None].expand(2))
        x_0 = (x - (1 - abar).sqrt() * epsilon) / abar.sqrt()
        abar = SCHEDULE.alpha_bars[t]
        x = abar.sqrt() * x_0 + (1 - abar).sqrt() * epsilon
    assert int(plan.timesteps[-1]) == int(ddim_plan(SCHEDULE, 20).timesteps[0])
    torch.testing.assert_close(invert(drawing(plan), IMAGES, **QUIET).double(), x, rtol=1e-5, atol=1e-5)


def silhouettes() -> tuple[Tensor, Tensor]:
    """Return a shaded T-shirt, trousers, a dress and a bag, [4, 1, 32, 32] in [-1, 1], and their labels."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    radius, wide = x**2 + (y + 0.2) ** 2, x.abs()
    shirt = (wide < 0.45) & (y > -0.7) & (y < 0.75) | (wide < 0.85) & (y > -0.7) & (y < -0.25)
    trousers = (y.abs() < 0.8) & (wide < 0.4) & ((wide > 0.08) | (y < -0.4))
    dress = (y.abs() < 0.8) & (wide < 0.25 + (y + 0.8) / 8)
    bag = (wide < 0.7) & (y > -0.2) & (y < 0.6) | (radius > 0.25) & (radius < 0.36) & (y < -0.2)
    shade = 0.35 + 0.25 * torch.cos(3 * x) * torch.cos(2 * y)
    black = torch.tensor(-1.0)
    return torch.where(torch.stack([shirt, trousers, dress, bag]), shade, black)[:, None], torch.tensor([0, 1, 3, 8])


def inverted_and_drawn(x_0: Tensor, labels: Tensor, steps: int) -> tuple[float, float]:
    """Return the PSNR in decibels of images that the built-in model inverts and draws again, and a deviation of x_T.

    The deviation is that of pixels that are not black. Where all images are black, no noise follows from them.
    """
    garments = load_builtin()
    forth = garments.sampler(ddim_inversion_plan(garments.objective, steps, evaluate_at="arrival", clip=None))
    x_T = invert(forth, x_0, class_labels=labels, **QUIET)
    again = forth.with_plan(ddim_plan(garments.objective, steps, clip=None))(len(x_0), x_T=x_T, class_labels=labels, **QUIET)
    return 10 * math.log10(4 / float((again - x_0).square().mean())), float(x_T[x_0 > -1].std())


def garments() -> tuple[Tensor, Tensor]:
    """Return images of Fashion-MNIST and their labels, as `silhouettes`."""
    images, labels, _ = read_batch(read_data("fashion-mnist", split="test", image_size=32, first=4), range(4))
    return to_unit_range(images), labels


@pytest.mark.parametrize(
    ("read", "least", "few_deviation", "deviation"),
    [(silhouettes, (27, 36), 0.54, 0.73), pytest.param(garments, (22, 34), 0.68, 1.08, marks=pytest.mark.data_sets)],
)
def test_the_built_in_model_gives_images_back_after_inversion(
    read: Any, least: tuple[float, float], few_deviation: float, deviation: float
) -> None:
    """More steps give silhouettes back more exactly: 27.4 dB, then 36.4.

    An epsilon at the timestep of the start gives 26.5 dB, a clip 13.9, and another class 15.8.
    """
    (few, few_found), (many, found) = (inverted_and_drawn(*read(), steps) for steps in (10, 40))
    assert few > least[0]
    assert many > least[1]
    assert few_found == pytest.approx(few_deviation, abs=0.03)
    assert found == pytest.approx(deviation, abs=0.03)


@pytest.mark.parametrize("name", [*PLANS, "repaint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_the_known_region_is_kept_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    plan = repaint_plan(SCHEDULE, 6, 2, 2) if name == "repaint" else PLANS[name]()
    mask = torch.zeros(1, 1, 4, 4, dtype=dtype)
    mask[..., 1:3, 1:3] = 1
    painted = inpaint(drawing(plan), IMAGES, mask, **QUIET)
    kept = (mask == 0).expand_as(IMAGES)
    assert torch.equal(painted[kept], IMAGES[kept])
    assert not torch.isclose(painted[~kept], IMAGES[~kept]).any()


def test_inpainting_blends_after_each_step_at_its_arrival() -> None:
    """Algorithm 1 of Lugmayr et al. with a plan's rows: the known region has the noise level of the new state."""
    plan = repaint_plan(SCHEDULE, 6, 2, 2)
    mask = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    seeds = sample_seeds(5, 2)
    seen: list[Tensor] = []

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(x_t.clone())
        return NETWORK(x_t, t)  # type: ignore[no-any-return]

    inpaint(drawing(plan, network), IMAGES, mask, seed=seeds, **QUIET)
    assert len(seen) == plan.num_steps
    whole = sample(NETWORK, plan[:1], 2, seed=seeds, shape=(3, 4, 4), **QUIET)
    abar = SCHEDULE.alpha_bars[plan.timesteps[1]]
    known = abar.sqrt() * IMAGES + (1 - abar).sqrt() * noise(IMAGES.shape, seeds, stream=STREAM_KNOWN)
    torch.testing.assert_close(seen[1], torch.lerp(known.float(), whole, mask), rtol=1e-5, atol=1e-5)


def test_what_the_network_draws_never_reaches_the_known_region() -> None:
    images, mask = IMAGES.clone(), torch.zeros(1, 1, 4, 4)
    images[0, 0, 0, 0] = -0.0
    mask[..., 2:] = 1
    corrupt = drawing(ddpm_plan(SCHEDULE, 5), lambda x_t, t: x_t * math.nan)
    painted = inpaint(corrupt, images, mask, **QUIET)
    assert torch.equal(painted[..., :2].view(torch.int32), images[..., :2].view(torch.int32))


FORTH: list[SamplingPlan] = [
    *(ddim_inversion_plan(SCHEDULE, 1, evaluate_at=told) for told in ("start", "arrival")),  # type: ignore[arg-type]
    ddim_inversion_plan(SCHEDULE, 7),
]
BACK: list[SamplingPlan] = [
    ddim_plan(SCHEDULE, 1),
    heun_plan(SCHEDULE, 2),
    dpm_solver_plan(SCHEDULE, 5, spacing="karras", final="sigma_min"),
]


@pytest.mark.parametrize("plan", [*FORTH, *BACK, ddpm_plan(SCHEDULE, 6)[:3]])
def test_directions_of_plans_are_told_apart(plan: SamplingPlan) -> None:
    ways: list[Any] = [(vary, BACK, "from noise to an image"), (invert, FORTH, "from an image to noise")]
    for function, plans, way in ways:
        message = f"{function.__name__}: expected sampler to have a plan {way}"
        with nullcontext() if plan in plans else pytest.raises(ValueError, match=message):
            function(drawing(plan), IMAGES, **QUIET)


def test_the_batch_size_does_not_change_what_is_painted() -> None:
    images = torch.linspace(-1, 1, 5 * 3 * 4 * 4).reshape(5, 3, 4, 4)
    mask = torch.zeros(5, 1, 4, 4)
    mask[..., 2:] = 1
    plan = dpm_solver_plan(SCHEDULE, 5, eta=1.0)
    whole = inpaint(drawing(plan), images, mask, **QUIET)
    assert torch.equal(inpaint(drawing(plan), images, mask, batch_size=2, **QUIET), whole)
    sampler, arguments = Sampler(tiny_unet(classes=3), plan), {"class_labels": [0, 1, 2, 1, 0], **QUIET}
    grey, hole = torch.linspace(-1, 1, 5 * 64).reshape(5, 1, 8, 8), torch.ones(1, 1, 8, 8)
    expected = inpaint(sampler, grey, hole, **arguments)
    torch.testing.assert_close(inpaint(sampler, grey, hole, batch_size=2, **arguments), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(expected, sampler(5, **arguments))  # a hole over everything is sampling


MASK = torch.zeros(1, 1, 4, 4)
HALF = MASK[..., 1:]
NEVER = drawing(ddpm_plan(SCHEDULE), lambda x_t, t: pytest.fail("the network was called"))
INVERTING = NEVER.with_plan(ddim_inversion_plan(SCHEDULE, 5))
REFUSED = [
    (lambda: vary(NEVER, IMAGES, -0.1), r"vary: expected strength to be .* got -0\.1"),
    (lambda: vary(NEVER, IMAGES, 1.1), r"vary: expected strength to be .* got 1\.1"),
    (lambda: vary(NEVER, IMAGES[..., 1:]), r"vary: expected images to be \[N, 3, 4, 4\].*\[2, 3, 4, 3"),
    (lambda: vary(NEVER, IMAGES[..., :0]), r"vary: expected images to be \[N, 3, 4, 4\]"),
    (lambda: vary(NEVER, IMAGES / 0), "vary: expected images to be finite"),
    (lambda: vary(NEVER, IMAGES * 255), r"vary: expected images to be in \[-1, 1\]"),
    (lambda: vary(INVERTING, IMAGES), "vary: expected sampler to have a plan from noise to an image"),
    (lambda: interpolate(NEVER, IMAGES, IMAGES[:1]), "interpolate: expected b to have the shape of a"),
    (lambda: interpolate(NEVER, IMAGES, IMAGES, 1), "interpolate: expected num to be"),
    (lambda: invert(NEVER, IMAGES), "invert: expected sampler to have a plan from an image to noise"),
    (lambda: inpaint(NEVER, IMAGES, HALF), r"inpaint: expected mask to be \[2 or 1, 3 or 1, 4, 4\]"),
    (lambda: inpaint(NEVER, IMAGES, MASK.expand(3, 1, 4, 4)), "inpaint: expected mask to be"),
    (lambda: inpaint(NEVER, IMAGES, MASK.int()), "inpaint: expected mask to be bool or floating"),
    (lambda: inpaint(NEVER, IMAGES, MASK + 1.5), r"inpaint: expected mask to be in 0\.\.1, got .*1\.5"),
    (lambda: inpaint(NEVER, IMAGES, MASK * math.nan), r"inpaint: expected mask to be in 0\.\.1"),
    (lambda: invert(INVERTING, IMAGES[:, :2]), r"invert: expected images to be \[N, 3, 4, 4\]"),
    (lambda: vary(NETWORK, IMAGES), "vary: expected sampler to be a Sampler, got Gaussian"),  # type: ignore[arg-type]
    (lambda: vary(NEVER, IMAGES, class_labels=1), "vary: expected class_labels to be None, as the model takes x_t and t alone"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message.partition(".")[0] for _, message in REFUSED])
def test_bad_arguments_are_named_before_any_work(call: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()
