"""A sampler as a table: one row of coefficients a step. A new sampler is a new table, never a new kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .reference import PREDICTIONS, VARIANCES
from .schedule import NoiseSchedule, numbered

Spacing = Literal["leading", "trailing", "linspace"]
Prediction = Literal["epsilon", "sample", "v_prediction", "previous_sample"]
Variance = Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]

COLUMNS: Final = ("p", "q", "k0", "k1", "k2", "k3", "sigma", "log_beta", "log_beta_tilde", "clip")
VARIANCE_TYPES: Final[tuple[str, ...]] = get_args(Variance)
_PREDICTIONS: Final = (*PREDICTIONS, "previous_sample")


@dataclass(frozen=True, eq=False)
class SamplingPlan:
    """What `reverse_step` does at each step of a sampler. Build one with `ddpm_plan` or `ddim_plan`.

    Row 0 is the first step executed, from the largest timestep.

    Attributes:
        schedule: the noise schedule that the plan samples from.
        timesteps: int64 [S] on the CPU: what the model is given as t. Strictly descending, unless `previous` says where each
            step arrives, and but for `ddim_inversion_plan`.
        coefficients: float64 [S, 10] on the CPU, columns COLUMNS: x_0^ = clip(p x_t + q m), then
            x_{t-1} = k0 x_0^ + k1 x_t + k2 m + k3 x_0_prev + std z. `clip` is infinite where there is none.
        prediction: what the model's output m is: "epsilon", "sample" (x_0), "v_prediction" or "previous_sample" (the mean of
            x_{t-1}, the previous timestep being the plan's).
        variance: "fixed" (std is sigma) or "learned", "learned_range" (m has variance channels, see `reverse_step`).
        is_random: whether any step draws noise.
        needs_x_0_prev: whether any step weighs the previous step's x_0^ (multistep samplers).
    """

    schedule: NoiseSchedule
    timesteps: Tensor
    coefficients: Tensor
    prediction: Prediction
    variance: Literal["fixed", "learned", "learned_range"]
    is_random: bool = field(init=False)
    needs_x_0_prev: bool = field(init=False)
    _on_device: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.prediction not in _PREDICTIONS:
            raise ValueError(
                f"SamplingPlan: expected prediction to be one of {', '.join(_PREDICTIONS)}, got {self.prediction!r}"
            )
        if self.variance not in VARIANCES:
            raise ValueError(f"SamplingPlan: expected variance to be one of {', '.join(VARIANCES)}, got {self.variance!r}")
        if self.coefficients.shape != (self.num_steps, len(COLUMNS)):
            wanted, got = [self.num_steps, len(COLUMNS)], list(self.coefficients.shape)
            raise ValueError(f"SamplingPlan: expected coefficients of shape {wanted}, got {got}")
        usable = torch.isfinite(self.coefficients[:, : COLUMNS.index("clip")])
        if not bool(usable.all()):
            row, column = (int(i) for i in (~usable).nonzero()[0])
            t, value = int(self.timesteps[row]), float(self.coefficients[row, column])
            raise ValueError(
                f"SamplingPlan: expected finite coefficients, got {COLUMNS[column]} = {value} at timestep {t} "
                f"(abar = {float(self.schedule.alpha_bars[t]):.3g}) with prediction {self.prediction!r}; where abar is 0 the "
                'model must predict "sample" or "v_prediction"'
            )
        object.__setattr__(self, "is_random", self._uses("sigma"))
        object.__setattr__(self, "needs_x_0_prev", self._uses("k3"))
        self.table()  # in place before torch.compile looks

    def _uses(self, column: str) -> bool:
        return bool((self.coefficients[:, COLUMNS.index(column)] != 0).any())

    @property
    def num_steps(self) -> int:
        """S."""
        return self.timesteps.numel()

    def mean(self) -> SamplingPlan:
        """The same plan without noise: its steps give the mean of x_{t-1}."""
        coefficients = self.coefficients.clone()
        coefficients[:, COLUMNS.index("sigma")] = 0
        return replace(self, coefficients=coefficients)

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """`coefficients` rounded once to float32, [S, 10], kept per device."""
        return self._tensors(device)[0]

    def steps(self, device: torch.device | str = "cpu") -> Tensor:
        """int64 [S] = 0 .. S - 1, kept per device: `steps(device)[i]` is a step that needs no copy from the host."""
        return self._tensors(device)[1]

    def _tensors(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        device = numbered(device)
        if device not in self._on_device:
            with torch.inference_mode(False):  # kept for all callers: one that trains could not save an inference tensor
                steps = torch.arange(self.num_steps, device=device)
                self._on_device[device] = (self.coefficients.to(device, torch.float32), steps)
        return self._on_device[device]


def ddpm_plan(
    schedule: NoiseSchedule,
    num_steps: int | None = None,
    *,
    spacing: Spacing | Sequence[int] = "leading",
    previous: Sequence[int] | None = None,
    prediction: Prediction = "epsilon",
    variance: Variance = "fixed_small",
    clip: float | None = 1.0,
) -> SamplingPlan:
    """Ancestral sampling: derivation eq. 13 (Ho et al. 2020, Algorithm 2), through the posterior of eq. 6-8.

    Between timesteps t and s < t of a strided plan alpha = abar_t / abar_s and beta = 1 - alpha (Nichol and Dhariwal 2021,
    section 4), s being the true previous timestep of the plan. The last step gives the mean, without noise.

    Args:
        num_steps: S, at most T; None takes every timestep. With "leading" and "linspace" a single step is timestep 0, as in
            diffusers; "trailing" starts from T - 1 whatever S is.
        spacing: which timesteps: "leading", "trailing" or "linspace" (as in Lin et al. 2023, Table 2), or a strictly
            descending sequence of them.
        previous: for steps that are no chain, with a sequence as `spacing`, in any order: the timestep at which each of its
            steps arrives, below the one it starts from; -1 is x_0. None: at the next of the sequence.
        prediction: what the model predicts.
        variance: sigma^2 is beta~ ("fixed_small"), beta ("fixed_large"), or the model's ("learned", "learned_range"). The
            forms with "_log" are the same numbers.
        clip: x_0^ is clamped to [-clip, clip]; None leaves it, and then a step is eq. 13 to the letter.

    Raises:
        ValueError: an argument out of its range, or epsilon prediction on a schedule with zero terminal SNR.
    """
    if variance not in VARIANCE_TYPES:
        raise ValueError(f"ddpm_plan: expected variance to be one of {', '.join(VARIANCE_TYPES)}, got {variance!r}")
    path = _Path("ddpm_plan", schedule, num_steps, spacing, previous, prediction, clip)
    zero = torch.zeros_like(path.beta)
    if prediction == "previous_sample":  # m is the mean, whatever the clip does to x_0^
        k0, k1, k2 = zero, zero, torch.ones_like(zero)
    else:
        k0, k1, k2 = path.from_x_0, path.from_x_t, zero
    if variance in ("fixed_small", "fixed_small_log"):
        sigma = path.beta_tilde.sqrt()
    elif variance in ("fixed_large", "fixed_large_log"):
        sigma = path.beta.sqrt()
    else:
        sigma = torch.ones_like(path.beta)
    sigma[path.previous < 0] = 0
    kind: Literal["fixed", "learned", "learned_range"]
    kind = "learned" if variance == "learned" else "learned_range" if variance == "learned_range" else "fixed"
    log_variances = (path.beta.clamp(min=1e-20).log(), path.beta_tilde.clamp(min=1e-20).log())
    return path.plan(k0=k0, k1=k1, k2=k2, sigma=sigma, log_variances=log_variances, variance=kind)


def ddim_plan(
    schedule: NoiseSchedule,
    num_steps: int | None = 50,
    *,
    spacing: Spacing | Sequence[int] = "leading",
    previous: Sequence[int] | None = None,
    prediction: Prediction = "epsilon",
    eta: float = 0.0,
    clip: float | None = 1.0,
    use_clipped_model_output: bool = True,
    final_alpha_bar: float = 1.0,
    learned_variance: bool = False,
) -> SamplingPlan:
    """DDIM (Song et al. 2021, eq. 12 and 16): deterministic for eta = 0, the variance of ancestral sampling for eta = 1.

    Args:
        num_steps, spacing, previous, prediction, clip: as in `ddpm_plan`.
        eta: scales sigma; at least 0.
        use_clipped_model_output: derive epsilon again from the clipped x_0^, as guided-diffusion does. False keeps the
            model's epsilon, as diffusers does by default: noise then stays in images that the clip changes. Without a clip
            both are the same.
        final_alpha_bar: abar where the last step arrives: 1 is x_0; latent diffusion has abar_0 ("set_alpha_to_one": false).
        learned_variance: the model's output has variance channels, which DDIM leaves aside.
    """
    if not eta >= 0:
        raise ValueError(f"ddim_plan: expected eta to be at least 0, got {eta}")
    if not 0 < final_alpha_bar <= 1:
        raise ValueError(f"ddim_plan: expected final_alpha_bar in (0, 1], got {final_alpha_bar}")
    path = _Path("ddim_plan", schedule, num_steps, spacing, previous, prediction, clip, final_alpha_bar)
    sigma = eta * path.beta_tilde.sqrt()
    if bool((sigma.square() > 1 - path.abar_prev).any()):
        noisy = path.beta_tilde > 0
        largest = float(((1 - path.abar_prev) / path.beta_tilde)[noisy].min().sqrt())
        raise ValueError(
            f"ddim_plan: expected eta to be at most {math.floor(largest * 1e4) / 1e4}, which leaves sigma_t^2 at most "
            f"1 - abar_prev at every step, got {eta}"
        )
    # Without a clip both epsilons are equal. The model's own needs no division by sqrt(1 - abar).
    rederive = use_clipped_model_output and clip is not None
    return path.ddim(path.abar_prev, sigma, rederive, learned_variance)


def ddim_inversion_plan(
    schedule: NoiseSchedule,
    num_steps: int | None = 50,
    *,
    spacing: Spacing | Sequence[int] = "leading",
    prediction: Prediction = "epsilon",
    clip: float | None = 1.0,
    learned_variance: bool = False,
) -> SamplingPlan:
    """DDIM with eta = 0 backwards: from an image to the x_T that it comes from (Song et al. 2021, section 4.3).

    Step i leads from the plan's i-th timestep, counted from the smallest, to the next larger; the last one to abar = 0.
    epsilon^ is derived again from the clipped x_0^. Arguments are those of `ddim_plan`.
    """
    path = _Path("ddim_inversion_plan", schedule, num_steps, spacing, None, prediction, clip)
    zero = torch.zeros_like(path.abar)
    plan = path.ddim(torch.cat([zero[:1], path.abar[:-1]]), zero, True, learned_variance)
    return replace(plan, timesteps=plan.timesteps.flip(0), coefficients=plan.coefficients.flip(0))


class _Path:
    """The timesteps of a plan and what every sampler needs at each: float64 [S] tensors, in the order of execution."""

    def __init__(
        self,
        caller: str,
        schedule: NoiseSchedule,
        num_steps: int | None,
        spacing: Spacing | Sequence[int],
        previous: Sequence[int] | None,
        prediction: Prediction,
        clip: float | None,
        final_alpha_bar: float = 1.0,
    ) -> None:
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(
                f"{caller}: expected schedule to be a NoiseSchedule (NoiseSchedule.from_diffusers(scheduler.config)), "
                f"got {type(schedule).__name__}"
            )
        if prediction not in _PREDICTIONS:
            raise ValueError(f"{caller}: expected prediction to be one of {', '.join(_PREDICTIONS)}, got {prediction!r}")
        if clip is not None and not clip > 0:
            raise ValueError(f"{caller}: expected clip to be positive or None, got {clip}")
        self.schedule, self.prediction, self.clip = schedule, prediction, clip
        self.timesteps = _timesteps(caller, schedule.num_timesteps, num_steps, spacing, previous is None)
        if previous is None:
            self.previous = torch.cat([self.timesteps[1:], torch.tensor([-1])])
        else:
            self.previous = _previous(caller, self.timesteps, previous)
        self.abar = schedule.alpha_bars[self.timesteps]
        self.abar_prev = torch.cat([schedule.alpha_bars, torch.tensor([final_alpha_bar], dtype=torch.float64)])[self.previous]
        self.alpha = self.abar / self.abar_prev
        self.beta = 1 - self.alpha
        self.beta_tilde = (1 - self.abar_prev) / (1 - self.abar) * self.beta
        self.signal, self.noise = self.abar.sqrt(), (1 - self.abar).sqrt()  # x_t = signal x_0 + noise epsilon
        self.from_x_0 = self.abar_prev.sqrt() * self.beta / (1 - self.abar)  # mu~ = from_x_0 x_0 + from_x_t x_t
        self.from_x_t = self.alpha.sqrt() * (1 - self.abar_prev) / (1 - self.abar)

    def x_0_weights(self) -> tuple[Tensor, Tensor]:
        """p and q of x_0^ = p x_t + q m: derivation eq. 3, or for the mean of x_{t-1} eq. 7, solved for x_0."""
        if self.prediction == "epsilon":
            return 1 / self.signal, -self.noise / self.signal
        if self.prediction == "sample":
            return torch.zeros_like(self.signal), torch.ones_like(self.signal)
        if self.prediction == "previous_sample":
            return -self.from_x_t / self.from_x_0, 1 / self.from_x_0
        return self.signal, -self.noise

    def epsilon_weights(self) -> tuple[Tensor, Tensor]:
        """The weights of x_t and m in epsilon^."""
        if self.prediction == "epsilon":
            return torch.zeros_like(self.signal), torch.ones_like(self.signal)
        if self.prediction == "sample":
            return 1 / self.noise, -self.signal / self.noise
        if self.prediction == "previous_sample":
            p, q = self.x_0_weights()
            return (1 - self.signal * p) / self.noise, -self.signal * q / self.noise
        return self.noise, self.signal

    def ddim(self, abar_next: Tensor, sigma: Tensor, rederive: bool, learned_variance: bool) -> SamplingPlan:
        """Steps to the noise level `abar_next` along epsilon^: the model's own, or derived again from the clipped x_0^."""
        direction = (1 - abar_next - sigma.square()).sqrt()  # the weight of epsilon^
        if rederive:  # epsilon^ = (x_t - sqrt(abar) x_0^) / sqrt(1 - abar)
            k0 = abar_next.sqrt() - direction * self.signal / self.noise
            k1, k2 = direction / self.noise, torch.zeros_like(direction)
        else:
            k0 = abar_next.sqrt()
            from_x_t, from_m = self.epsilon_weights()
            k1, k2 = direction * from_x_t, direction * from_m
        # A learned variance between e^0 and e^0 leaves sigma what it is.
        log_variances = (torch.zeros_like(sigma), torch.zeros_like(sigma))
        variance: Literal["fixed", "learned_range"] = "learned_range" if learned_variance else "fixed"
        return self.plan(k0=k0, k1=k1, k2=k2, sigma=sigma, log_variances=log_variances, variance=variance)

    def plan(
        self,
        *,
        k0: Tensor,
        k1: Tensor,
        k2: Tensor,
        sigma: Tensor,
        log_variances: tuple[Tensor, Tensor],
        variance: Literal["fixed", "learned", "learned_range"],
    ) -> SamplingPlan:
        p, q = self.x_0_weights()
        if self.clip is None:
            # Nothing nonlinear stands between m and x_prev: fold x_0^ away in float64. For DDPM this gives
            # k1 = 1 / sqrt(alpha), k2 = -beta / (sqrt(alpha) sqrt(1 - abar)): eq. 13, free of p's cancellation at large t.
            k0, k1, k2 = torch.zeros_like(k0), k1 + k0 * p, k2 + k0 * q
        clip = torch.full_like(k0, torch.inf if self.clip is None else self.clip)
        columns = [p, q, k0, k1, k2, torch.zeros_like(k0), sigma, *log_variances, clip]
        return SamplingPlan(self.schedule, self.timesteps, torch.stack(columns, dim=1), self.prediction, variance)


