"""GaussianDiffusion against denoising-diffusion-pytorch where that is installed, and against its mathematics in float64."""

from __future__ import annotations

import argparse
import copy
import gc
import math
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise as consecutive
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pairwise import pairwise
from small_unets import randomise
from torch import Tensor, nn

import ddpm_fast
from ddpm_fast import UNet, sample_seeds
from ddpm_fast.integrations.lucidrains import GaussianDiffusion, load_checkpoint
from ddpm_fast.reference import STREAM_OFFSET, STREAM_Q_SAMPLE, STREAM_X_T

OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")
SCHEDULES = ("linear", "cosine", "sigmoid")
T = 40
SHAPE = (3, 2, 6, 5)
BUFFERS = 13


class Net(nn.Module):
    """Small, smooth, and dependent on everything that it is given."""

    def __init__(self, self_condition: bool = False) -> None:
        super().__init__()
        self.channels = self.out_dim = SHAPE[1]
        self.self_condition = self_condition
        self.conv_in = nn.Conv2d(self.channels * (2 if self_condition else 1), 8, 3, padding=1)
        self.time = nn.Linear(2, 8)
        self.conv_out = nn.Conv2d(8, self.channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None) -> Tensor:
        if self.self_condition:
            x = torch.cat([torch.zeros_like(x) if x_self_cond is None else x_self_cond, x], dim=1)
        angle = t[:, None].to(x.dtype) / T
        time = self.time(torch.cat([angle.sin(), angle.cos()], dim=1))
        return 2 * self.conv_out(F.silu(self.conv_in(x) + time[:, :, None, None]))


