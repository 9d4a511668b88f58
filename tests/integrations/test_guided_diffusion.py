"""guided-diffusion's classes: against the mathematics in plain float64, and against recorded values of the original."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from pairwise import pairwise
from record_guided_diffusion import recorded
from torch import Tensor, nn

import ddpm_fast
from ddpm_fast import NoiseSchedule, sample_seeds, variational_bound
from ddpm_fast.integrations import guided_diffusion as gd

MEANS = list(gd.ModelMeanType)
VARS = list(gd.ModelVarType)
BOTH = list(itertools.product(MEANS, VARS))
LEARNED = (gd.ModelVarType.LEARNED, gd.ModelVarType.LEARNED_RANGE)
SHAPE = (3, 2, 4, 5)
T, KEPT = 60, "6,4,5"  # 1000 timesteps would take long; betas reach as far
BETAS = gd.get_named_beta_schedule("linear", T)


class Network(nn.Module):
    """A formula with weights."""

    def __init__(self, var: gd.ModelVarType) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        channels = 4 if var in LEARNED else 2
        self.weight = nn.Parameter(0.5 * torch.randn(channels, 2, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        u = (t.to(x.dtype) / T).reshape(-1, 1, 1, 1)
        h = torch.einsum("oc,nchw->nohw", self.weight.to(x.dtype), torch.tanh(x)).contiguous() + torch.cos(3 * u)
        return torch.sin(h if y is None else h + y.to(x.dtype).reshape(-1, 1, 1, 1))


def gradient(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    return 0.2 * torch.cos(2 * x + t.to(x.dtype).reshape(-1, 1, 1, 1) / 20)


def shrunk(x_0: Tensor) -> Tensor:
    return 0.9 * x_0 + 0.05


def diffusion(
    mean: gd.ModelMeanType = gd.ModelMeanType.EPSILON,
    var: gd.ModelVarType = gd.ModelVarType.FIXED_SMALL,
    loss: gd.LossType = gd.LossType.MSE,
    kept: str | None = KEPT,
    **options: Any,
) -> gd.GaussianDiffusion:
    options = {"betas": BETAS, "model_mean_type": mean, "model_var_type": var, "loss_type": loss} | options
    return gd.GaussianDiffusion(**options) if kept is None else gd.SpacedDiffusion(gd.space_timesteps(T, kept), **options)


class Statement:
    """The process on some timesteps, one scalar t at a time, in float64 throughout: the equations as they stand."""

    def __init__(self, d: gd.GaussianDiffusion) -> None:
        abar = torch.cumprod(1 - torch.as_tensor(BETAS), 0)[d.timestep_map]
        previous = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        self.abar, self.previous = abar, previous
        self.following = torch.cat([abar[1:], torch.zeros(1, dtype=torch.float64)])
        self.beta = 1 - abar / previous
        self.mean_type, self.var_type, self.d = d.model_mean_type, d.model_var_type, d

    def model(self, network: Callable[..., Tensor], x: Tensor, t: int, y: Tensor | None = None) -> Tensor:
        return network(x, torch.full((len(x),), self.d.timestep_map[t]), *(() if y is None else (y,)))

    def posterior(self, x_0: Tensor, x: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. 7 and 8; the log variance of t = 1 stands in at t = 0."""
        alpha = self.abar[t] / self.previous[t]
        mean = alpha.sqrt() * (1 - self.previous[t]) / (1 - self.abar[t]) * x
        mean = mean + self.previous[t].sqrt() * self.beta[t] / (1 - self.abar[t]) * x_0
        variances = (1 - self.previous) / (1 - self.abar) * self.beta
        return mean, variances[t], variances[max(t, 1)].log()

    def p(self, output: Tensor, x: Tensor, t: int, clip: bool, denoised: Any = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, variance, log variance and x_0^."""
        m = output[:, :2]
        if self.mean_type == gd.ModelMeanType.START_X:
            x_0 = m
        elif self.mean_type == gd.ModelMeanType.EPSILON:
            x_0 = (x - (1 - self.abar[t]).sqrt() * m) / self.abar[t].sqrt()
        else:
            unit, zero = torch.ones_like(x), torch.zeros_like(x)
            x_0 = (m - self.posterior(zero, x, t)[0]) / self.posterior(unit, zero, t)[0]
        x_0 = x_0 if denoised is None else denoised(x_0)
        x_0 = x_0.clamp(-1, 1) if clip else x_0
        mean = m if self.mean_type == gd.ModelMeanType.PREVIOUS_X else self.posterior(x_0, x, t)[0]
        _, small, log_small = self.posterior(x, x, t)
        if self.var_type == gd.ModelVarType.FIXED_SMALL:
            variance, log_variance = small, log_small
        elif self.var_type == gd.ModelVarType.FIXED_LARGE:
            log_variance = self.beta[t].log() if t > 0 else log_small
            variance = log_variance.exp()
        else:
            log_variance = output[:, 2:]
            if self.var_type == gd.ModelVarType.LEARNED_RANGE:
                f = (log_variance + 1) / 2
                log_variance = f * self.beta[t].log() + (1 - f) * log_small
            variance = log_variance.exp()
        return mean, variance.expand_as(x), log_variance.expand_as(x), x_0

    def ddim(self, x: Tensor, x_0: Tensor, t: int, eta: float, z: Tensor) -> Tensor:
        """Song et al. 2021, eq. 12 and 16."""
        abar, previous = self.abar[t], self.previous[t]
        sigma = eta * ((1 - previous) / (1 - abar)).sqrt() * (1 - abar / previous).sqrt()
        epsilon = (x - abar.sqrt() * x_0) / (1 - abar).sqrt()
        return previous.sqrt() * x_0 + (1 - previous - sigma**2).sqrt() * epsilon + (sigma * z if t > 0 else 0)

    def bits(self, out: tuple[Tensor, ...], x_0: Tensor, x: Tensor, t: int) -> Tensor:
        """The term of the bound, a sample, by torch's own distributions at t > 0."""
        mean, _, log_variance, _ = out
        if t > 0:
            q, _, log_q = self.posterior(x_0, x, t)
            ours = torch.distributions.Normal(mean, torch.exp(0.5 * log_variance))
            nats = torch.distributions.kl_divergence(torch.distributions.Normal(q, torch.exp(0.5 * log_q)), ours)
        else:

            def cdf(z: Tensor) -> Tensor:
                return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

            std = torch.exp(0.5 * log_variance)
            above, below = cdf((x_0 - mean + 1 / 255) / std), cdf((x_0 - mean - 1 / 255) / std)
            above, below = torch.where(x_0 > 0.999, 1.0, above), torch.where(x_0 < -0.999, 0.0, below)
            nats = -(above - below).clamp(min=1e-12).log()
        return nats.flatten(1).mean(dim=1) / math.log(2)


def draws(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def images() -> Tensor:
    levels = torch.randint(0, 256, SHAPE, generator=torch.Generator().manual_seed(2))
    levels[:, 0, 0, 0], levels[:, 1, 1, 1] = 0, 255
    return levels.double() / 127.5 - 1


HOOKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unclipped": {"clip_denoised": False},
    "cond_fn": {"cond_fn": gradient},
    "denoised_fn": {"denoised_fn": shrunk},
    "all": {"cond_fn": gradient, "denoised_fn": shrunk, "clip_denoised": False},
}


def close(actual: Tensor, expected: Tensor, s: Statement, t: int) -> None:
    """Up to a few roundings of tables to float32, which x_0^ = (x_t - sqrt(1 - abar) epsilon) / sqrt(abar) magnifies."""
    scale = 8 / math.sqrt(s.abar[t])
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=scale * torch.finfo(torch.float32).eps)


