"""Samplers as tables of coefficients.

A plan has one row for each step. `reverse_step` applies one row in one kernel. A new sampler is a new table, not a new kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .checks import check_choice, check_int, check_number, check_strided, check_type
from .reference import PREDICTIONS, VARIANCES
from .schedule import NoiseSchedule, numbered

Spacing = Literal["leading", "trailing", "linspace"]
Prediction = Literal["epsilon", "sample", "v_prediction", "previous_sample"]
Variance = Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]

COLUMNS: Final = ("p", "q", "k0", "k1", "k2", "k3", "sigma", "log_beta", "log_beta_tilde", "clip")
"""The columns of `SamplingPlan.coefficients`, in order."""
VARIANCE_TYPES: Final[tuple[str, ...]] = get_args(Variance)
"""The values of `ddpm_plan`'s argument `variance`."""
_PREDICTIONS: Final = (*PREDICTIONS, "previous_sample")
_INTEGERS: Final = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class SamplingPlan:
    """A sampler as a table of coefficients.

    `ddpm_plan` and `ddim_plan` build plans. Row 0 is the first step to run. A step computes, from x_t and the model's output m:

        x_0^    = clip(p x_t + q m)
        x_{t-1} = k0 x_0^ + k1 x_t + k2 m + k3 x_0_prev + std z

    Here x_0_prev is the x_0^ of the step before, and z is standard normal noise.

    Attributes:
        schedule: The noise schedule to sample from.
        timesteps: The model's t for each step: int64 [S] on the CPU, in 0..T-1. They strictly descend, with two exceptions:
            plans with `previous`, and plans by `ddim_inversion_plan`.
        coefficients: float64 [S, 10] on the CPU. COLUMNS names the columns. An infinite `clip` disables the clip.
        prediction: The meaning of m: "epsilon", "sample" (x_0), "v_prediction" or "previous_sample". The last is the mean of
            x_{t-1}, for the previous timestep of this plan.
        variance: "fixed", "learned" or "learned_range". If "fixed", std is the column sigma. Otherwise m has variance
            channels, see `reverse_step`.
        is_random: True if any step draws noise.
        needs_x_0_prev: True if any step uses x_0_prev, as multistep samplers do.

    Raises:
        ValueError: An unknown prediction or variance, coefficients of another shape, or a coefficient that is not finite.
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
        """Check the fields, and derive `is_random` and `needs_x_0_prev`."""
        caller = "SamplingPlan"
        check_type(caller, "schedule", self.schedule, NoiseSchedule)
        _check_tensor(caller, "timesteps", self.timesteps, torch.int64, 1)
        _check_tensor(caller, "coefficients", self.coefficients, torch.float64, 2)
        total, low, high = self.schedule.num_timesteps, int(self.timesteps.min()), int(self.timesteps.max())
        if low < 0 or high >= total:
            raise ValueError(f"{caller}: expected timesteps in 0..{total - 1}, got values from {low} to {high}")
        check_choice(caller, "prediction", self.prediction, _PREDICTIONS)
        check_choice(caller, "variance", self.variance, VARIANCES)
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
        self.table()  # torch.compile must find the CPU's table ready

    def _uses(self, column: str) -> bool:
        """Return True if any row of `column` is nonzero."""
        return bool((self.coefficients[:, COLUMNS.index(column)] != 0).any())

    @property
    def num_steps(self) -> int:
        """The number of steps S."""
        return self.timesteps.numel()

    def mean(self) -> SamplingPlan:
        """Return the same plan without noise. Its steps give the mean of x_{t-1}."""
        coefficients = self.coefficients.clone()
        coefficients[:, COLUMNS.index("sigma")] = 0
        return replace(self, coefficients=coefficients)

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """Return `coefficients` in float32, [S, 10], rounded once. The tensor is cached for each device."""
        return self._tensors("SamplingPlan.table", device)[0]

    def steps(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the steps 0..S-1, int64 [S]. The tensor is cached for each device.

        `steps(device)[i]` is a step on the device, without a copy from the host.
        """
        return self._tensors("SamplingPlan.steps", device)[1]

    def _tensors(self, caller: str, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Return the table and the steps on `device`, from the cache if they are there."""
        if type(device) is not torch.device or device not in self._on_device:
            device = numbered(caller, device)
        if device not in self._on_device:
            # The cache serves all callers. Autograd cannot save an inference tensor, so make ordinary ones.
            with torch.inference_mode(False):
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
    """Build a plan for ancestral sampling (Ho et al. 2020, Algorithm 2; derivation eq. 13).

    Each step uses the posterior of derivation eq. 6-8. A step of a strided plan goes from t to the plan's next timestep s < t
    (Nichol and Dhariwal 2021, section 4):

        alpha = abar_t / abar_s
        beta  = 1 - alpha

    The last step gives the mean, without noise.

    Args:
        schedule: The noise schedule, with T timesteps.
        num_steps: The number of steps S, in 1..T. None takes every timestep. A single step is timestep 0 with "leading" and
            "linspace", as in diffusers. It is T - 1 with "trailing".
        spacing: The timesteps: "leading", "trailing" or "linspace" (Lin et al. 2023, Table 2), or a strictly descending
            sequence in 0..T-1.
        previous: The timestep where each step arrives, below the one where it starts. -1 is x_0. It needs a sequence as
            `spacing`, which may then have any order. None steps to the next timestep of `spacing`.
        prediction: The meaning of the model's output, see `SamplingPlan`.
        variance: The choice of sigma^2: beta~ ("fixed_small"), beta ("fixed_large") or the model's ("learned",
            "learned_range"). The names with "_log" are synonyms.
        clip: Clamp x_0^ to [-clip, clip]. None disables the clip, and a step is then exactly eq. 13.

    Returns:
        The plan, with S rows.

    Raises:
        TypeError: `schedule` is not a NoiseSchedule.
        ValueError: An argument is out of range, or the model predicts epsilon where abar is 0.
    """
    check_choice("ddpm_plan", "variance", variance, VARIANCE_TYPES)
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
    """Build a plan for DDIM (Song et al. 2021, eq. 12 and 16).

    The sampler is deterministic if eta is 0. It has the variance of ancestral sampling if eta is 1. With a clip, epsilon
    follows from the clipped x_0^:

        epsilon^ = (x_t - sqrt(abar_t) x_0^) / sqrt(1 - abar_t)

    Args:
        schedule: The noise schedule, with T timesteps.
        num_steps: The number of steps S, as in `ddpm_plan`.
        spacing: The timesteps, as in `ddpm_plan`.
        previous: The timestep where each step arrives, as in `ddpm_plan`.
        prediction: The meaning of the model's output, see `SamplingPlan`.
        eta: The scale of sigma, at least 0. An eta that is too large for a step is an error that names the largest one.
        clip: Clamp x_0^ to [-clip, clip]. None disables the clip.
        use_clipped_model_output: Derive epsilon again from the clipped x_0^, as guided-diffusion does. False keeps the
            model's own epsilon, which is diffusers' default. It tends to leave more noise. Both agree without a clip.
        final_alpha_bar: abar after the last step, in (0, 1]. The default 1 arrives at x_0. Latent diffusion uses abar_0
            ("set_alpha_to_one": false in diffusers).
        learned_variance: True if the model's output has variance channels. DDIM ignores them.

    Returns:
        The plan, with S rows.

    Raises:
        TypeError: `schedule` is not a NoiseSchedule.
        ValueError: An argument is out of range, or the model predicts epsilon where abar is 0.
    """
    check_number("ddim_plan", "eta", eta, 0)
    check_number("ddim_plan", "final_alpha_bar", final_alpha_bar, above=0, high=1)
    check_type("ddim_plan", "use_clipped_model_output", use_clipped_model_output, bool)
    check_type("ddim_plan", "learned_variance", learned_variance, bool)
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
    """Build a plan for DDIM inversion, from an image to its x_T (Song et al. 2021, section 4.3).

    The plan runs DDIM with eta = 0 backwards. The timesteps ascend, and each step goes to the next larger one. The last step
    goes to abar = 0. Epsilon is derived again from the clipped x_0^.

    Args:
        schedule: The noise schedule, with T timesteps.
        num_steps: The number of steps S, as in `ddpm_plan`.
        spacing: The timesteps, as in `ddpm_plan`. A sequence descends here too.
        prediction: The meaning of the model's output, see `SamplingPlan`.
        clip: Clamp x_0^ to [-clip, clip]. None disables the clip.
        learned_variance: True if the model's output has variance channels. DDIM ignores them.

    Returns:
        The plan, with S rows.

    Raises:
        TypeError: `schedule` is not a NoiseSchedule.
        ValueError: An argument is out of range, or the model predicts epsilon where abar is 0.
    """
    check_type("ddim_inversion_plan", "learned_variance", learned_variance, bool)
    path = _Path("ddim_inversion_plan", schedule, num_steps, spacing, None, prediction, clip)
    zero = torch.zeros_like(path.abar)
    plan = path.ddim(torch.cat([zero[:1], path.abar[:-1]]), zero, True, learned_variance)
    return replace(plan, timesteps=plan.timesteps.flip(0), coefficients=plan.coefficients.flip(0))


class _Path:
    """The timesteps of a plan, with the quantities that samplers share.

    Tensors are float64 [S] unless stated otherwise. Their order is that of the steps.

    Attributes:
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
        caller: str,
        schedule: NoiseSchedule,
        num_steps: int | None,
        spacing: Spacing | Sequence[int],
        previous: Sequence[int] | None,
        prediction: Prediction,
        clip: float | None,
        final_alpha_bar: float = 1.0,
    ) -> None:
        """Check the arguments of a plan and compute what samplers share.

        Args:
            caller: The function that error messages name.
            schedule: The noise schedule.
            num_steps: The number of steps, as in `ddpm_plan`.
            spacing: The timesteps, as in `ddpm_plan`.
            previous: The timestep where each step arrives, as in `ddpm_plan`.
            prediction: The meaning of the model's output.
            clip: The bound on x_0^, positive, or None.
            final_alpha_bar: abar on arrival at x_0.

        Raises:
            TypeError: `schedule` is not a NoiseSchedule.
            ValueError: An argument is out of range.
        """
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(
                f"{caller}: expected schedule to be a NoiseSchedule (NoiseSchedule.from_diffusers(scheduler.config)), "
                f"got {type(schedule).__name__}"
            )
        check_choice(caller, "prediction", prediction, _PREDICTIONS)
        check_number(caller, "clip", clip, above=0, optional=True)
        self.schedule, self.prediction, self.clip = schedule, prediction, clip
        self.timesteps = _timesteps(caller, schedule.num_timesteps, num_steps, spacing, previous is None)
        if previous is None:
            self.previous = torch.cat([self.timesteps[1:], torch.tensor([-1])])
        else:
            self.previous = _previous(caller, self.timesteps, previous)
        self.abar = schedule.alpha_bars[self.timesteps]
        if (before_x_0 := self.abar[self.previous == -1]).numel() and final_alpha_bar < float(before_x_0.max()):
            raise ValueError(
                f"{caller}: expected final_alpha_bar to be at least abar of the last timestep, {float(before_x_0.max()):.6g}, "
                f"got {final_alpha_bar}"
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
        if self.prediction == "epsilon":
            return 1 / self.signal, -self.noise / self.signal
        if self.prediction == "sample":
            return torch.zeros_like(self.signal), torch.ones_like(self.signal)
        if self.prediction == "previous_sample":
            return -self.from_x_t / self.from_x_0, 1 / self.from_x_0
        return self.signal, -self.noise

    def epsilon_weights(self) -> tuple[Tensor, Tensor]:
        """Return the weights of x_t and m in epsilon^, float64 [S] each."""
        if self.prediction == "epsilon":
            return torch.zeros_like(self.signal), torch.ones_like(self.signal)
        if self.prediction == "sample":
            return 1 / self.noise, -self.signal / self.noise
        if self.prediction == "previous_sample":
            p, q = self.x_0_weights()
            return (1 - self.signal * p) / self.noise, -self.signal * q / self.noise
        return self.noise, self.signal

    def ddim(self, abar_next: Tensor, sigma: Tensor, rederive: bool, learned_variance: bool) -> SamplingPlan:
        """Build the plan of DDIM steps to given noise levels.

        Args:
            abar_next: abar on arrival, float64 [S].
            sigma: The standard deviation of the noise, float64 [S].
            rederive: Derive epsilon^ again from the clipped x_0^. False uses the model's own.
            learned_variance: True if the model's output has variance channels.
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
        """Build a plan from its columns.

        Args:
            k0: The weight of x_0^, float64 [S].
            k1: The weight of x_t, float64 [S].
            k2: The weight of the model's output, float64 [S].
            sigma: The standard deviation of the noise, float64 [S].
            log_variances: The columns log_beta and log_beta_tilde, float64 [S] each.
            variance: The kind of variance, see `SamplingPlan`.
        """
        p, q = self.x_0_weights()
        if self.clip is None:
            # Without a clip, x_prev is linear in x_t and m: eliminate x_0^ in float64. For DDPM this gives eq. 13,
            #   k1 = 1 / sqrt(alpha)
            #   k2 = -beta / (sqrt(alpha) sqrt(1 - abar))
            # and avoids the cancellation that p causes at large t.
            k0, k1, k2 = torch.zeros_like(k0), k1 + k0 * p, k2 + k0 * q
        clip = torch.full_like(k0, torch.inf if self.clip is None else self.clip)
        columns = [p, q, k0, k1, k2, torch.zeros_like(k0), sigma, *log_variances, clip]
        return SamplingPlan(self.schedule, self.timesteps, torch.stack(columns, dim=1), self.prediction, variance)


def _check_tensor(caller: str, name: str, value: Tensor, dtype: torch.dtype, dim: int) -> None:
    """Raise unless `value` is a dense tensor of this dtype and number of dimensions on the CPU, with elements."""
    check_type(caller, name, value, Tensor)
    check_strided(caller, name, value)
    if value.dtype != dtype or value.device.type != "cpu" or value.numel() == 0 or value.dim() != dim:
        got = f"{value.dtype} {list(value.shape)} on {value.device}"
        wanted = f"{dtype} of {dim} dimension{'s' * (dim > 1)} on the CPU, with elements"
        raise ValueError(f"{caller}: expected {name} to be {wanted}, got {got}")


def spaced_timesteps(caller: str, total: int, num_steps: int, spacing: Spacing) -> Tensor:
    """Return the timesteps of a named spacing, rounded as diffusers rounds them.

    For some counts diffusers' "trailing" adds timestep -1. This function omits it.

    Args:
        caller: The function that error messages name.
        total: The number of timesteps T.
        num_steps: The number of steps S, in 1..T.
        spacing: "leading", "trailing" or "linspace".

    Returns:
        int64 [S], strictly descending in 0..T-1.

    Raises:
        ValueError: `num_steps` is out of range, or `spacing` is unknown.
    """
    check_int(caller, "num_steps", num_steps, 1, total)
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
    """Return the timesteps of a named spacing, or the listed ones after a check.

    Args:
        caller: The function that error messages name.
        total: The number of timesteps T.
        num_steps: The number of steps S. None takes every timestep, or the length of the list.
        spacing: A named spacing, or a sequence of timesteps.
        must_descend: Require that listed timesteps strictly descend.

    Returns:
        int64 [S] on the CPU, in 0..T-1.

    Raises:
        ValueError: An argument is out of range.
    """
    if isinstance(spacing, str):
        return spaced_timesteps(caller, total, total if num_steps is None else num_steps, spacing)
    check_int(caller, "num_steps", num_steps, 1, optional=True)
    try:
        timesteps = torch.as_tensor(spacing)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{caller}: expected spacing to be a name or timesteps, got {spacing!r}") from error
    usable = timesteps.dim() == 1 and timesteps.numel() > 0 and timesteps.dtype in _INTEGERS
    usable = usable and int(timesteps.min()) >= 0 and int(timesteps.max()) < total
    if not usable or (must_descend and not bool((timesteps.diff() < 0).all())):
        kind = "strictly descending timesteps" if must_descend else "timesteps"
        raise ValueError(f"{caller}: expected spacing to be {kind} in 0..{total - 1}, got {timesteps.tolist()}")
    if num_steps not in (None, timesteps.numel()):
        raise ValueError(f"{caller}: expected num_steps to be None or {timesteps.numel()}, as spacing lists, got {num_steps}")
    return timesteps.to("cpu", torch.int64)


def _previous(caller: str, timesteps: Tensor, previous: Sequence[int]) -> Tensor:
    """Return where each step arrives, as given, after a check.

    Args:
        caller: The function that error messages name.
        timesteps: The start of each step, int64 [S].
        previous: The arrival of each step. At least -1, and below the start.

    Returns:
        int64 [S] on the CPU.

    Raises:
        ValueError: Another number of steps, or an arrival out of range.
    """
    try:
        arrivals = torch.as_tensor(previous)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{caller}: expected previous to be timesteps, got {previous!r}") from error
    usable = arrivals.shape == timesteps.shape and arrivals.dtype in _INTEGERS
    if not usable or bool((arrivals >= timesteps).any()) or bool((arrivals < -1).any()):
        raise ValueError(
            f"{caller}: expected previous to be {timesteps.numel()} timesteps, each at least -1 and below the one that its "
            f"step starts from, got {arrivals.tolist()}"
        )
    return arrivals.to("cpu", torch.int64)