def net(self_condition: bool = False, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net(self_condition).to(dtype)


def make(model: nn.Module | None = None, **options: Any) -> GaussianDiffusion:
    return GaussianDiffusion(net() if model is None else model, **{"image_size": SHAPE[2:], "timesteps": T, **options})


@pytest.fixture
def original() -> ModuleType:
    return pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch")


# -------------------------------------------------------------------------------------------- the mathematics, in float64


class Statement:
    """A GaussianDiffusion by the papers' equations: float64, one formula after the other."""

    def __init__(self, model: nn.Module, objective: str, schedule: str, num_timesteps: int = T) -> None:
        self.model, self.objective, self.total = copy.deepcopy(model).double(), objective, num_timesteps
        u = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
        if schedule == "linear":
            betas = torch.linspace(0.1 / num_timesteps, 20 / num_timesteps, num_timesteps, dtype=torch.float64)
        else:
            if schedule == "cosine":
                abar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            else:
                abar = torch.tensor(3.0).sigmoid() - (6 * u - 3).sigmoid()  # its end has float32's rounding, as the original's
            betas = torch.tensor([1 - float(b) / float(a) for a, b in consecutive(abar)], dtype=torch.float64).clamp(max=0.999)
        self.betas, self.abar = betas, torch.cumprod(1 - betas, 0)

    def x_0(self, x: Tensor, t: int | Tensor, output: Tensor) -> Tensor:
        abar = self.abar[t].reshape(-1, 1, 1, 1)
        if self.objective == "pred_noise":
            return (x - (1 - abar).sqrt() * output) / abar.sqrt()
        return output if self.objective == "pred_x0" else abar.sqrt() * x - (1 - abar).sqrt() * output

    def step(self, x: Tensor, t: int, s: int, x_self_cond: Tensor | None, eta: float | None) -> tuple[Tensor, Tensor]:
        """x_t to x_s, by DDIM with eta or, without, by the posterior (then s = t - 1); s = -1 is x_0."""
        output = self.model(x, torch.full((len(x),), t), x_self_cond)
        x_0 = self.x_0(x, t, output).clamp(-1, 1)
        if s < 0:
            return x_0, x_0
        z = torch.randn(x.shape).double()
        abar, abar_s = self.abar[t], self.abar[s]
        if eta is None:
            beta = self.betas[t]
            mean = abar_s.sqrt() * beta / (1 - abar) * x_0 + (1 - beta).sqrt() * (1 - abar_s) / (1 - abar) * x
            return mean + ((1 - abar_s) / (1 - abar) * beta).sqrt() * z, x_0
        epsilon = (x - abar.sqrt() * x_0) / (1 - abar).sqrt()
        sigma = eta * ((1 - abar_s) / (1 - abar) * (1 - abar / abar_s)).sqrt()
        return abar_s.sqrt() * x_0 + (1 - abar_s - sigma**2).sqrt() * epsilon + sigma * z, x_0

    @torch.no_grad()
    def trajectory(self, x: Tensor, timesteps: list[int], eta: float | None = None) -> list[Tensor]:
        states, x_0 = [x], None
        for t, s in consecutive([*timesteps, -1]):
            x, x_0 = self.step(x, t, s, x_0 if self.model.self_condition else None, eta)
            states.append(x)
        return states

    def weight(self, t: Tensor, gamma: float) -> Tensor:
        snr = self.abar[t] / (1 - self.abar[t])
        return snr.clamp(max=gamma) / {"pred_noise": snr, "pred_x0": torch.ones_like(snr), "pred_v": snr + 1}[self.objective]

    def losses(self, x_0: Tensor, t: Tensor, noise: Tensor, gamma: float = math.inf, conditioned: bool = False) -> Tensor:
        abar = self.abar[t].reshape(-1, 1, 1, 1)
        x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * noise
        v = abar.sqrt() * noise - (1 - abar).sqrt() * x_0
        x_self_cond = self.x_0(x_t, t, self.model(x_t, t, None)).detach() if conditioned else None
        target = {"pred_noise": noise, "pred_x0": x_0, "pred_v": v}[self.objective]
        squares = (self.model(x_t, t, x_self_cond) - target) ** 2
        return squares.mean(dim=(1, 2, 3)) * self.weight(t, gamma)


def descending(num_steps: int) -> list[int]:
    """DDIM's timesteps: floor(k T / S) - 1 for k = S .. 1."""
    return [k * T // num_steps - 1 for k in range(num_steps, 0, -1)]


# -------------------------------------------------------------------------------------------------------------- sampling


@pairwise(objective=OBJECTIVES, schedule=SCHEDULES, self_condition=[False, True], eta=[None, 0.0, 0.6])
def test_trajectories_are_those_of_the_mathematics(
    objective: Any, schedule: Any, self_condition: bool, eta: float | None
) -> None:
    model = net(self_condition)
    steps = {} if eta is None else {"sampling_timesteps": 7, "ddim_sampling_eta": eta}
    diffusion = make(model, objective=objective, beta_schedule=schedule, **steps)
    torch.manual_seed(1)
    states = diffusion.sample(SHAPE[0], return_all_timesteps=True, progress=False)
    following = torch.rand(4)
    torch.manual_seed(1)
    timesteps = list(range(T - 1, -1, -1)) if eta is None else descending(7)
    expected = Statement(model, objective, schedule).trajectory(torch.randn(SHAPE).double(), timesteps, eta)
    assert torch.equal(torch.rand(4), following)  # as many draws
    assert states.shape == (SHAPE[0], len(timesteps) + 1, *SHAPE[1:])
    torch.testing.assert_close(states.double(), (torch.stack(expected, dim=1) + 1) / 2, rtol=0, atol=2e-5)
    torch.manual_seed(1)
    assert torch.equal(diffusion.sample(SHAPE[0], progress=False), states[:, -1])


@pairwise(objective=OBJECTIVES, schedule=SCHEDULES, self_condition=[False, True], eta=[None, 0.0, 0.6])
def test_trajectories_equal_the_originals(
    original: ModuleType, objective: Any, schedule: Any, self_condition: bool, eta: float | None
) -> None:
    torch.manual_seed(0)
    model = original.Unet(8, dim_mults=(1, 2), channels=2, self_condition=self_condition)
    options = {"image_size": 8, "timesteps": 25, "objective": objective, "beta_schedule": schedule}
    if eta is not None:
        options |= {"sampling_timesteps": 4, "ddim_sampling_eta": eta}
    theirs, ours = original.GaussianDiffusion(model, **options), GaussianDiffusion(model, **options)
    torch.manual_seed(1)
    expected = theirs.sample(2, return_all_timesteps=True)
    following = torch.rand(4)
    torch.manual_seed(1)
    torch.testing.assert_close(ours.sample(2, return_all_timesteps=True, progress=False), expected, rtol=0, atol=2e-5)
    assert torch.equal(torch.rand(4), following)


@pytest.mark.parametrize("num_steps", [1, 7, 50, 250, 411, 413, 999])
def test_ddim_takes_the_timesteps_of_the_original(num_steps: int) -> None:
    """A float32 linspace from -1 to T - 1, cut: for some numbers of steps not what `descending` says."""
    edges = torch.linspace(-1, 999, num_steps + 1).int().tolist()
    diffusion = make(timesteps=1000, sampling_timesteps=num_steps)
    assert diffusion.plan.timesteps.tolist() == edges[:0:-1]


def test_p_sample_is_a_step_of_the_loop() -> None:
    diffusion = make(net(self_condition=True))
    torch.manual_seed(3)
    states = diffusion.p_sample_loop(SHAPE, return_all_timesteps=True, progress=False)
    torch.manual_seed(3)
    x, x_0 = torch.randn(SHAPE), None
    for t in reversed(range(T)):
        before = x.clone()
        x_prev, x_0 = diffusion.p_sample(x, t, x_0)
        assert torch.equal(x, before)
        x = x_prev
        torch.testing.assert_close((x + 1) / 2, states[:, T - t], rtol=0, atol=1e-6)
    assert torch.equal(x, x_0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_p_mean_variance_is_the_mean_of_p_sample(objective: Any) -> None:
    diffusion = make(objective=objective)
    x, t = 10 * torch.randn(SHAPE), 17
    times = torch.full(SHAPE[:1], t)
    torch.manual_seed(0)
    x_prev, x_0 = diffusion.p_sample(x, t)
    torch.manual_seed(0)
    with torch.no_grad():
        mean, variance, log_variance, x_start = diffusion.p_mean_variance(x, times)
    torch.testing.assert_close(x_0, x_start, rtol=0, atol=1e-6)
    torch.testing.assert_close(x_prev, mean + variance.sqrt() * torch.randn_like(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(log_variance.exp(), variance)
    with torch.no_grad():
        assert x_start.abs().max() <= 1 < diffusion.p_mean_variance(x, times, clip_denoised=False)[3].abs().max()


def test_the_models_own_output_is_left_alone() -> None:
    """The original clamps x_0 in place, which for "pred_x0" is what the model returned."""
    kept = 3 * torch.ones(SHAPE)

    class Constant(Net):
        def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None) -> Tensor:
            return kept

    diffusion = make(Constant(), objective="pred_x0")
    diffusion.p_mean_variance(torch.randn(SHAPE), torch.full(SHAPE[:1], 5))
    diffusion.p_sample(torch.randn(SHAPE), 5)
    assert (kept == 3).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_model_predictions_agree_with_each_other(objective: Any) -> None:
    diffusion, exact = make(objective=objective), Statement(net(), objective, "sigmoid")
    x, t = torch.randn(SHAPE), torch.tensor([0, 11, T - 2])
    with torch.no_grad():
        output = diffusion.model(x, t, None)
        for clip, rederive in ((False, False), (True, False), (True, True)):
            epsilon, x_0 = diffusion.model_predictions(x, t, clip_x_start=clip, rederive_pred_noise=rederive)
            wanted = exact.x_0(x.double(), t, output.double())
            wanted = wanted.clamp(-1, 1) if clip else wanted
            torch.testing.assert_close(x_0.double(), wanted, rtol=1e-5, atol=1e-5)
            if objective == "pred_noise" and not rederive:
                assert torch.equal(epsilon, output)
            else:
                abar = exact.abar[t].reshape(-1, 1, 1, 1)
                torch.testing.assert_close(
                    epsilon.double(), (x - abar.sqrt() * wanted) / (1 - abar).sqrt(), rtol=1e-4, atol=1e-4
                )


@pytest.mark.parametrize("t", [None, 0, 13])
@pytest.mark.parametrize("self_condition", [False, True])
def test_interpolation_is_that_of_the_mathematics(self_condition: bool, t: int | None) -> None:
    model = net(self_condition)
    x1, x2 = torch.rand(2, *SHAPE) * 2 - 1
    torch.manual_seed(2)
    got = make(model).interpolate(x1, x2, t, 0.3, progress=False)
    torch.manual_seed(2)
    exact, start = Statement(model, "pred_v", "sigmoid"), T - 1 if t is None else t
    abar = exact.abar[start]
    noised = [abar.sqrt() * x.double() + (1 - abar).sqrt() * torch.randn(SHAPE).double() for x in (x1, x2)]
    states = (
        exact.trajectory(0.7 * noised[0] + 0.3 * noised[1], list(range(start - 1, -1, -1)))
        if start
        else [0.7 * noised[0] + 0.3 * noised[1]]
    )
    torch.testing.assert_close(got.double(), states[-1], rtol=0, atol=2e-5)
    torch.manual_seed(2)
    mixed = make(model).interpolate(x1, x2, t, torch.full((SHAPE[0], 1, 1, 1), 0.3), progress=False)
    torch.testing.assert_close(mixed, got, rtol=0, atol=1e-5)


def test_interpolation_equals_the_originals(original: ModuleType) -> None:
    options = {"image_size": SHAPE[2:], "timesteps": T, "objective": "pred_noise", "beta_schedule": "linear"}
    model = net(self_condition=True)
    x1, x2 = torch.rand(2, *SHAPE) * 2 - 1
    torch.manual_seed(2)
    expected = original.GaussianDiffusion(model, **options).interpolate(x1, x2, 25, 0.3)
    torch.manual_seed(2)
    got = GaussianDiffusion(model, **options).interpolate(x1, x2, 25, 0.3, progress=False)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_float64_models_sample_in_float64_and_half_ones_in_float32() -> None:
    double = make(net(dtype=torch.float64)).sample(2, seed=0, progress=False)
    assert double.dtype == torch.float64
    single = make(net()).sample(2, seed=0, progress=False)
    half = make(net(dtype=torch.bfloat16)).sample(2, seed=0, progress=False)
    assert single.dtype == half.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5)
    torch.testing.assert_close(half, single, rtol=0, atol=0.2)
    assert not torch.equal(half, single)


def test_without_auto_normalize_images_are_as_the_model_has_them() -> None:
    a, b = (make(auto_normalize=on).sample(2, seed=1, progress=False) for on in (True, False))
    torch.testing.assert_close(a, (b + 1) / 2)
    img = torch.rand(SHAPE)
    a, b = (
        make()(img, seeds=sample_seeds(0, 3), times=torch.arange(3)),
        make(auto_normalize=False)(img * 2 - 1, seeds=sample_seeds(0, 3), times=torch.arange(3)),
    )
    assert torch.equal(a, b)


# ----------------------------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize("options", [{}, {"sampling_timesteps": 5, "ddim_sampling_eta": 1.0}, {"sampling_timesteps": 5}])
def test_an_image_depends_on_its_own_seed_alone(options: dict[str, Any]) -> None:
    """And leaves torch's generator alone."""
    diffusion = make(Elementwise(), **options)
    before = torch.get_rng_state()
    images = diffusion.sample(5, seed=3, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    one = diffusion.sample(1, seed=sample_seeds(3, 5)[4:], progress=False)
    assert torch.equal(one[0], images[4])
    assert not torch.equal(images[0], images[1])
    assert torch.equal(images, diffusion.sample(5, seed=sample_seeds(3, 5), progress=False))
    pairs = [
        diffusion.interpolate(x, -x, 9, seed=seeds, progress=False)
        for x, seeds in ((torch.ones(5, 2, 6, 5), sample_seeds(3, 5)), (torch.ones(1, 2, 6, 5), sample_seeds(3, 5)[4:]))
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(pairs[0][4:], pairs[1])
    x = torch.randn(5, 2, 6, 5)
    stepped, _ = diffusion.p_sample(x, 9, seeds=sample_seeds(3, 5))
    assert torch.equal(stepped[4:], diffusion.p_sample(x[4:], 9, seeds=sample_seeds(3, 5)[4:])[0])


class Elementwise(Net):
    """So that nothing but the noise can differ from image to image."""

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None) -> Tensor:
        return torch.tanh(x * 0.7)


@pytest.mark.parametrize("options", [{}, {"sampling_timesteps": 5, "ddim_sampling_eta": 1.0}])
def test_seeded_images_are_those_of_the_packages_sampler(options: dict[str, Any]) -> None:
    class TwoArguments(Elementwise):
        def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
            return super().forward(x, t, x_self_cond)

    diffusion = make(TwoArguments(), **options)
    expected = ddpm_fast.sample(diffusion.model, diffusion.plan, 3, seed=8, shape=SHAPE[1:], progress=False)
    assert torch.equal(diffusion.sample(3, seed=8, progress=False), (expected + 1) * 0.5)


def test_interpolation_noises_both_ends_differently() -> None:
    x = torch.zeros(SHAPE)
    seeds = sample_seeds(0, 3)
    got = make().interpolate(x, x, 0, 0.25, seed=0, progress=False)
    a, b = (ddpm_fast.noise(SHAPE, seeds, stream=stream) for stream in (STREAM_Q_SAMPLE, STREAM_X_T))
    torch.testing.assert_close(got, make().sqrt_one_minus_alphas_cumprod[0] * (0.75 * a + 0.25 * b))


# -------------------------------------------------------------------------------------------------------------- training


TRAINING = {
    "plain": {},
    "min-snr": {"min_snr_loss_weight": True, "min_snr_gamma": 2.0},
    "offset": {"offset_noise_strength": 0.3},
    "immiscible": {"immiscible": True, "offset_noise_strength": 0.1},
}


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return [g.double() for g in torch.autograd.grad(loss, list(model.parameters()))]


@pairwise(objective=OBJECTIVES, schedule=SCHEDULES, options=TRAINING, self_condition=[False, True])
def test_losses_and_gradients_are_those_of_the_mathematics(
    objective: Any, schedule: Any, options: dict[str, Any], self_condition: bool
) -> None:
    """Drawn in the original's order: timesteps, noise, offset; and Python's `random` for self-conditioning."""
    model = net(self_condition)
    diffusion, exact = (
        make(model, objective=objective, beta_schedule=schedule, **options),
        Statement(model, objective, schedule),
    )
    torch.manual_seed(4)
    img = torch.rand(SHAPE)
    for seed in (0, 1):  # Python's first number is above 1/2, and below
        torch.manual_seed(5)
        random.seed(seed)
        loss = diffusion(img)
        torch.manual_seed(5)
        random.seed(seed)
        t = torch.randint(0, T, SHAPE[:1])
        noise = torch.randn(SHAPE)
        if "offset_noise_strength" in options:
            noise = noise + options["offset_noise_strength"] * torch.randn(SHAPE[:2])[:, :, None, None]
        x_0 = img.double() * 2 - 1
        if "immiscible" in options:
            noise = noise[nearest(x_0, noise)]
        conditioned = self_condition and random.random() < 0.5
        expected = exact.losses(x_0, t, noise.double(), options.get("min_snr_gamma", math.inf), conditioned).mean()
        torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=0)
        for ours, theirs in zip(gradients(model, loss), gradients(exact.model, expected), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5 * float(theirs.abs().max()))


def nearest(x_0: Tensor, noise: Tensor) -> list[int]:
    """The permutation with the least sum of distances, by trying all."""
    from itertools import permutations

    distance = (x_0.flatten(1)[:, None] - noise.double().flatten(1)[None]).square().sum(2).sqrt().tolist()
    return list(min(permutations(range(len(x_0))), key=lambda p: sum(distance[i][j] for i, j in enumerate(p))))


@pytest.mark.parametrize("options", TRAINING.values(), ids=TRAINING)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_and_gradients_equal_the_originals(original: ModuleType, objective: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = original.Unet(8, dim_mults=(1, 2), channels=2, self_condition=True)
    options = {"image_size": 8, "timesteps": T, "objective": objective} | options
    theirs, ours = original.GaussianDiffusion(model, **options), GaussianDiffusion(model, **options)
    img = torch.rand(4, 2, 8, 8)
    for seed in (0, 1):
        got, expected = [], []
        for diffusion, results in ((ours, got), (theirs, expected)):
            torch.manual_seed(5)
            random.seed(seed)
            arguments: dict[str, Any] = {}
            if ours.immiscible:  # what the original adds to an image is not what it then asks the model for, unless in order
                strength = ours.offset_noise_strength
                noise = torch.randn(4, 2, 8, 8) + strength * torch.randn(4, 2)[:, :, None, None]
                order = ours.noise_assignment(img * 2 - 1, noise)
                assert order.tolist() != [0, 1, 2, 3]
                noise = noise if diffusion is ours else noise[order]
                arguments = {"noise": noise, "offset_noise_strength": 0.0}
            losses = diffusion(img, loss_reduction="none", **arguments)
            results += [losses, *gradients(model, losses.mean())]
        for mine, original_ in zip(got, expected, strict=True):
            mine, original_ = mine.detach(), original_.detach()
            torch.testing.assert_close(mine, original_, rtol=1e-4, atol=2e-6 * max(1, float(original_.abs().max())))


def test_what_immiscible_noise_adds_is_what_the_model_is_asked_for() -> None:
    """A model that finds the noise in x_t has no loss. (The original compares with the noise in its order before.)."""
    x_0 = torch.rand(SHAPE) * 2 - 1

    class Oracle(Net):
        def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None) -> Tensor:
            abar = diffusion.alphas_cumprod[t][:, None, None, None]
            return (x - abar.sqrt() * x_0) / (1 - abar).sqrt()

    diffusion = make(Oracle(), objective="pred_noise", immiscible=True)
    t = torch.full(SHAPE[:1], T // 2)
    noise = torch.randn(SHAPE)
    order = diffusion.noise_assignment(x_0, noise)
    noise = noise[order].roll(1, 0)  # in its order, then in another
    assert diffusion.noise_assignment(x_0, noise).tolist() != [0, 1, 2]
    kept = noise.clone()
    assert diffusion.p_losses(x_0, t, noise).item() < 1e-9
    assert torch.equal(noise, kept)


def test_the_noise_that_is_given_is_left_alone() -> None:
    """The original adds the offset to it in place."""
    noise = torch.randn(SHAPE)
    kept = noise.clone()
    diffusion = make(offset_noise_strength=0.5)
    a = diffusion.p_losses(torch.zeros(SHAPE), torch.arange(3), noise)
    assert torch.equal(noise, kept)
    b = diffusion.p_losses(torch.zeros(SHAPE), torch.arange(3), noise, offset_noise_strength=0.0)
    assert torch.equal(b, make().p_losses(torch.zeros(SHAPE), torch.arange(3), noise))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"offset_noise_strength": 0.3}, {"immiscible": True}])
def test_seeds_in_training_stand_for_noise(options: dict[str, Any]) -> None:
    diffusion, seeds, t = make(**options), sample_seeds(7, 3), torch.tensor([3, 20, 39])
    before = torch.get_rng_state()
    img = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))
    got = diffusion(img, times=t, seeds=seeds)
    assert torch.equal(torch.get_rng_state(), before)
    noise = ddpm_fast.noise(SHAPE, seeds, stream=STREAM_Q_SAMPLE)
    if diffusion.offset_noise_strength:
        noise = noise + 0.3 * ddpm_fast.noise(SHAPE[:2], seeds, stream=STREAM_OFFSET)[:, :, None, None]
    expected = diffusion(img, noise, 0.0, times=t)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(diffusion.q_sample(img, t, seeds=seeds), diffusion.q_sample(img, t, _q_noise(seeds)))