@pairwise(mean=MEANS, var=VARS, hooks=list(HOOKS))
def test_every_step_is_the_mathematics(mean: gd.ModelMeanType, var: gd.ModelVarType, hooks: str) -> None:
    d, network, y = diffusion(mean, var), Network(var), torch.tensor([0.1, 0.2, 0.3])
    s, options = Statement(d), HOOKS[hooks]
    cond, clip, denoised = options.get("cond_fn"), options.get("clip_denoised", True), options.get("denoised_fn")
    for t in range(d.num_timesteps):
        x, batch = 1.5 * draws(t), torch.full((3,), t)
        expected, variance, log_variance, x_0 = s.p(s.model(network, x, t, y), x, t, clip, denoised)
        out = d.p_mean_variance(network, x, batch, clip, denoised, {"y": y})
        for name, value in zip(
            ("mean", "variance", "log_variance", "pred_xstart"), (expected, variance, log_variance, x_0), strict=True
        ):
            close(out[name], value, s, t)

        torch.manual_seed(5)
        out = d.p_sample(network, x, batch, model_kwargs={"y": y}, **options)
        after = torch.rand(1)
        torch.manual_seed(5)
        z = torch.randn_like(x)
        assert torch.equal(torch.rand(1), after)
        if cond is not None:
            expected = expected + variance * s.model(cond, x, t)
        close(out["sample"], expected + (torch.exp(0.5 * log_variance) * z if t > 0 else 0), s, t)
        close(out["pred_xstart"], x_0, s, t)

        if cond is not None:
            epsilon = (x - s.abar[t].sqrt() * x_0) / (1 - s.abar[t]).sqrt()
            epsilon = epsilon - (1 - s.abar[t]).sqrt() * s.model(cond, x, t)
            x_0 = (x - (1 - s.abar[t]).sqrt() * epsilon) / s.abar[t].sqrt()
        for eta in (0.0, 1.0):
            torch.manual_seed(5)
            out = d.ddim_sample(network, x, batch, model_kwargs={"y": y}, eta=eta, **options)
            close(out["sample"], s.ddim(x, x_0, t, eta, z), s, t)
            close(out["pred_xstart"], x_0, s, t)
            assert torch.equal(torch.rand(1), after)  # the generator goes on as the original's, for eta = 0 too
        if cond is None:
            out = d.ddim_reverse_sample(network, x, batch, model_kwargs={"y": y}, **options)
            epsilon = (x - s.abar[t].sqrt() * x_0) / (1 - s.abar[t]).sqrt()
            close(out["sample"], s.following[t].sqrt() * x_0 + (1 - s.following[t]).sqrt() * epsilon, s, t)


