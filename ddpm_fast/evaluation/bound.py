"""The variational bound, term by term (eq. 9-11, Ho et al. 2020, eq. 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from .. import ops
from ..checks import check_map
from ..dtypes import opmath
from ..errors import InvalidValue, expect
from ..inference.model import evaluation_mode
from ..options import checked, taking
from ..plan import COLUMNS, SamplingPlan
from ..predictions import Variance
from ..sampling.options import SeededOptions
from ..sampling.progress import progress_bar
from ..sampling.sampler import Sampler
from ..schedule import Objective
from ..variational import bound_terms, prior_bits, split_variance


@dataclass(frozen=True, repr=False)
class VariationalBound:
    """Upper bound on -log p(x_0) in bits per dimension, term by term.

        -log p(x_0) <= L_T + L_{T-1} + ... + L_1 + L_0

    Tensors are float64 on the CPU, one row per image.

    Attributes:
        prior: L_T [N], KL(q(x_T | x_0) || N(0, I)). It depends on the schedule and x_0 only.
        terms: [N, T]. Column t is L_t. Column 0 is the reconstruction -log p(x_0 | x_1).
        x_0_mse: [N, T]. Mean squared error of the (clipped) x_0^ at timestep t of the code.
        epsilon_mse: [N, T]. Mean squared error of the epsilon^ that belongs to x_0^, SNR_t x_0_mse.
    """

    prior: Tensor
    terms: Tensor
    x_0_mse: Tensor
    epsilon_mse: Tensor

    def __repr__(self) -> str:
        names = ("total", "prior", "transitions", "reconstruction")
        means = ", ".join(f"{name} {getattr(self, name).mean():.4f}" for name in names)
        return f"VariationalBound(N = {len(self.prior)}, T = {self.terms.shape[1]}; mean bits per dimension: {means})"

    @property
    def transitions(self) -> Tensor:
        """Sum of the transition terms, L_{T-1} + ... + L_1, [N]."""
        return self.terms[:, 1:].sum(dim=1)

    @property
    def reconstruction(self) -> Tensor:
        """Reconstruction term L_0, [N]."""
        return self.terms[:, 0]

    @property
    def total(self) -> Tensor:
        """The bound, [N]."""
        return self.prior + self.terms.sum(dim=1)

    @classmethod
    @checked()
    @taking(SeededOptions)
    def of(
        cls, sampler: Sampler, x_0: Tensor, *, exact_cdf: bool = False, **options: Unpack[SeededOptions]
    ) -> VariationalBound:
        """Compute the bound of test images for the steps of a Sampler, in bits per dimension.

        This takes one network evaluation per image and timestep. Each term is estimated from one independent
        draw of x_t. At t = 0 beta~ is 0, and its log variance is replaced by that of t = 1, as in the code of
        Ho et al. This applies to "fixed_small", "fixed_large" and the lower end of "learned_range". Everything
        after the network is float64. Source: derivation eq. 9-11 (Ho et al. 2020, eq. 5).

        Args:
            sampler: A Sampler with the plan of `ddpm_plan` at all timesteps, whose prediction, variance and clip hold.
                Published figures are of float32: Sampler(model, ddpm_plan(objective), dtype=torch.float32).
            x_0: Images of 256 grey levels mapped to [-1, 1], floating [N, C, H, W].
            exact_cdf: Use the exact normal distribution function in L_0. False: its tanh approximation, on
                which published figures are based.
            **options: See `SeededOptions`. The stream of timestep t is t. Without labels, images have no class.

        Raises:
            ValueError: An argument is out of range or does not fit the model, checked before any computation.
            TypeError: An argument has an unsupported type.
        """
        check_map("x_0", x_0)
        expect(x_0.numel() > 0 and not x_0.is_meta, "x_0", "to have values", f"shape {list(x_0.shape)} on {x_0.device}")
        if not x_0.abs().max() <= 1:  # NaN included
            raise InvalidValue("x_0", "in [-1, 1]", f"values from {x_0.min():.4g} to {x_0.max():.4g}")
        expect(x_0.shape[1:] == sampler.shape, "x_0", f"to be [N, {', '.join(map(str, sampler.shape))}]", list(x_0.shape))
        plan, device, total = sampler.plan, sampler.device, len(x_0)
        schedule, gives_mean, variance = plan.schedule, plan.prediction == "previous_sample", _variance_of(plan)
        request = sampler.request(total, options, struct=SeededOptions, in_turn=False)
        predicted = x_0.shape[1] * (2 if sampler.interface.predicts_variance else 1)
        weights = plan.coefficients.flip(0)  # row t
        x_0 = x_0.detach().to(device, opmath(sampler.dtype))
        seeds, batch_size = request.seeds.to(device), request.given["batch_size"]
        inputs = [None if each is None else each.to(device) for each in (request.labels, request.given["condition"])]
        terms = torch.empty(total, schedule.num_timesteps, dtype=torch.float64, device=device)
        x_0_mse = torch.empty_like(terms)
        timesteps = range(schedule.num_timesteps - 1, -1, -1)
        with (
            evaluation_mode(sampler.network),
            torch.inference_mode(),
            progress_bar(len(timesteps), "variational bound", "timestep", shown=request.given["progress"]) as bar,
        ):
            weights_of_x_0, bounds = schedule.posterior_mean_coef_x_0, schedule.reverse_log_variances.T
            for t in timesteps:
                for chunk in [slice(i, i + batch_size) for i in range(0, total, batch_size)]:
                    x = x_0[chunk]
                    x_t = ops.q_sample(x, t, schedule, noise=ops.noise(x.shape, seeds[chunk], stream=t, dtype=x.dtype))
                    step = torch.full((len(x),), t, device=device)
                    output = sampler.evaluate(x_t, step, *(None if each is None else each[chunk] for each in inputs))
                    fits = isinstance(output, Tensor) and output.shape == (len(x), predicted, *x.shape[2:])
                    got = getattr(output, "shape", type(output).__name__)
                    expect(fits, "sampler", f"to have a model that returns {predicted} channels", got)
                    m, log_variance = split_variance(output.double(), x.shape[1], bounds[:, t], variance)
                    p, q, clip_at = (float(weights[t, COLUMNS.index(name)]) for name in ("p", "q", "clip"))
                    unclipped = p * x_t.double() + q * m
                    x_0_hat = unclipped.clamp(-clip_at, clip_at)
                    x_0_mse[chunk, t] = (x_0_hat - x).square().flatten(1).mean(dim=1)
                    # The mean of p(x_{t-1} | x_t) is mu~(x_t, x_0^): a model that gives the mean itself is not clipped.
                    distance = x.double() - (unclipped if gives_mean else x_0_hat)
                    q_p = bounds[0, t], log_variance
                    terms[chunk, t] = bound_terms(x.double(), step, distance, weights_of_x_0[t], *q_p, exact_cdf=exact_cdf)
                bar.update()
        mse = x_0_mse.cpu()
        return cls(prior_bits(x_0, schedule).cpu(), terms.cpu(), mse, mse * schedule.snr)


def _variance_of(plan: SamplingPlan) -> Variance:
    """Return the variance of the reverse steps. Raise a ValueError unless they are those of `ddpm_plan` at all timesteps."""
    builder = plan.builder
    whole = plan.num_steps == plan.schedule.num_timesteps and plan.timesteps.flip(0).tolist() == [*range(plan.num_steps)]
    if builder is None or builder.func.__name__ != "ddpm_plan" or not whole:
        raise InvalidValue("sampler", "to have the plan of ddpm_plan at all timesteps", f"\n{plan}")
    given, schedule = builder.keywords.get("variance"), builder.keywords["schedule"]
    found: Variance = given or (schedule.variance if isinstance(schedule, Objective) else "fixed_small")
    return found