def _q_noise(seeds: Tensor) -> Tensor:
    return ddpm_fast.noise(SHAPE, seeds, stream=STREAM_Q_SAMPLE)


def test_formulas_invert_each_other() -> None:
    diffusion = make()
    x_0, noise, t = torch.rand(SHAPE) * 2 - 1, torch.randn(SHAPE), torch.tensor([0, 10, 25])
    x_t = diffusion.q_sample(x_0, t, noise)
    torch.testing.assert_close(diffusion.predict_start_from_noise(x_t, t, noise), x_0, rtol=0, atol=1e-5)
    torch.testing.assert_close(diffusion.predict_noise_from_start(x_t, t, x_0), noise, rtol=1e-3, atol=1e-4)
    v = diffusion.predict_v(x_0, t, noise)
    torch.testing.assert_close(diffusion.predict_start_from_v(x_t, t, v), x_0, rtol=0, atol=1e-5)
    mean, variance, log_variance = diffusion.q_posterior(x_0, x_t, t)
    assert variance.shape == log_variance.shape == (3, 1, 1, 1)
    torch.testing.assert_close(mean[0], x_0[0])  # at t = 0 the posterior is x_0 itself
    assert variance[0] == 0
    # mu~ of the mean of q(x_t | x_0) is that of q(x_{t-1} | x_0).
    signal = diffusion.sqrt_alphas_cumprod[t][:, None, None, None]
    mean, _, _ = diffusion.q_posterior(x_0, signal * x_0, t)
    torch.testing.assert_close(mean, diffusion.alphas_cumprod_prev[t].sqrt()[:, None, None, None] * x_0)