def test_each_sample_has_its_own_timestep() -> None:
    d, network, x = diffusion(), Network(gd.ModelVarType.FIXED_SMALL), draws()
    noise = sample_seeds(0, 3)
    t = torch.tensor([0, 7, 14])
    for step in (d.p_sample, d.ddim_sample):
        together = step(network, x, t, seeds=noise)
        for i in range(3):
            alone = step(network, x[i : i + 1], t[i : i + 1], seeds=noise[i : i + 1])
            assert torch.equal(together["sample"][i], alone["sample"][0])


@pytest.mark.parametrize("name", ["p_sample_loop", "ddim_sample_loop"])
def test_loops_show_their_arguments(name: str) -> None:
    loop, progressive = (inspect.signature(getattr(gd.SpacedDiffusion, name + end)) for end in ("", "_progressive"))
    assert {"clip_denoised", "cond_fn", "seeds"} < loop.parameters.keys()
    assert loop.parameters == progressive.parameters
    assert loop.return_annotation == "Tensor"


def test_few_plans_are_kept() -> None:
    d, network, x = diffusion(), Network(gd.ModelVarType.FIXED_SMALL), draws()
    t = torch.tensor([0, 7, 14])
    first = d.ddim_sample(network, x, t, eta=0.0, seeds=sample_seeds(0, 3))["sample"]
    for i in range(2 * gd._MAX_PLANS):
        d.ddim_sample(network, x, t, eta=i / 20, seeds=sample_seeds(0, 3))
        assert len(d._plans) <= gd._MAX_PLANS
    assert torch.equal(d.ddim_sample(network, x, t, eta=0.0, seeds=sample_seeds(0, 3))["sample"], first)


@pytest.mark.parametrize("eta", [None, 0.0, 1.0])
def test_loops_are_their_steps_from_the_same_generator(eta: float | None) -> None:
    d, network = diffusion(var=gd.ModelVarType.LEARNED_RANGE), Network(gd.ModelVarType.LEARNED_RANGE)
    torch.manual_seed(1)
    final = d.p_sample_loop(network, SHAPE) if eta is None else d.ddim_sample_loop(network, SHAPE, eta=eta)
    torch.manual_seed(1)
    s, x = Statement(d), torch.randn(SHAPE)
    for t in range(d.num_timesteps - 1, -1, -1):
        wide = x.double()
        with torch.no_grad():
            mean, _, log_variance, x_0 = s.p(s.model(network, wide, t), wide, t, True)
        z = torch.randn_like(x)
        step = mean + (torch.exp(0.5 * log_variance) * z if t > 0 else 0)
        x = (step if eta is None else s.ddim(wide, x_0, t, eta, z)).float()
    torch.testing.assert_close(final, x, rtol=0, atol=2e-5)  # float32 along 15 steps


