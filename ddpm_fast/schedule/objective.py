"""Objectives: the prediction of a network as two columns, from which everything else follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..checks import check_choice, check_float, check_number, check_values
from ..errors import InvalidType, InvalidValue, expect, public, public_methods
from ..options import checked
from ..predictions import TARGETS, Prediction, Variance
from .noise_schedule import NoiseSchedule, Target


@public_methods
@dataclass(frozen=True, eq=False, repr=False)
class Objective:
    """The prediction of a network, the variance of its reverse steps, and the weights of its loss.

    A network predicts m = a x_0 + b epsilon, with two numbers for each timestep. With x_t = alpha x_0 + sigma epsilon, and with
    D = alpha b - sigma a:

        x_0^     = (b x_t - sigma m) / D
        epsilon^ = (alpha m - a x_t) / D

    If D is 0, m and x_t do not determine x_0^ and epsilon^. Training the prediction itself needs neither.

    A function that takes a schedule and a prediction takes an objective instead of both. `denoising_loss` does not apply its
    loss weights.

    Attributes:
        schedule: The noise schedule.
        prediction: The columns a and b: "epsilon" (0, 1), "sample" (1, 0), "v_prediction" (-sigma, alpha; Salimans and Ho
            2022), "flow" (-1, 1; Lipman et al. 2023), or a tensor [T, 2] of finite numbers, not both 0, which is kept as
            float64 on the CPU.
        variance: Variance of the reverse steps, as in `ddpm_plan`. The network predicts "learned" and "learned_range" in as
            many further channels (Nichol and Dhariwal 2021).
        loss_weight: "min_snr" bounds the weight of the loss on x_0 by `gamma` (Hang et al. 2023). None: 1 for every timestep.
        gamma: The bound of "min_snr", positive and finite.

    Raises:
        TypeError: An attribute has the wrong type.
        ValueError: An attribute has a wrong value, or the tensor has another shape.
    """

    schedule: NoiseSchedule
    prediction: Prediction | Tensor = "epsilon"
    variance: Variance = "fixed_small"
    loss_weight: Literal["min_snr"] | None = None
    gamma: float = 5.0
    _targets: dict[torch.device, Target] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, NoiseSchedule):
            raise InvalidType(
                "schedule",
                "to be a NoiseSchedule (NoiseSchedule.from_diffusers(scheduler.config))",
                type(self.schedule).__name__,
            )
        check_choice("variance", self.variance, get_args(Variance))
        check_choice("loss_weight", self.loss_weight, (None, "min_snr"))
        check_number("gamma", self.gamma, above=0, finite=True)
        if isinstance(self.prediction, str):
            check_choice("prediction", self.prediction, TARGETS)
            return
        check_float("prediction", self.prediction)
        check_values("prediction", self.prediction)
        shape, got = [self.schedule.num_timesteps, 2], list(self.prediction.shape)
        expect(got == shape, "prediction", f"to be a name, or two columns of shape {shape}", got)
        target = self.prediction.detach().to("cpu", torch.float64, copy=True)
        bad = (~(target.isfinite().all(dim=1) & (target != 0).any(dim=1))).nonzero().flatten().tolist()
        expect(not bad, "prediction", "to have finite columns that are not both 0", f"others at timestep {next(iter(bad), '')}")
        object.__setattr__(self, "prediction", target)
        self._targets[torch.device("cpu")] = Target.of(target, "cpu")  # in place before torch.compile looks

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Objective) and self.parts() == other.parts() and torch.equal(self.target, other.target)

    def __hash__(self) -> int:
        return hash((self.schedule, self.name, self.variance))

    def __deepcopy__(self, memo: dict[int, Any]) -> Objective:
        return self

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}={value}" for name, value in self.parts().items())
        return f"Objective({parts})"

    def parts(self) -> dict[str, Any]:
        """Return what is to be the same in equal objectives, by name, besides the columns of a tensor."""
        weighted = {} if self.loss_weight is None else {"loss_weight": self.loss_weight, "gamma": self.gamma}
        return {"schedule": self.schedule, "prediction": self.name, "variance": self.variance.removesuffix("_log")} | weighted

    @property
    def name(self) -> str:
        """The name of the prediction, or "custom" for a tensor."""
        return self.prediction if isinstance(self.prediction, str) else "custom"

    @property
    def predicts_variance(self) -> bool:
        """True if the network also predicts the variance of the reverse steps."""
        return self.variance.startswith("learned")

    def out_channels(self, channels: int) -> int:
        """Return the channels that the network predicts for images of `channels` channels."""
        return channels * (2 if self.predicts_variance else 1)

    # --------------------------------------------------------------------------------------------------------- columns

    @property
    def target(self) -> Tensor:
        """The columns a and b of m = a x_0 + b epsilon, float64 [T, 2] on the CPU."""
        return torch.stack(self.target_at(*self._levels), dim=1)

    @property
    @public()
    def x_0_weights(self) -> Tensor:
        """The weights of x_t and m in x_0^, float64 [T, 2] on the CPU. A ValueError if D is 0 at a timestep."""
        return self._determined("x_0", self.x_0_weights_at(*self._levels))

    @property
    @public()
    def epsilon_weights(self) -> Tensor:
        """The weights of x_t and m in epsilon^, float64 [T, 2] on the CPU. A ValueError if D is 0 at a timestep."""
        return self._determined("epsilon", self.epsilon_weights_at(*self._levels))

    @property
    @public()
    def loss_weights(self) -> Tensor:
        """The weight of each timestep's loss on the prediction itself, float64 [T] on the CPU.

        With loss_weight="min_snr", the weight is 1 where alpha and D are both 0, and elsewhere

            min(alpha^2, gamma sigma^2) / D^2

        Pass `loss_weights[t].float()` as the `weight` of `denoising_loss`. A ValueError if D is 0 and alpha is not.
        """
        alpha, sigma, _ = self._levels
        if self.loss_weight is None:
            return torch.ones_like(alpha)
        determinant = _determinant(*self.target_at(*self._levels), alpha, sigma)
        weights = torch.minimum(alpha.square(), self.gamma * sigma.square()) / determinant.square()
        return self._determined("x_0", [torch.where((alpha == 0) & (determinant == 0), 1.0, weights)])[:, 0]

    def _determined(self, what: str, columns: Sequence[Tensor]) -> Tensor:
        """Return the columns as [T, columns]. Raise a ValueError unless they are finite, as D is 0 otherwise."""
        stacked = torch.stack(tuple(columns), dim=1)
        lost = (~stacked.isfinite().all(dim=1)).nonzero().flatten().tolist()
        got = f"{self.name}, for which D = 0 at timestep {next(iter(lost), '')}"
        expect(not lost, "prediction", f"to determine {what} at every timestep", got)
        return stacked

    def target_at(self, alpha: Tensor, sigma: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the columns a and b for x = alpha x_0 + sigma epsilon, float64 [S] each.

        Args:
            alpha: The weight of x_0, float64 [S].
            sigma: The weight of epsilon, float64 [S].
            timesteps: The timesteps that the network is given, int64 [S]. If `prediction` is a tensor, a and b depend on
                them alone.
        """
        if isinstance(self.prediction, Tensor):
            a, b = self.prediction[timesteps].unbind(1)
            return a, b
        return TARGETS[self.prediction](alpha, sigma)

    def x_0_weights_at(self, alpha: Tensor, sigma: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return p and q of x_0^ = p x + q m, not finite where D is 0. The arguments are those of `target_at`."""
        a, b = self.target_at(alpha, sigma, timesteps)
        determinant = _determinant(a, b, alpha, sigma)
        return b / determinant + 0.0, -sigma / determinant  # 0.0 instead of -0.0, as plans are compared by their bytes

    def epsilon_weights_at(self, alpha: Tensor, sigma: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of x and m in epsilon^, not finite where D is 0. The arguments are those of `target_at`."""
        a, b = self.target_at(alpha, sigma, timesteps)
        determinant = _determinant(a, b, alpha, sigma)
        return -a / determinant + 0.0, alpha / determinant

    def on(self, device: torch.device) -> Target:
        """Return the target as kernels read it. It is computed once for each device and must not be changed."""
        if isinstance(self.prediction, str):
            return self.schedule.target(self.prediction, device)
        if device not in self._targets:
            on_cpu = self._targets[torch.device("cpu")]
            with torch.inference_mode(False):
                self._targets[device] = on_cpu._replace(table=on_cpu.table.to(device))
        return self._targets[device]

    @cached_property
    @public()
    def bound_columns(self) -> Tensor:
        """The coefficients of the variational bound, float64 [7, T] on the CPU. A ValueError if D is 0 at a timestep.

        They are a, b, sigma / D, the weight of x_0 in mu~ (eq. 7), and the three of `NoiseSchedule.reverse_log_variances`.
        The first three give the error of x_0:

            x_0 - x_0^ = sigma / D (m - a x_0 - b epsilon)
        """
        schedule = self.schedule
        columns = (*self.target.unbind(1), -self.x_0_weights[:, 1], schedule.posterior_mean_coef_x_0)
        return torch.stack([*columns, *schedule.reverse_log_variances.unbind(1)])

    @property
    def _levels(self) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, sigma and t of each timestep."""
        schedule = self.schedule
        return schedule.sqrt_alpha_bars, schedule.sqrt_one_minus_alpha_bars, torch.arange(schedule.num_timesteps)

    # ----------------------------------------------------------------------------------------------------------- files

    def to_config(self) -> dict[str, Any]:
        """Return the JSON values from which `from_config` builds an equal objective."""
        prediction = self.prediction.tolist() if isinstance(self.prediction, Tensor) else self.prediction
        config = {"schedule": self.schedule.to_config(), "prediction": prediction, "variance": self.variance}
        return config | {"loss_weight": self.loss_weight, "gamma": self.gamma}

    def scheduler_config(self, clip: float | None = 1.0) -> dict[str, Any]:
        """Return the objective as keys of a scheduler of diffusers. The key "_ddpm_fast", which it ignores, has the schedule.

        Args:
            clip: The bound on x_0^, or None.
        """
        schedule, own = self.schedule, self.schedule.to_config()
        diffusers_names = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
        if schedule.name in diffusers_names:
            betas: dict[str, Any] = {"beta_schedule": diffusers_names[schedule.name]}
            betas |= {key: own[key] for key in ("beta_start", "beta_end") if key in own}
        else:
            betas = {"trained_betas": schedule.betas.tolist()}
        return {
            "num_train_timesteps": schedule.num_timesteps,
            **betas,
            "prediction_type": self.to_config()["prediction"],
            "variance_type": self.variance,
            "clip_sample": clip is not None,
            "clip_sample_range": 1.0 if clip is None else clip,
            "timestep_spacing": "leading",
            "_ddpm_fast": own,
        }

    @classmethod
    @checked()
    def from_config(cls, config: Mapping[str, Any]) -> Objective:
        """Return the objective that `to_config` described.

        Raises:
            TypeError: `config` is no mapping, or a value has the wrong type.
            ValueError: A key is missing or unknown, or a value is out of range.
        """
        keys = ("schedule", "prediction", "variance", "loss_weight", "gamma")
        expect(config.keys() == {*keys}, "", f"the keys {', '.join(keys)}", ", ".join(config) or "none")
        schedule, prediction = NoiseSchedule.from_config(config["schedule"]), config["prediction"]
        return cls(**{**config, "schedule": schedule, "prediction": checked_columns(prediction)})


def checked_columns(prediction: Any) -> Any:
    """Return a prediction that a file holds: a name, or a list of pairs as a tensor."""
    try:
        return torch.tensor(prediction, dtype=torch.float64) if isinstance(prediction, list) else prediction
    except (TypeError, ValueError) as error:
        raise InvalidValue("prediction", "to be a name, or T pairs of numbers", error) from error


def objective_of(
    schedule: NoiseSchedule | Objective,
    prediction: Prediction | None = None,
    variance: Variance | None = None,
) -> Objective:
    """Return the objective that a caller's arguments describe.

    Args:
        schedule: The noise schedule, or an objective.
        prediction: The prediction. None: that of the given objective, or "epsilon".
        variance: The variance. None: that of the given objective, or "fixed_small".
    """
    if not isinstance(schedule, Objective):
        default: Prediction = "epsilon"
        return Objective(
            schedule, default if prediction is None else prediction, "fixed_small" if variance is None else variance
        )
    expect(prediction is None, "prediction", "to be left out with an Objective, which has it", repr(prediction))
    return schedule if variance is None else replace(schedule, variance=variance)


def _determinant(a: Tensor, b: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return D = alpha b - sigma a. For "v_prediction" it is alpha^2 + sigma^2, so 1 up to rounding."""
    determinant = alpha * b - sigma * a
    return torch.where((determinant - 1).abs() < 1e-15, 1.0, determinant)
