"""The variational bound, term by term (eq. 9-11, Ho et al. 2020, eq. 5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from .. import ops
from ..checks import check_dtype, check_map, computing_device
from ..dtypes import opmath
from ..errors import InvalidValue, expect, renaming
from ..inference import adapted, interface_of
from ..inference.model import Model, device_and_dtype, evaluation_mode
from ..options import checked, within
from ..plan import COLUMNS, Clip, PlanPrediction, ddpm_plan
from ..predictions import Variance
from ..sampling.arguments import check_model, resolve_labels, resolve_seeds
from ..sampling.options import ClassLabels
from ..sampling.progress import progress_bar
from ..schedule import NoiseSchedule, Objective
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


@checked()
def variational_bound(
    model: Model,
    x_0: Tensor,
    schedule: NoiseSchedule | Objective,
    *,
    prediction: PlanPrediction | None = None,
    variance: Variance | None = None,
    clip: Clip = 1.0,
    class_labels: ClassLabels = None,
    condition: Tensor | None = None,
    seed: int | Tensor = 0,
    noise: Callable[[int], Tensor] | None = None,
    exact_cdf: bool = False,
    batch_size: Annotated[int | None, within(low=1)] = None,
    progress: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> VariationalBound:
    """Compute the variational bound in bits per dimension on test images.

    This takes one network evaluation per image and timestep. Each term is estimated from one independent
    draw of x_t. At t = 0 beta~ is 0, and its log variance is replaced by that of t = 1, as in the code of
    Ho et al. This applies to "fixed_small", "fixed_large" and the lower end of "learned_range". Source:
    derivation eq. 9-11 (Ho et al. 2020, eq. 5).

    Args:
        model: Network, called as in `sample`.
        x_0: Images of 256 grey levels mapped to [-1, 1], floating [N, C, H, W].
        schedule: Noise schedule of the training, or the objective, which also has prediction and variance.
        prediction: Meaning of the model's output, as in `ddpm_plan`. None: that of an objective, or "epsilon".
        variance: Variance of the reverse steps, as in `ddpm_plan`. None: that of an objective, or "fixed_small".
        clip: Bound on x_0^, or None, as in `ddpm_plan`.
        class_labels: One class for all images, or one per image, see `BatchOptions`. None: no class.
        condition: See `BatchOptions`.
        seed: An int, or int64 [N] with a seed per image. The stream of timestep t is t.
        noise: Replaces `seed`. noise(t) returns epsilon of timestep t, shaped like x_0. It is called once
            for each t = T-1, ..., 0.
        exact_cdf: Use the exact normal distribution function in L_0. False: its tanh approximation, on
            which published figures are based.
        batch_size: Images per network evaluation. None: all.
        progress: Show a progress bar.
        device: Device to run on. None: the model's device.
        dtype: Dtype of the network. None: the model's dtype, on a GPU too. Everything after the network is
            float64.

    Returns:
        Every term of every image.

    Raises:
        ValueError: An argument is out of range or does not fit the model. Checked before any computation.
        TypeError: An argument has an unsupported type.
    """
    caller = "variational_bound"
    check_model(caller, model)
    check_map(caller, "x_0", x_0)
    expect(x_0.numel() > 0 and not x_0.is_meta, caller, "x_0", "to have values", f"shape {list(x_0.shape)} on {x_0.device}")
    if not x_0.abs().max() <= 1:  # NaN included
        raise InvalidValue(caller, "x_0", "in [-1, 1]", f"values from {x_0.min():.4g} to {x_0.max():.4g}")
    with renaming(caller):
        plan = ddpm_plan(schedule, prediction=prediction, variance=variance, clip=clip)
    if variance is None:
        variance = schedule.variance if isinstance(schedule, Objective) else "fixed_small"
    schedule, gives_mean = plan.schedule, plan.prediction == "previous_sample"
    total = len(x_0)
    interface = interface_of(model, predicts_variance=variance.startswith("learned"))
    interface.check_images(caller, "x_0", tuple(x_0.shape[1:]))
    interface.condition.check(caller, condition, total, x_0.shape[1:])
    labels = resolve_labels(caller, model, interface, class_labels, total)
    seeds, predicted = resolve_seeds(caller, seed, total), x_0.shape[1] * (2 if interface.predicts_variance else 1)
    weights = plan.coefficients.flip(0)  # row t

    model_device, model_dtype = device_and_dtype(model)
    device = computing_device(caller, model_device if device is None else device)
    dtype = model_dtype if dtype is None else dtype
    check_dtype(caller, "dtype", dtype)
    x_0 = x_0.detach().to(device, opmath(dtype))
    seeds, labels = seeds.to(device), None if labels is None else labels.to(device)
    condition = None if condition is None else condition.to(device)
    terms = torch.empty(total, schedule.num_timesteps, dtype=torch.float64, device=device)
    x_0_mse = torch.empty_like(terms)
    chunks = [slice(i, i + (batch_size or total)) for i in range(0, total, batch_size or total)]
    timesteps = range(schedule.num_timesteps - 1, -1, -1)

    network = adapted(caller, model, device, dtype, schedule.num_timesteps)
    with (
        evaluation_mode(network.model),
        torch.inference_mode(),
        progress_bar(len(timesteps), "variational bound", "timestep", shown=progress) as bar,
    ):
        weights_of_x_0, bounds = schedule.posterior_mean_coef_x_0, schedule.reverse_log_variances.T
        for t in timesteps:
            epsilon = None if noise is None else noise(t)
            if epsilon is not None:
                check_map(caller, f"noise({t})", epsilon)
                fits = epsilon.shape == x_0.shape and not epsilon.is_meta
                expect(fits, caller, f"noise({t})", f"to have values of shape {list(x_0.shape)}", list(epsilon.shape))
                epsilon = epsilon.to(x_0)
            for chunk in chunks:
                x = x_0[chunk]
                drawn = ops.noise(x.shape, seeds[chunk], stream=t, dtype=x.dtype) if epsilon is None else epsilon[chunk]
                x_t = ops.q_sample(x, t, schedule, noise=drawn)
                step = torch.full((len(x),), t, device=device)
                given = (None if each is None else each[chunk] for each in (labels, condition))
                output = network.evaluate(x_t, step, *given)
                fits = isinstance(output, Tensor) and output.shape == (len(x), predicted, *x.shape[2:])
                expect(
                    fits, caller, "model", f"to return {predicted} channels", getattr(output, "shape", type(output).__name__)
                )
                output = output.double()
                m, log_variance = split_variance(output, x.shape[1], bounds[:, t], variance)
                p, q, clip_at = (float(weights[t, COLUMNS.index(name)]) for name in ("p", "q", "clip"))
                unclipped = p * x_t.double() + q * m
                x_0_hat = unclipped.clamp(-clip_at, clip_at)
                x_0_mse[chunk, t] = (x_0_hat - x).square().flatten(1).mean(dim=1)
                # The mean of p(x_{t-1} | x_t) is mu~(x_t, x_0^): a model that gives the mean itself is not clipped.
                distance = x.double() - (unclipped if gives_mean else x_0_hat)
                q_p = bounds[0, t], log_variance
                terms[chunk, t] = bound_terms(x.double(), step, distance, weights_of_x_0[t], *q_p, exact_cdf=exact_cdf)
            bar.update()
    prior = prior_bits(x_0, schedule).cpu()
    x_0_mse = x_0_mse.cpu()
    return VariationalBound(prior, terms.cpu(), x_0_mse, x_0_mse * schedule.snr)