def test_with_seeds_an_image_is_its_own_and_that_of_sample() -> None:
    d, network, seeds = diffusion(var=gd.ModelVarType.LEARNED_RANGE), Network(gd.ModelVarType.LEARNED_RANGE), sample_seeds(3, 3)
    generator = torch.get_rng_state()
    images = d.p_sample_loop(network.float(), SHAPE, seeds=seeds)
    assert torch.equal(torch.get_rng_state(), generator)
    alone = d.p_sample_loop(network, (1, *SHAPE[1:]), seeds=seeds[1:2])
    torch.testing.assert_close(images[1:2], alone, rtol=0, atol=1e-5)  # the network's products round as their sizes have it
    assert torch.equal(images, ddpm_fast.sample(network, d.sampling_plan(), 3, seed=seeds, shape=SHAPE[1:], progress=False))
    ddim = d.ddim_sample_loop(network, SHAPE, eta=0.5, seeds=seeds)
    plan = d.sampling_plan(eta=0.5)
    assert torch.equal(ddim, ddpm_fast.sample(network, plan, 3, seed=seeds, shape=SHAPE[1:], progress=False))


def test_progressive_loops_go_on_from_what_is_in_the_dict_and_leave_gradients_on() -> None:
    d, network = diffusion(), Network(gd.ModelVarType.FIXED_SMALL)
    steps = d.p_sample_loop_progressive(network, SHAPE, noise=draws(dtype=torch.float32), seeds=sample_seeds(0, 3))
    for out in steps:
        assert torch.is_grad_enabled()
        assert not out["sample"].requires_grad
        out["sample"] = torch.zeros(SHAPE)
        break
    following = next(iter(steps))["sample"]
    t = torch.full((3,), d.num_timesteps - 2)
    expected = d.p_sample(network, torch.zeros(SHAPE), t, seeds=sample_seeds(0, 3))["sample"]
    assert torch.equal(following, expected.detach())