def test_random_times_are_torchs() -> None:
    diffusion = make()
    torch.manual_seed(0)
    times = diffusion.random_times(1000)
    torch.manual_seed(0)
    assert torch.equal(times, torch.randint(0, T, (1000,)))
    assert set(times.tolist()) == set(range(T))


# ------------------------------------------------------------------------------------------------------------ state_dict


@pairwise(objective=OBJECTIVES, schedule=SCHEDULES, min_snr=[False, True])
def test_state_dicts_go_both_ways(original: ModuleType, objective: Any, schedule: Any, min_snr: bool) -> None:
    options = {"image_size": 8, "objective": objective, "beta_schedule": schedule, "min_snr_loss_weight": min_snr}
    theirs, ours = original.GaussianDiffusion(Net(), **options), GaussianDiffusion(Net(), **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, mine), (_, expected) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=2.0**-22, atol=0, msg=lambda m, name=name: f"{name}: {m}")
    schedule_before = ours.schedule
    ours.load_state_dict(theirs.state_dict())
    assert ours.schedule is schedule_before  # the same, up to float32
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
    fresh = original.GaussianDiffusion(Net(), **options)
    fresh.load_state_dict(ours.state_dict())
    assert torch.equal(fresh.model.conv_in.weight, theirs.model.conv_in.weight)