def spaced_timesteps(caller: str, total: int, num_steps: int, spacing: Spacing) -> Tensor:
    """int64 [num_steps], strictly descending in 0..total-1: one of the named spacings, to the last bit as diffusers rounds it.

    Only where diffusers' "trailing" goes on to timestep -1, as it does for some counts, is it left out.
    """
    if not isinstance(num_steps, int) or isinstance(num_steps, bool) or not 1 <= num_steps <= total:
        raise ValueError(f"{caller}: expected num_steps to be an integer in 1..{total}, got {num_steps!r}")
    if spacing == "leading":
        descending = np.arange(num_steps)[::-1] * (total // num_steps)
    elif spacing == "trailing":
        descending = np.arange(total, 0, -total / num_steps)[:num_steps].round() - 1
    elif spacing == "linspace":
        descending = np.linspace(0, total - 1, num_steps).round()[::-1]
    else:
        raise ValueError(
            f'{caller}: expected spacing to be "leading", "trailing", "linspace" or a sequence of timesteps, got {spacing!r}'
        )
    return torch.from_numpy(descending.astype(np.int64))


def _timesteps(caller: str, total: int, num_steps: int | None, spacing: Spacing | Sequence[int], must_descend: bool) -> Tensor:
    """int64 [S]: those listed, or those of a named spacing."""
    if isinstance(spacing, str):
        return spaced_timesteps(caller, total, total if num_steps is None else num_steps, spacing)
    timesteps = torch.as_tensor(spacing)
    usable = timesteps.dim() == 1 and timesteps.numel() > 0 and not timesteps.is_floating_point()
    usable = usable and int(timesteps.min()) >= 0 and int(timesteps.max()) < total
    if not usable or (must_descend and not bool((timesteps.diff() < 0).all())):
        kind = "strictly descending timesteps" if must_descend else "timesteps"
        raise ValueError(f"{caller}: expected spacing to be {kind} in 0..{total - 1}, got {timesteps.tolist()}")
    if num_steps not in (None, timesteps.numel()):
        raise ValueError(f"{caller}: expected num_steps to be None or {timesteps.numel()}, as spacing lists, got {num_steps}")
    return timesteps.to("cpu", torch.int64)


def _previous(caller: str, timesteps: Tensor, previous: Sequence[int]) -> Tensor:
    """int64 [S]: where each step arrives, as given."""
    arrivals = torch.as_tensor(previous)
    usable = arrivals.shape == timesteps.shape and not arrivals.is_floating_point()
    if not usable or bool((arrivals >= timesteps).any()) or bool((arrivals < -1).any()):
        raise ValueError(
            f"{caller}: expected previous to be {timesteps.numel()} timesteps, each at least -1 and below the one that its "
            f"step starts from, got {arrivals.tolist()}"
        )
    return arrivals.to("cpu", torch.int64)