def test_a_subclass_that_changes_p_mean_variance_is_heard() -> None:
    class Fixed(gd.GaussianDiffusion):
        def p_mean_variance(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
            out = super().p_mean_variance(*args, **kwargs)
            return out | {"mean": torch.zeros_like(out["mean"]), "pred_xstart": torch.zeros_like(out["mean"])}

    options = {"model_var_type": gd.ModelVarType.FIXED_SMALL, "loss_type": gd.LossType.MSE, "betas": BETAS}
    d = Fixed(model_mean_type=gd.ModelMeanType.EPSILON, **options)
    network, t = Network(gd.ModelVarType.FIXED_SMALL), torch.zeros(3, dtype=torch.int64)
    assert (d.p_sample(network, draws(), t)["sample"] == 0).all()
    assert (d.ddim_sample(network, draws(), t)["sample"] == 0).all()


@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize("steps", [T, 4000])
def test_models_are_given_the_timesteps_they_were_trained_with(steps: int, spaced: bool) -> None:
    betas = gd.get_named_beta_schedule("cosine", steps)
    d = diffusion(betas=betas, rescale_timesteps=True, kept=KEPT if spaced else None)
    seen = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x

    d.p_sample(model, draws(), torch.tensor([0, 5, 9]), cond_fn=model)
    original = sorted(gd.space_timesteps(T, KEPT)) if spaced else range(steps)
    expected = torch.tensor([original[i] * 1000 / steps for i in (0, 5, 9)])
    assert len(seen) == 2
    for t in seen:
        torch.testing.assert_close(t, expected)


@pairwise(mean=MEANS, var=VARS, loss=list(gd.LossType))
def test_losses_and_their_gradients(mean: gd.ModelMeanType, var: gd.ModelVarType, loss: gd.LossType) -> None:
    d, network = diffusion(mean, var, loss, kept=None), Network(var)
    s, x_0, noise, t = Statement(d), images(), draws(1), torch.tensor([0, 20, T - 1])
    terms = d.training_losses(network, x_0, t, noise=noise)
    (grad,) = torch.autograd.grad(terms["loss"].sum(), network.weight)

    expected = []
    for i, step in enumerate(t.tolist()):
        own, epsilon = x_0[i : i + 1], noise[i : i + 1]
        x = s.abar[step].sqrt() * own + (1 - s.abar[step]).sqrt() * epsilon
        output = s.model(network, x, step)
        if loss.is_vb():
            value = s.bits(s.p(output, x, step, clip=False), own, x, step) * (T if loss == gd.LossType.RESCALED_KL else 1)
        else:
            target = {"EPSILON": epsilon, "START_X": own, "PREVIOUS_X": s.posterior(own, x, step)[0]}[mean.name]
            value = (output[:, :2] - target).square().mean().reshape(1)
            if var in LEARNED:
                held = torch.cat([output[:, :2].detach(), output[:, 2:]], dim=1)
                bits = s.bits(s.p(held, x, step, clip=False), own, x, step)
                value = value + bits * (T / 1000 if loss == gd.LossType.RESCALED_MSE else 1)
        expected.append(value)
    wanted = torch.cat(expected)
    (wanted_grad,) = torch.autograd.grad(wanted.sum(), network.weight)
    torch.testing.assert_close(terms["loss"], wanted, rtol=2e-5, atol=1e-7)  # tables in float32, differences of means
    torch.testing.assert_close(grad, wanted_grad, rtol=2e-5, atol=1e-5)
    parts = set() if loss.is_vb() else {"mse", "vb"} if var in LEARNED else {"mse"}
    assert set(terms) == {"loss", *parts}


def test_losses_from_seeds_are_those_of_the_same_noise() -> None:
    d, network, seeds = diffusion(var=gd.ModelVarType.LEARNED_RANGE), Network(gd.ModelVarType.LEARNED_RANGE), sample_seeds(0, 3)
    t, x_0 = torch.tensor([0, 3, 9]), images().float()
    noise = ddpm_fast.noise(SHAPE, seeds, stream=0xFFFFFFFE)
    torch.testing.assert_close(
        d.training_losses(network, x_0, t, seeds=seeds), d.training_losses(network, x_0, t, noise=noise), rtol=1e-6, atol=1e-6
    )
    assert torch.equal(d.q_sample(x_0, t, seeds=seeds), d.q_sample(x_0, t, noise))


def test_without_noise_losses_draw_from_the_generator() -> None:
    d, network, t = diffusion(), Network(gd.ModelVarType.FIXED_SMALL), torch.tensor([0, 3, 9])
    torch.manual_seed(0)
    losses = d.training_losses(network, images(), t)["loss"]
    torch.manual_seed(0)
    assert torch.equal(losses, d.training_losses(network, images(), t, noise=torch.randn_like(images()))["loss"])


@pairwise(mean=MEANS, var=VARS, clip=[True, False])
def test_the_bound(mean: gd.ModelMeanType, var: gd.ModelVarType, clip: bool) -> None:
    """Against the statement, and against `variational_bound`, which works in float64 and another way."""
    d, network, x_0 = diffusion(mean, var, kept="5"), Network(var), images()
    torch.manual_seed(3)
    bound = d.calc_bpd_loop(network, x_0, clip_denoised=clip)
    torch.manual_seed(3)
    s, columns = Statement(d), []
    noises = {}
    for t in range(d.num_timesteps - 1, -1, -1):
        noises[t] = epsilon = torch.randn_like(x_0)
        x = s.abar[t].sqrt() * x_0 + (1 - s.abar[t]).sqrt() * epsilon
        with torch.no_grad():
            out = s.p(s.model(network, x, t), x, t, clip)
        again = (x - s.abar[t].sqrt() * out[3]) / (1 - s.abar[t]).sqrt()
        mse = [(a - b).square().flatten(1).mean(dim=1) for a, b in ((out[3], x_0), (again, epsilon))]
        columns.append(torch.stack([s.bits(out, x_0, x, t), *mse]))
    expected = dict(zip(("vb", "xstart_mse", "mse"), torch.stack(columns, dim=2), strict=True))
    for name, values in expected.items():
        torch.testing.assert_close(bound[name], values, rtol=3e-5, atol=1e-7)
    torch.testing.assert_close(bound["total_bpd"], bound["vb"].sum(dim=1) + bound["prior_bpd"])

    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.network(x, torch.tensor(d.timestep_map)[t])

    names: tuple[Any, Any] = (d.sampling_plan().prediction, var.name.lower())
    other = variational_bound(
        *(Mapped(), x_0, NoiseSchedule.from_betas(d.betas)),
        prediction=names[0],
        variance=names[1],
        clip=1.0 if clip else None,
        noise=noises.__getitem__,
        progress=False,
    )
    torch.testing.assert_close(bound["vb"], other.terms.flip(1), rtol=3e-5, atol=1e-7)
    torch.testing.assert_close(bound["prior_bpd"], other.prior)
    torch.testing.assert_close(bound["xstart_mse"], other.x_0_mse.flip(1), rtol=3e-5, atol=1e-9)


def test_the_bound_from_seeds_is_that_of_variational_bound() -> None:
    d, network, seeds = diffusion(kept=None), Network(gd.ModelVarType.FIXED_SMALL), sample_seeds(1, 3)
    bound = d.calc_bpd_loop(network, images(), seeds=seeds)
    other = variational_bound(network, images(), d.schedule, seed=seeds, progress=False)
    torch.testing.assert_close(bound["total_bpd"], other.total, rtol=1e-5, atol=0)


def test_moments_of_q() -> None:
    d, x_0, x, t = diffusion(), images(), draws(), torch.tensor([0, 4, 14])
    s = Statement(d)
    mean, variance, log_variance = d.q_mean_variance(x_0, t)
    posterior = d.q_posterior_mean_variance(x_0, x, t)
    for i, step in enumerate(t.tolist()):
        close(mean[i], s.abar[step].sqrt() * x_0[i], s, step)
        close(variance[i], (1 - s.abar[step]).expand(SHAPE[1:]), s, step)
        close(log_variance[i], (1 - s.abar[step]).log().expand(SHAPE[1:]), s, step)
        for ours, theirs in zip(posterior, s.posterior(x_0[i], x[i], step), strict=True):
            close(ours[i], theirs.expand(SHAPE[1:]), s, step)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    d, network = diffusion(), Network(gd.ModelVarType.FIXED_SMALL)
    x, t = draws().to(dtype), torch.tensor([1, 4, 14])
    for out in (d.p_sample(network, x, t, seeds=sample_seeds(0, 3)), d.ddim_sample(network, x, t)):
        assert out["sample"].dtype == torch.float32
    assert d.q_sample(x, t).dtype == torch.float32
    assert d.training_losses(network, x, t)["loss"].dtype == torch.float32


@pytest.mark.parametrize(
    ("counts", "kept"),
    [
        ("ddim5", [0, 12, 24, 36, 48]),
        ("5", [0, 15, 30, 44, 59]),  # 14.75 apart; 29.5 and 44.25 are rounded to even and down
        ("2,3", [0, 29, 30, 44, 59]),
        ([1, 0, 2], [0, 40, 59]),
    ],
)
def test_space_timesteps(counts: Any, kept: list[int]) -> None:
    assert sorted(gd.space_timesteps(60, counts)) == kept


def test_flags_of_script_util() -> None:
    d = gd.create_gaussian_diffusion(
        steps=100, learn_sigma=True, noise_schedule="cosine", rescale_learned_sigmas=True, timestep_respacing="ddim25"
    )
    assert (d.num_timesteps, d.original_num_steps, d.timestep_map[:3]) == (25, 100, [0, 4, 8])
    assert (d.model_var_type, d.loss_type) == (gd.ModelVarType.LEARNED_RANGE, gd.LossType.RESCALED_MSE)
    plain = gd.create_gaussian_diffusion(use_kl=True, predict_xstart=True)
    assert (plain.num_timesteps, plain.model_mean_type) == (1000, gd.ModelMeanType.START_X)
    assert (plain.model_var_type, plain.loss_type) == (gd.ModelVarType.FIXED_LARGE, gd.LossType.RESCALED_KL)
    assert gd.create_gaussian_diffusion(sigma_small=True).model_var_type == gd.ModelVarType.FIXED_SMALL


def test_a_copy_has_tables_of_its_own() -> None:
    """Also where one of its arrays is at the address that one of the first had."""
    diffusion = gd.create_gaussian_diffusion()
    x_0, t = torch.ones(2, 3, 4, 4), torch.tensor([0, 500])
    diffusion.q_mean_variance(x_0, t)
    twin = copy.deepcopy(diffusion)
    twin.sqrt_alphas_cumprod = diffusion.sqrt_alphas_cumprod
    twin.sqrt_alphas_cumprod[:] = 0
    assert not twin.q_mean_variance(x_0, t)[0].any()


def test_unit_betas_and_one_timestep() -> None:
    d = diffusion(betas=[0.3], kept=None, var=gd.ModelVarType.FIXED_LARGE)
    assert d.p_sample_loop(Network(gd.ModelVarType.FIXED_LARGE), SHAPE).shape == SHAPE


X, ONE = torch.zeros(SHAPE), torch.ones(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda d, m: d.p_sample(m, X, torch.ones(3)),
            ValueError,
            r"p_sample: expected t to be int64 \[3\], one a sample, got",
        ),
        (lambda d, m: d.p_sample(m, X, ONE + 99), ValueError, r"p_sample: expected t in 0..14, got values from 100 to 100"),
        (lambda d, m: d.ddim_sample(m, X, 1), ValueError, r"ddim_sample: expected t to be int64 \[3\], one a sample, got int"),
        (lambda d, m: d.p_sample(m, [0.0], ONE), TypeError, "p_sample: expected x to be a tensor, got list"),
        (lambda d, m: d.q_sample(X.long(), ONE), TypeError, "q_sample: expected x_start to be float32.*got torch.int64"),
        (lambda d, m: d.q_sample(X, ONE, X[:2]), ValueError, r"q_sample: expected noise to have shape \[3, 2, 4, 5\], got"),
        (
            lambda d, m: d.p_sample(lambda x, t: x[:, :1], X, ONE),
            ValueError,
            r"SpacedDiffusion: expected the model to give a tensor of shape \[3, 2, 4, 5\], for model_var_type FIXED_SMALL",
        ),
        (
            lambda d, m: diffusion(var=gd.ModelVarType.LEARNED).p_sample(m, X, ONE),
            ValueError,
            r"expected the model to give a tensor of shape \[3, 4, 4, 5\], for model_var_type LEARNED, got \[3, 2, 4, 5\]",
        ),
        (lambda d, m: d.p_sample(m, X, ONE, seeds=ONE[:2]), ValueError, r"expected seeds to have shape \[3\], one a sample"),
        (
            lambda d, m: d.ddim_reverse_sample(m, X, ONE, eta=1.0),
            ValueError,
            "ddim_reverse_sample: expected eta to be 0.*got 1.0",
        ),
        (
            lambda d, m: d.ddim_sample_loop_progressive(m, SHAPE, eta=-1.0),
            ValueError,
            "expected eta to be at least 0, got -1.0",
        ),
        (
            lambda d, m: d.p_sample_loop_progressive(m, 3),
            ValueError,
            r"p_sample_loop: expected shape to be .*\(N, C, ...\), got 3",
        ),
        (
            lambda d, m: d.p_sample_loop(m, SHAPE, noise=X[:1]),
            ValueError,
            r"expected noise of the given shape \[3, 2, 4, 5\], got",
        ),
        (
            lambda d, m: d.p_sample_loop(lambda x, t: x, SHAPE),
            ValueError,
            "expected device or noise to be given, as the model has",
        ),
        (lambda d, m: d.p_sample_loop(m, SHAPE, seeds=[1]), TypeError, "p_sample_loop: expected seeds to be an int64 tensor"),
        (lambda d, m: d.p_sample_loop(m, SHAPE, noise=X, device="meta"), ValueError, "expected noise on meta, got it on cpu"),
        (
            lambda d, m: d.training_losses(m, X, ONE, noise=X, seeds=ONE),
            ValueError,
            "training_losses: expected exactly one of noise and seeds, got both",
        ),
        (lambda d, m: d.calc_bpd_loop(m, X.long()), TypeError, "calc_bpd_loop: expected x_start to be float32"),
        (
            lambda d, m: diffusion(betas=gd.get_named_beta_schedule("cosine", 4000), rescale_timesteps=True).sampling_plan(),
            ValueError,
            "sampling_plan: expected rescale_timesteps to be False or .* 1000 timesteps, got True and 4000",
        ),
        (
            lambda d, m: diffusion(mean="EPSILON"),
            TypeError,
            "SpacedDiffusion: expected model_mean_type to be a ddpm_fast.*'EPSILON'",
        ),
        (
            lambda d, m: diffusion(betas=[0.1, 1.5], kept=None),
            ValueError,
            r"expected betas to be in \(0, 1\], got 1.5 at index 1",
        ),
        (
            lambda d, m: diffusion(betas=[[0.1]], kept=None),
            ValueError,
            r"expected betas to be a floating tensor of shape \[T\]",
        ),
        (
            lambda d, m: gd.SpacedDiffusion([60], betas=BETAS),
            ValueError,
            r"SpacedDiffusion: expected use_timesteps to be timesteps in 0..59, at least one, got 60..60",
        ),
        (lambda d, m: gd.SpacedDiffusion([], betas=BETAS), ValueError, "SpacedDiffusion: .*at least one, got none"),
        (
            lambda d, m: gd.space_timesteps(60, "ddim11"),
            ValueError,
            "an integer stride through 60 timesteps gives, got 'ddim11'",
        ),
        (lambda d, m: gd.space_timesteps(60, "ddimx"), ValueError, 'expected section_counts to be "ddimN" or counts'),
        (lambda d, m: gd.space_timesteps(60, "10,a"), ValueError, "expected section_counts to be .*got '10,a'"),
        (lambda d, m: gd.space_timesteps(60, [-1]), ValueError, r"expected section_counts to be .*got \[-1\]"),
        (lambda d, m: gd.space_timesteps(60, "61"), ValueError, "expected counts of at most 60, the size of section 0, got 61"),
        (lambda d, m: gd.space_timesteps(60, []), ValueError, "expected section_counts to have at least one count"),
        (
            lambda d, m: gd.space_timesteps(60, 5),
            TypeError,
            "expected section_counts to be a string or a sequence of ints, got 5",
        ),
        (lambda d, m: gd.get_named_beta_schedule("exp", 5), NotImplementedError, "expected schedule_name .*got 'exp'"),
        (
            lambda d, m: gd.get_named_beta_schedule("linear", 0),
            ValueError,
            "expected num_timesteps to be an integer in 1..100000, got 0",
        ),
    ],
)
def test_errors(call: Callable[..., Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(diffusion(), Network(gd.ModelVarType.FIXED_SMALL).float())


# --------------------------------------------------------------- beside the original: record_guided_diffusion.py has its values


ETAS = (None, 0.0, 1.0)  # None: p_sample_loop


def trajectory(d: Any, var: gd.ModelVarType, hooks: str, eta: float | None) -> Tensor:
    """The last image of a loop of `d`, which may be the original's."""
    torch.manual_seed(0)
    loop, options = (d.p_sample_loop, {}) if eta is None else (d.ddim_sample_loop, {"eta": eta})
    return loop(Network(var).float(), SHAPE, model_kwargs={}, **options, **HOOKS[hooks])


def losses(d: Any, var: gd.ModelVarType) -> dict[str, Tensor]:
    t = torch.tensor([0, 7, 14])
    return d.training_losses(Network(var).float(), images().float(), t, noise=draws(1).float())


def bounds(d: Any, var: gd.ModelVarType) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return d.calc_bpd_loop(Network(var).float(), images().float())


@pairwise(mean=MEANS, var=VARS, hooks=list(HOOKS))
def test_trajectories_are_the_originals(mean: gd.ModelMeanType, var: gd.ModelVarType, hooks: str) -> None:
    d = diffusion(mean, var)
    for eta in ETAS:
        expected = recorded()[f"trajectory {mean.name} {var.name} {hooks} {eta}"]
        torch.testing.assert_close(trajectory(d, var, hooks, eta), expected, rtol=2e-4, atol=2e-4)  # float32 along 15 steps


def of_the_original(suffix: str, names: Iterable[str]) -> dict[str, Tensor]:
    """The recorded tensors of these names; all that the original gives."""
    found = {name: x for key, x in recorded().items() for name, _, rest in [key.partition(" ")] if rest == suffix}
    assert found.keys() == set(names)
    return found


@pairwise(mean=MEANS, var=VARS, loss=list(gd.LossType))
def test_losses_are_the_originals(mean: gd.ModelMeanType, var: gd.ModelVarType, loss: gd.LossType) -> None:
    ours = losses(diffusion(mean, var, loss), var)
    theirs = of_the_original(f"{mean.name} {var.name} {loss.name}", ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=5e-5 if loss == gd.LossType.RESCALED_KL else 1e-6)


@pytest.mark.parametrize(("mean", "var"), BOTH)
def test_bounds_are_the_originals(mean: gd.ModelMeanType, var: gd.ModelVarType) -> None:
    ours = bounds(diffusion(mean, var), var)
    torch.testing.assert_close(ours, of_the_original(f"{mean.name} {var.name}", ours), rtol=1e-4, atol=1e-6)