@pytest.mark.parametrize("kwargs", [{}, {"start": 0, "end": 3, "tau": 0.7, "clamp_min": 1e-4}, {"s": 0.02}])
def test_arguments_of_the_schedule_mean_what_they_do_in_the_original(original: ModuleType, kwargs: dict[str, float]) -> None:
    name: Any = "cosine" if "s" in kwargs else "sigmoid"
    expected = getattr(original, f"{name}_beta_schedule")(300, **kwargs)
    got = make(timesteps=300, beta_schedule=name, schedule_fn_kwargs=kwargs).schedule.betas
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_buffers_are_the_thirteen(objective: Any) -> None:
    diffusion = make(objective=objective, beta_schedule="cosine", min_snr_loss_weight=True)
    exact = Statement(net(), objective, "cosine")
    abar, previous = exact.abar, torch.cat([torch.ones(1, dtype=torch.float64), exact.abar[:-1]])
    beta_tilde = exact.betas * (1 - previous) / (1 - abar)
    expected = {
        "betas": exact.betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": abar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - abar).log(),
        "sqrt_recip_alphas_cumprod": abar.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": ((1 - abar) / abar).sqrt(),
        "posterior_variance": beta_tilde,
        "posterior_log_variance_clipped": beta_tilde.clamp(min=1e-20).log(),
        "posterior_mean_coef1": exact.betas * previous.sqrt() / (1 - abar),
        "posterior_mean_coef2": (1 - exact.betas).sqrt() * (1 - previous) / (1 - abar),
        "loss_weight": exact.weight(torch.arange(T), 5.0),
    }
    buffers = dict(diffusion.named_buffers())
    assert list(buffers) == list(expected)
    assert len(buffers) == BUFFERS
    for name, buffer in buffers.items():
        assert buffer.dtype == torch.float32
        torch.testing.assert_close(buffer.double(), expected[name], rtol=1e-6, atol=0)


def test_a_state_dict_brings_its_schedule() -> None:
    linear, sigmoid = make(beta_schedule="linear"), make()
    expected = linear.sample(2, seed=0, progress=False)
    assert not torch.allclose(sigmoid.sample(2, seed=0, progress=False), expected, atol=1e-2)
    sigmoid.load_state_dict(linear.state_dict())
    torch.testing.assert_close(sigmoid.sample(2, seed=0, progress=False), expected, rtol=0, atol=1e-5)
    broken = linear.state_dict() | {"betas": torch.full((T,), 2.0)}
    with pytest.raises(RuntimeError, match=r"expected betas to be in \(0, 1\], got 2 at index 0"):
        sigmoid.load_state_dict(broken)


def test_copies_sample_alike() -> None:
    diffusion = make(sampling_timesteps=4)
    clone = copy.deepcopy(diffusion)
    assert torch.equal(diffusion.sample(2, seed=0, progress=False), clone.sample(2, seed=0, progress=False))
    clone.sampling_timesteps, clone.is_ddim_sampling = T, False  # as users of the original switch
    assert clone.plan.num_steps == T
    assert diffusion.plan.num_steps == 4


# ---------------------------------------------------------------------------------------------------------- memory, modes


