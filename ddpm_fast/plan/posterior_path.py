"""Quantities that ancestral sampling and DDIM share: the posterior of each step of a plan (derivation eq. 6-8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InvalidValue
from ..schedule import NoiseSchedule, Objective, objective_of
from .rows import plan_from_columns
from .sampling_plan import PlanPrediction, SamplingPlan
from .timesteps import Spacing, checked_arrivals, checked_timesteps


class PosteriorPath:
    """The timesteps of a plan, with the quantities that samplers share.

    Tensors are float64 [S] unless stated otherwise. Their order is that of the steps.

    Attributes:
        objective: The noise schedule, and what the model predicts unless `gives_mean`.
        gives_mean: True if the model's output is the mean of x_{t-1}.
        timesteps: The start of each step, int64 [S].
        previous: The timestep where each step arrives, int64 [S]. -1 is x_0.
        abar: abar at the start.
        abar_prev: abar on arrival.
        alpha: abar / abar_prev.
        beta: 1 - alpha.
        beta_tilde: The variance of the posterior, derivation eq. 8.
        signal: sqrt(abar), the weight of x_0 in x_t.
        noise: sqrt(1 - abar), the weight of epsilon in x_t.
        from_x_0: The weight of x_0 in the posterior's mean, derivation eq. 7.
        from_x_t: The weight of x_t in the posterior's mean, derivation eq. 7.
    """

    def __init__(
        self,
        schedule: NoiseSchedule | Objective,
        num_steps: int | None,
        spacing: Spacing | Sequence[int],
        previous: Sequence[int] | None,
        prediction: PlanPrediction | None,
        clip: float | None,
        learned_variance: bool = False,
        final_alpha_bar: float = 1.0,
    ) -> None:
        """Check the arguments of a plan and compute what samplers share.

        Args:
            schedule: The noise schedule, or an objective.
            num_steps: The number of steps, as in `ddpm_plan`.
            spacing: The timesteps, as in `ddpm_plan`.
            previous: The timestep where each step arrives, as in `ddpm_plan`.
            prediction: The meaning of the model's output.
            clip: The bound on x_0^, positive, or None.
            learned_variance: True if the model's output has variance channels.
            final_alpha_bar: abar on arrival at x_0.

        Raises:
            TypeError: `schedule` is neither a NoiseSchedule nor an Objective.
            ValueError: An argument is out of range.
        """
        # "previous_sample" is a matter of plans. The other parts of the objective hold for it.
        self.gives_mean = isinstance(schedule, NoiseSchedule) and prediction == "previous_sample"
        kind: Any = None if self.gives_mean else prediction
        self.objective = objective_of(schedule, kind, "learned_range" if learned_variance else None)
        self.clip, schedule = clip, self.objective.schedule
        self.timesteps = checked_timesteps(schedule.num_timesteps, num_steps, spacing, previous is None)
        if previous is None:
            self.previous = torch.cat([self.timesteps[1:], torch.tensor([-1])])
        else:
            self.previous = checked_arrivals(self.timesteps, previous)
        self.abar = schedule.alpha_bars[self.timesteps]
        if (before_x_0 := self.abar[self.previous == -1]).numel() and final_alpha_bar < float(before_x_0.max()):
            raise InvalidValue(
                "final_alpha_bar",
                f"to be at least abar of the last timestep, {float(before_x_0.max()):.6g}",
                final_alpha_bar,
            )
        self.abar_prev = torch.cat([schedule.alpha_bars, torch.tensor([final_alpha_bar], dtype=torch.float64)])[self.previous]
        self.alpha = self.abar / self.abar_prev
        self.beta = 1 - self.alpha
        self.beta_tilde = (1 - self.abar_prev) / (1 - self.abar) * self.beta
        self.signal, self.noise = self.abar.sqrt(), (1 - self.abar).sqrt()  # x_t = signal x_0 + noise epsilon
        self.from_x_0 = self.abar_prev.sqrt() * self.beta / (1 - self.abar)  # mu~ = from_x_0 x_0 + from_x_t x_t
        self.from_x_t = self.alpha.sqrt() * (1 - self.abar_prev) / (1 - self.abar)

    def x_0_weights(self) -> tuple[Tensor, Tensor]:
        """Return p and q of x_0^ = p x_t + q m, float64 [S] each.

        They solve derivation eq. 3 for x_0, or eq. 7 if m is the mean of x_{t-1}.
        """
        if self.gives_mean:
            return -self.from_x_t / self.from_x_0, 1 / self.from_x_0
        return self.objective.x_0_weights_at(self.signal, self.noise, self.timesteps)

    def epsilon_weights(self) -> tuple[Tensor, Tensor]:
        """Return the weights of x_t and m in epsilon^, float64 [S] each."""
        if self.gives_mean:
            p, q = self.x_0_weights()
            return (1 - self.signal * p) / self.noise, -self.signal * q / self.noise
        return self.objective.epsilon_weights_at(self.signal, self.noise, self.timesteps)

    def ddim(self, abar_next: Tensor, sigma: Tensor, rederive: bool) -> SamplingPlan:
        """Build the plan of DDIM steps to given noise levels.

        Args:
            abar_next: abar on arrival, float64 [S].
            sigma: The standard deviation of the noise, float64 [S].
            rederive: Derive epsilon^ again from the clipped x_0^. False uses the model's own.
        """
        direction = (1 - abar_next - sigma.square()).sqrt()  # the weight of epsilon^
        if rederive:
            # epsilon^ = (x_t - sqrt(abar) x_0^) / sqrt(1 - abar)
            k0 = abar_next.sqrt() - direction * self.signal / self.noise
            k1, k2 = direction / self.noise, torch.zeros_like(direction)
        else:
            k0 = abar_next.sqrt()
            from_x_t, from_m = self.epsilon_weights()
            k1, k2 = direction * from_x_t, direction * from_m
        # "learned_range" multiplies sigma by a value between e^0 and e^0, so sigma is unchanged.
        log_variances = (torch.zeros_like(sigma), torch.zeros_like(sigma))
        return self.plan(abar_next, k0=k0, k1=k1, k2=k2, sigma=sigma, log_variances=log_variances)

    def plan(
        self,
        abar_next: Tensor,
        *,
        k0: Tensor,
        k1: Tensor,
        k2: Tensor,
        sigma: Tensor,
        log_variances: tuple[Tensor, Tensor],
        variance: Literal["fixed", "learned", "learned_range"] | None = None,
    ) -> SamplingPlan:
        """Build a plan from its columns.

        Args:
            abar_next: abar on arrival, float64 [S].
            k0: The weight of x_0^, float64 [S].
            k1: The weight of x_t, float64 [S].
            k2: The weight of the model's output, float64 [S].
            sigma: The standard deviation of the noise, float64 [S].
            log_variances: The columns log_beta and log_beta_tilde, float64 [S] each.
            variance: The kind of variance, as in `plan_from_columns`.
        """
        p, q = self.x_0_weights()
        return plan_from_columns(
            self.objective,
            self.timesteps,
            self.abar,
            abar_next,
            self.clip,
            "previous_sample" if self.gives_mean else None,
            variance,
            p=p,
            q=q,
            k0=k0,
            k1=k1,
            k2=k2,
            sigma=sigma,
            log_beta=log_variances[0],
            log_beta_tilde=log_variances[1],
        )