@contextmanager
def live_images() -> Iterator[list[int]]:
    """Counts, at every evaluation of a Net, the distinct memory of tensors of at least an image batch."""
    counts: list[int] = []
    forward = Net.forward

    def counted(self: Net, x: Tensor, t: Tensor, x_self_cond: Tensor | None) -> Tensor:
        alive = [o for o in gc.get_objects() if type(o) is Tensor and o.numel() >= math.prod(SHAPE)]
        dense = [tensor for tensor in alive if tensor.layout == torch.strided and not tensor.is_meta]
        counts.append(len({tensor.untyped_storage().data_ptr() for tensor in dense}))
        return forward(self, x, t, x_self_cond)

    Net.forward = counted  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        Net.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("self_condition", [False, True])
def test_sampling_takes_constant_memory(self_condition: bool) -> None:
    """The original keeps all T + 1 states, also where only the last is asked for."""
    diffusion = make(net(self_condition), timesteps=6)
    gc.collect()
    with live_images() as counts:
        diffusion.sample(SHAPE[0], progress=False)
    assert len(counts) == 6
    assert max(counts[2:]) == min(counts[2:])
    assert counts[2] <= counts[0] + 1  # self-conditioning keeps x_0


def test_the_model_is_in_eval_mode_for_sampling_and_as_it_was_afterwards() -> None:
    modes: list[bool] = []

    class Noting(Net):
        def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None) -> Tensor:
            modes.append(self.training)
            return super().forward(x, t, x_self_cond)

    diffusion = make(Noting(), sampling_timesteps=3)
    diffusion.sample(1, progress=False)
    diffusion.interpolate(torch.zeros(SHAPE), torch.zeros(SHAPE), 2, progress=False)
    assert modes == [False] * 5
    assert all(module.training for module in diffusion.modules())


def test_images_can_be_trained_on() -> None:
    """The original's are tensors of inference mode, which autograd refuses."""
    diffusion = make(sampling_timesteps=2)
    img = diffusion.sample(3, progress=False)
    assert not img.is_inference()
    diffusion(img.requires_grad_()).backward()
    assert img.grad is not None


# ----------------------------------------------------------------------------------------------------------- other models


def tiny_unet() -> UNet:
    model = UNet(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=[8, 16],
        down_block_types=["DownBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "UpBlock2D"],
        layers_per_block=1,
        norm_num_groups=4,
    )
    randomise(model)
    return model


def test_a_unet_of_this_package_trains_and_samples() -> None:
    model = tiny_unet()
    diffusion = GaussianDiffusion(model, image_size=8, timesteps=20)
    assert (diffusion.channels, diffusion.self_condition) == (2, False)
    diffusion(torch.rand(2, 2, 8, 8)).backward()
    assert model.conv_in.weight.grad is not None
    images = diffusion.sample(2, seed=4, progress=False)
    expected = ddpm_fast.sample(model, diffusion.plan, 2, seed=4, progress=False)  # in its inference form too
    assert torch.equal(images, (expected + 1) * 0.5)
    with torch.no_grad():
        model.conv_in.weight.mul_(1.5)
    changed = diffusion.sample(2, seed=4, progress=False)
    assert not torch.allclose(images, changed, atol=1e-3)


def test_a_unet_of_diffusers_trains_and_samples(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    ours = tiny_unet()
    ours.save_pretrained(tmp_path)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path)
    images = [
        GaussianDiffusion(model, image_size=8, timesteps=20).sample(2, seed=4, progress=False) for model in (ours, theirs)
    ]
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-4)
    img, seeds, t = torch.rand(2, 2, 8, 8), sample_seeds(0, 2), torch.tensor([3, 12])
    losses = [GaussianDiffusion(m, image_size=8, timesteps=20)(img, seeds=seeds, times=t) for m in (ours, theirs)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)


# ----------------------------------------------------------------------------------------------------------- checkpoints


def save(path: Path, **changes: Any) -> GaussianDiffusion:
    """A file with the names of the original's Trainer; the moving average is half of the weights."""
    diffusion = make()
    average = copy.deepcopy(diffusion)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(0.5)
    ema = {f"ema_model.{k}": v for k, v in average.state_dict().items()}
    ema |= {f"online_model.{k}": v for k, v in diffusion.state_dict().items()}
    ema |= {"initted": torch.tensor(True), "step": torch.tensor(30)}
    optimizer = torch.optim.Adam(diffusion.parameters())
    content = {"step": 30, "model": diffusion.state_dict(), "opt": optimizer.state_dict(), "ema": ema, "scaler": None}
    torch.save(content | {"version": "2.3.4"} | changes, path)
    return diffusion


def test_checkpoints_load_with_either_weights(tmp_path: Path) -> None:
    saved = save(tmp_path / "model-1.pt")
    for weights, factor in (("ema", 0.5), ("model", 1.0)):
        diffusion = make(Net())
        assert load_checkpoint(diffusion, tmp_path / "model-1.pt", weights=weights) == 30  # type: ignore[arg-type]
        assert torch.equal(diffusion.model.conv_in.weight, saved.model.conv_in.weight * factor)
    default = make(Net())
    load_checkpoint(default, str(tmp_path / "model-1.pt"))
    assert torch.equal(default.model.conv_in.weight, saved.model.conv_in.weight / 2)


def test_a_checkpoint_of_the_originals_moving_average_loads(original: ModuleType, tmp_path: Path) -> None:
    theirs = original.GaussianDiffusion(net(), image_size=SHAPE[2:], timesteps=T)
    ema = original.EMA(theirs, beta=0.995, update_every=1, update_after_step=0)
    for _ in range(3):
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(0.1)
        ema.update()
    torch.save({"step": 3, "model": theirs.state_dict(), "ema": ema.state_dict()}, tmp_path / "model-1.pt")
    ours = make()
    load_checkpoint(ours, tmp_path / "model-1.pt")
    for name, tensor in ema.ema_model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
    assert not torch.equal(ours.model.conv_in.weight, theirs.model.conv_in.weight)


class _Harmful:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('code from a checkpoint ran')",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opt": _Harmful()}, r"expected '.*' to hold tensors and plain values, got a \S*exec, which needs pickle"),
        ({"opt": argparse.Namespace(a=1)}, r"got a argparse\.Namespace, which needs pickle, and pickle may run any code"),
        ({"model": None}, "to be a Trainer's checkpoint, with step, model and ema, got one with step, model, opt, ema"),
        ({"step": "x"}, "to be a Trainer's checkpoint"),
        ({"model": {}}, r"expected the weights in '.*' to fit the model, got missing alphas_cumprod, .* and 14 more"),
        ({"model": GaussianDiffusion(tiny_unet(), image_size=8).state_dict()}, "to fit the model, got missing model"),
        ({"model": make(timesteps=T + 1).state_dict()}, r"expected betas to have shape \[40\] \(by the model\), got \[41\]"),
    ],
)
def test_checkpoints_that_do_not_fit_leave_the_model_as_it_was(tmp_path: Path, changes: Any, message: str) -> None:
    save(tmp_path / "model-1.pt", **changes)
    diffusion = make(Net())
    before = copy.deepcopy(diffusion.state_dict())
    with pytest.raises(ValueError, match="load_checkpoint: .*" + message):
        load_checkpoint(diffusion, tmp_path / "model-1.pt", weights="model")
    for name, tensor in diffusion.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    file = tmp_path / "model-1.pt"
    with pytest.raises(FileNotFoundError, match=r"load_checkpoint: expected path to be a file, got '.*model-1\.pt'"):
        load_checkpoint(make(), file)
    save(file)
    whole = file.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"load_checkpoint: expected '.*' to be a whole file of torch\.save, got"):
            load_checkpoint(make(), file)
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match=r"load_checkpoint: expected .* with step, model and ema, got one with no names"):
        load_checkpoint(make(), file)
    wrong: Any = "average"
    with pytest.raises(ValueError, match="load_checkpoint: expected weights to be one of ema, model, got 'average'"):
        load_checkpoint(make(), file, weights=wrong)
    model: Any = Net()
    with pytest.raises(TypeError, match=r"load_checkpoint: expected diffusion to be a GaussianDiffusion .*, got Net"):
        load_checkpoint(model, file)


# ---------------------------------------------------------------------------------------------------------------- errors


def with_attributes(**attributes: Any) -> Net:
    model = Net()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


G = "GaussianDiffusion: expected "
X = torch.zeros(SHAPE)
TIMES = torch.zeros(SHAPE[0], dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make(lambda x: x), TypeError, G + "model to be a torch.nn.Module, got function"),
        (
            lambda: make(nn.Linear(1, 1)),
            ValueError,
            G + "model to have the attributes channels and out_dim, or a config .*'Linear'",
        ),
        (lambda: make(with_attributes(out_dim=4)), ValueError, G + "a model with as many channels out as in, got 'channels 2"),
        (
            lambda: make(with_attributes(random_or_learned_sinusoidal_cond=True)),
            ValueError,
            G + "a model without random or learned sinusoidal embeddings of t, got",
        ),
        (lambda: make(with_attributes(config={"num_class_embeds": 3})), ValueError, G + "a model without classes, got"),
        (lambda: make(image_size=0), ValueError, G + r"image_size to be a positive integer or two, \(H, W\), got 0"),
        (lambda: make(image_size=(8, 8, 8)), ValueError, G + "image_size to be a positive integer or two"),
        (lambda: make(image_size=8.0), ValueError, G + "image_size to be a positive integer or two"),
        (lambda: make(image_size="88"), ValueError, G + "image_size to be a positive integer or two"),
        (lambda: make(timesteps=0), ValueError, G + "timesteps to be an integer in 1..100000, got 0"),
        (lambda: make(timesteps=10.0), TypeError, G + "timesteps to be an integer in 1..100000, got 10.0"),
        (lambda: make(sampling_timesteps=0), ValueError, G + r"sampling_timesteps to be an integer in 1..40 or None, got 0"),
        (lambda: make(sampling_timesteps=41), ValueError, G + r"sampling_timesteps to be an integer in 1..40 or None, got 41"),
        (lambda: make(objective="eps"), ValueError, G + "objective to be one of pred_noise, pred_x0, pred_v, got 'eps'"),
        (lambda: make(beta_schedule="exp"), ValueError, G + "beta_schedule to be one of linear, cosine, sigmoid, got 'exp'"),
        (
            lambda: make(beta_schedule="cosine", schedule_fn_kwargs={"tau": 1}),
            ValueError,
            G + "schedule_fn_kwargs to have s for beta_schedule \"cosine\", got 'tau'",
        ),
        (
            lambda: make(beta_schedule="linear", schedule_fn_kwargs={"beta_end": 1}),
            ValueError,
            G + "schedule_fn_kwargs to have nothing for beta_schedule \"linear\", got 'beta_end'",
        ),
        (
            lambda: make(schedule_fn_kwargs={"tau": "1"}),
            TypeError,
            G + r"schedule_fn_kwargs\['tau'\] to be a number, got str",
        ),
        (lambda: make(ddim_sampling_eta=-1.0), ValueError, G + "ddim_sampling_eta to be at least 0 and finite, got -1.0"),
        (lambda: make(ddim_sampling_eta="1"), TypeError, G + "ddim_sampling_eta to be a number, got str"),
        (lambda: make(offset_noise_strength=-0.1), ValueError, G + "offset_noise_strength to be at least 0 .*got -0.1"),
        (lambda: make(min_snr_gamma=0), ValueError, G + "min_snr_gamma to be positive, got 0"),
        # The original's tables are NaN for these.
        (
            lambda: make(beta_schedule="linear", timesteps=10),
            ValueError,
            r"NoiseSchedule: expected betas to be in \(0, 1\], got",
        ),
        (lambda: make(schedule_fn_kwargs={"tau": 0.01}), ValueError, r"NoiseSchedule: expected betas to be in \(0, 1\], got"),
        (
            lambda: make(beta_schedule="linear", timesteps=20, objective="pred_noise"),
            ValueError,
            'SamplingPlan: expected finite coefficients.* the model must predict "sample" or "v_prediction"',
        ),
        (
            lambda: make(sampling_timesteps=5, ddim_sampling_eta=3.0),
            ValueError,
            r"ddim_plan: expected eta to be at most 1\.\d+, which leaves sigma_t.2 at most 1 - abar_prev.*got 3.0",
        ),
        (lambda: make().sample(0), ValueError, "sample: expected batch_size to be a positive integer, got 0"),
        (lambda: make().sample(2, seed=1.5), TypeError, r"p_sample_loop: expected seed to be an int or int64 \[2\], got float"),
        (
            lambda: make().sample(2, seed=TIMES),
            ValueError,
            r"expected seed to have shape \[2\], one a sample, got \[3\]",
        ),
        (
            lambda: make().p_sample_loop((2, 3, 8, 8)),
            ValueError,
            r"p_sample_loop: expected shape to be \(N, 2, H, W\), positive integers, got \(2, 3, 8, 8\)",
        ),
        (lambda: make().ddim_sample((2, 2, 8)), ValueError, r"ddim_sample: expected shape to be \(N, 2, H, W\)"),
        (lambda: make().ddim_sample(2), ValueError, r"ddim_sample: expected shape to be \(N, 2, H, W\)"),
        (lambda: make().p_sample(X, T), ValueError, r"p_sample: expected t to be an integer in 0..39, got 40"),
        (lambda: make().p_sample(X, -1), ValueError, r"p_sample: expected t to be an integer in 0..39, got -1"),
        (lambda: make().p_sample(X[0], 1), ValueError, "p_sample: expected x to have at least 4 dimensions"),
        (lambda: make().p_sample(X.int(), 1), TypeError, "p_sample: expected x to be float32"),
        (lambda: make().p_sample(X, 1, X[:1]), ValueError, r"p_sample: expected x_self_cond to have shape \[3, 2, 6, 5\], got"),
        (lambda: make().p_sample(X, 1, seeds=TIMES[:1]), ValueError, r"p_sample: expected seeds to have shape \[3\]"),
        (lambda: make().interpolate(X, X[:1]), ValueError, r"interpolate: expected x2 to have shape \[3, 2, 6, 5\], got"),
        (lambda: make().interpolate(X, X, T), ValueError, r"interpolate: expected t to be an integer in 0..39, got 40"),
        (lambda: make().interpolate(X, X, lam="1"), TypeError, "interpolate: expected lam to be a number, got str"),
        (lambda: make().noise_assignment(X, X[:1]), ValueError, "noise_assignment: expected noise to have shape"),
        (lambda: make().q_sample(X, TIMES + T), ValueError, r"q_sample: expected t in 0..39, got values from 40 to 40"),
        (lambda: make().q_sample(X, TIMES.float()), TypeError, "q_sample: expected t to be an int or an int64 tensor"),
        (lambda: make().q_sample(X, TIMES, X.double()), TypeError, "q_sample: expected noise to have the dtype of x_start"),
        (lambda: make().p_losses(X[0], TIMES), ValueError, "p_losses: expected x_start to have at least 4 dimensions"),
        (lambda: make().p_losses(X, TIMES, X[:1]), ValueError, "p_losses: expected noise to have shape"),
        (
            lambda: make().p_losses(X, TIMES, X, seeds=TIMES),
            ValueError,
            "p_losses: expected at most one of noise and seeds, got both",
        ),
        (
            lambda: make().p_losses(X, TIMES, loss_reduction="sum"),
            ValueError,
            "p_losses: expected loss_reduction to be one of mean, none, got 'sum'",
        ),
        (
            lambda: make().p_losses(X, TIMES, offset_noise_strength=-1.0),
            ValueError,
            "p_losses: expected offset_noise_strength to be at least 0 and finite, got -1.0",
        ),
        (lambda: make()(X[:, :1]), ValueError, G + r"img to have shape \[N, 2, 6, 5\], got \[3, 1, 6, 5\]"),
        (lambda: make()(X[..., :4]), ValueError, G + r"img to have shape \[N, 2, 6, 5\], got \[3, 2, 6, 4\]"),
        (lambda: make()(X.byte()), TypeError, G + "img to be float32, float64, float16 or bfloat16, got torch.uint8"),
        (
            lambda: make()(X, times=TIMES[:1]),
            ValueError,
            r"p_losses: expected t to be an int64 tensor of shape \[3\], got \[1\]",
        ),
        (lambda: make().p_losses(X, 3), ValueError, r"p_losses: expected t to be an int64 tensor of shape \[3\], got 3"),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_model_of_another_shape_is_named() -> None:
    class Narrow(Net):
        def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None) -> Tensor:
            return x[:, :1]

    message = re.escape(
        "GaussianDiffusion: expected the model's output to have the shape of x_t, [3, 2, 6, 5], got [3, 1, 6, 5]"
    )
    diffusion = make(Narrow())
    for call in (
        lambda: diffusion(X),
        lambda: diffusion.sample(3, progress=False),
        lambda: diffusion.p_mean_variance(X, TIMES),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_immiscible_noise_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"noise_assignment: immiscible noise needs SciPy \(pip install scipy\)"):
        make(immiscible=True)(X)


def test_the_schedule_is_not_rounded_with_a_module_in_bfloat16() -> None:
    diffusion = make(Net())
    schedule, saved = diffusion.schedule, copy.deepcopy(diffusion.state_dict())
    diffusion.to(torch.bfloat16).load_state_dict(saved)
    assert diffusion.schedule is schedule
    diffusion.load_state_dict(diffusion.state_dict())
    assert diffusion.schedule is schedule


@pytest.mark.parametrize("auto", [True, False])
def test_images_are_mapped_as_the_original_maps_them(original: ModuleType, auto: bool) -> None:
    options = {"image_size": SHAPE[2:], "auto_normalize": auto}
    expected, actual = (cls(net(), **options) for cls in (original.GaussianDiffusion, GaussianDiffusion))
    x = torch.rand(SHAPE)
    assert torch.equal(actual.normalize(x), expected.normalize(x))
    assert torch.equal(actual.unnormalize(x), expected.unnormalize(x))
