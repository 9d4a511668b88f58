"""Noise schedules: betas in float64, and every coefficient that the derivation computes from them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from ..checks import MAX_TIMESTEPS, check_choice, check_strided, check_type, checked_device
from ..errors import InvalidType, InvalidValue, expect, public_methods, renaming
from ..files.models import model_folder, scheduler_file
from ..files.writing import read_json
from ..options import checked
from ..predictions import TARGETS, Columns
from . import builders


class Target(NamedTuple):
    """The columns a and b of a x_0 + b epsilon, as kernels read them.

    Attributes:
        table: float32 [T, 2] on a device, computed in float64 and rounded once.
        reads_x_0: True if a is not 0 for some timestep.
        reads_epsilon: True if b is not 0 for some timestep.
    """

    table: Tensor
    reads_x_0: bool
    reads_epsilon: bool

    @classmethod
    def of(cls, columns: Tensor, device: torch.device | str) -> Target:
        """Return the target of columns, float64 [T, 2] on the CPU."""
        with torch.inference_mode(False):  # kept for all callers: one that trains could not save an inference tensor
            return cls(columns.to(device, torch.float32), *(columns != 0).any(dim=0).tolist())


@public_methods
class NoiseSchedule:
    """The betas of a diffusion process and the coefficients derived from them.

    A schedule never changes. All coefficients are float64 on the CPU, [T] unless stated otherwise. They are computed at each
    access. The paper counts
    t = 1..T, the code t = 0..T-1. Build a schedule with `linear`, `scaled_linear`, `cosine`, `sigmoid`, `laplace`,
    `flow`, `sigmoid_betas` or `from_betas`. Equation numbers are those of the derivation in the documentation;
    those of Ho et al. 2020 follow where they differ.

    Args:
        betas: Floating [T] with T in 1..100,000, each in (0, 1].
        name: The builder's name, for `to_config`.
        parameters: The builder's arguments, for `to_config`.

    Raises:
        ValueError: `betas` has another dtype or shape, or a value outside (0, 1].
    """

    @checked()
    def __init__(self, betas: Tensor, name: str = "from_betas", parameters: dict[str, Any] | None = None) -> None:
        self._betas = _checked_betas(betas)
        check_choice("name", name, BUILDERS)
        self._name = name
        self._parameters = dict(parameters or {})
        self._targets: dict[tuple[str, torch.device], Target] = {}
        for each in _COLUMNS:
            self.target(each)  # in place before torch.compile looks

    # ------------------------------------------------------------------------------------------------------ builders

    @classmethod
    def linear(
        cls,
        num_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        *,
        scale_to_num_timesteps: bool = False,
    ) -> NoiseSchedule:
        """Return a schedule of evenly spaced betas (Ho et al. 2020, section 4).

        Args:
            num_timesteps: T, 1 to 100,000.
            beta_start: First beta, before scaling.
            beta_end: The last beta.
            scale_to_num_timesteps: Multiply both ends by 1000 / T, as improved-diffusion does. Then x_T is
                nearly pure noise for every T. By default the ends are used as given, as in diffusers, and
                a T far below 1000 leaves signal in x_T.
        """
        return cls._built(
            "linear",
            num_timesteps=num_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            scale_to_num_timesteps=scale_to_num_timesteps,
        )

    @classmethod
    def scaled_linear(cls, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """Return a schedule whose betas have evenly spaced square roots.

        This is "quad" in the code of Ho et al., and the schedule of latent diffusion.

        Args:
            num_timesteps: T, 1 to 100,000.
            beta_start: First beta, before scaling.
            beta_end: The last beta.
        """
        return cls._built("scaled_linear", num_timesteps=num_timesteps, beta_start=beta_start, beta_end=beta_end)

    @classmethod
    def cosine(cls, num_timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
        """Return the cosine schedule (Nichol and Dhariwal 2021, eq. 17).

        With u = t / T:

            abar(u) = cos^2((u + s) / (1 + s) pi / 2)

        Args:
            num_timesteps: T, 1 to 100,000.
            s: Offset that keeps the first betas from vanishing.
            max_beta: Upper bound on every beta.
        """
        return cls._built("cosine", num_timesteps=num_timesteps, s=s, max_beta=max_beta)

    @classmethod
    def sigmoid(
        cls,
        num_timesteps: int = 1000,
        start: float = -3.0,
        end: float = 3.0,
        tau: float = 1.0,
        max_beta: float = 0.999,
    ) -> NoiseSchedule:
        """Return a schedule whose abar falls along a sigmoid from 1 to 0 (Jabri et al. 2022).

        This is the default of denoising-diffusion-pytorch, which rounds both ends to float32: its betas differ by up
        to 1.3e-5 (relative, T = 1000).

        Args:
            num_timesteps: T, 1 to 100,000.
            start: Argument of the sigmoid at t = 0, before the division by `tau`.
            end: Argument of the sigmoid at t = T, before the division by `tau`.
            tau: Temperature of the sigmoid.
            max_beta: Upper bound on every beta.
        """
        return cls._built("sigmoid", num_timesteps=num_timesteps, start=start, end=end, tau=tau, max_beta=max_beta)

    @classmethod
    def sigmoid_betas(cls, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """Return a schedule whose betas rise along a sigmoid from -6 to 6 (GeoDiff, Xu et al. 2022).

        This is "sigmoid" in diffusers.

        Args:
            num_timesteps: T, 1 to 100,000.
            beta_start: Lower limit of the betas.
            beta_end: Upper limit of the betas.
        """
        return cls._built("sigmoid_betas", num_timesteps=num_timesteps, beta_start=beta_start, beta_end=beta_end)

    @classmethod
    def laplace(cls, num_timesteps: int = 1000, max_beta: float = 0.999) -> NoiseSchedule:
        """Return the schedule that diffusers calls "laplace".

        With u = t / T:

            abar(u) = sqrt(snr / (1 + snr))

        ln snr falls with u like the quantiles of a Laplace variable with location 0 and scale 1/2 (Hang et al.
        2024). Hang et al. have abar(u) = snr / (1 + snr). diffusers takes the square root, and models trained
        with diffusers need it.

        Args:
            num_timesteps: T, 1 to 100,000.
            max_beta: Upper bound on every beta.
        """
        return cls._built("laplace", num_timesteps=num_timesteps, max_beta=max_beta)

    @classmethod
    def flow(cls, num_timesteps: int = 1000) -> NoiseSchedule:
        """Return the schedule of flow matching (Lipman et al. 2023, Liu et al. 2023).

        Flow matching has x_s = (1 - s) x_0 + s epsilon, with s = (t + 1) / T. Divided by its length, that is an x_t with:

            abar_t = (1 - s)^2 / ((1 - s)^2 + s^2)

        The network reads this x_t and t. Predict "flow" for the loss of flow matching. At the last timestep abar is 0.

        Args:
            num_timesteps: T, 1 to 100,000.
        """
        return cls._built("flow", num_timesteps=num_timesteps)

    @classmethod
    def _built(cls, name: str, **parameters: Any) -> NoiseSchedule:
        """Return the schedule of the builder of this name."""
        return cls(getattr(builders, name)(**parameters), name, parameters)

    @classmethod
    def from_betas(cls, betas: Tensor | Sequence[float]) -> NoiseSchedule:
        """Return a schedule of the given betas.

        Args:
            betas: T values in (0, 1].

        Raises:
            ValueError: A beta is outside (0, 1].
        """
        if not isinstance(betas, Tensor):
            try:
                betas = torch.as_tensor(betas, dtype=torch.float64)
            except (TypeError, ValueError, RuntimeError, OverflowError) as error:
                raise InvalidType("betas", "to be T numbers", repr(betas)) from error
        return cls(_checked_betas(betas))

    @classmethod
    @checked()
    def from_diffusers(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Return the schedule that the configuration of a diffusers scheduler describes.

        Args:
            config: Keys of a scheduler's configuration. Missing keys have diffusers' defaults. The keys
                read are num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas and
                rescale_betas_zero_snr.

        Raises:
            TypeError: A value has another type than in diffusers.
            ValueError: diffusers' DDPMScheduler does not have this beta_schedule, or a value is out of range.
        """
        with renaming({"num_timesteps": "num_train_timesteps", "betas": "trained_betas"}):
            rescale = config.get("rescale_betas_zero_snr", False)
            check_type("rescale_betas_zero_snr", rescale, bool)
            if config.get("trained_betas") is not None:
                schedule = cls.from_betas(config["trained_betas"])
            else:
                name = config.get("beta_schedule", "linear")
                if not isinstance(name, str) or name not in _DIFFUSERS_BUILDERS:
                    known = ", ".join(_DIFFUSERS_BUILDERS)
                    raise InvalidValue("beta_schedule", f"to be one of {known}", repr(name))
                parameters: dict[str, Any] = {"num_timesteps": config.get("num_train_timesteps", 1000)}
                if name not in ("squaredcos_cap_v2", "laplace"):
                    parameters |= {key: config[key] for key in ("beta_start", "beta_end") if key in config}
                builder: Callable[..., NoiseSchedule] = getattr(cls, _DIFFUSERS_BUILDERS[name])
                schedule = builder(**parameters)
            return schedule.rescale_zero_terminal_snr() if rescale else schedule

    @classmethod
    @checked()
    def from_pretrained(cls, path: str | os.PathLike[str]) -> NoiseSchedule:
        """Read the schedule of a model's folder, from its scheduler_config.json.

        Args:
            path: A folder in diffusers' layout, or the name of a model, see `load_folder`. No weights are downloaded.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: The model cannot be downloaded.
            ValueError: The file is damaged, or describes a schedule that is not supported. The message names it.
        """
        folder = model_folder("path", path)
        return read_json(scheduler_file(folder), schedule_from_config)

    def rescale_zero_terminal_snr(self) -> NoiseSchedule:
        """Return this schedule with zero terminal SNR (Lin et al. 2023, Algorithm 1).

        sqrt(abar) is shifted and scaled. abar_{T-1} becomes 0 and abar_0 stays. Then x_T holds no
        signal, so predicted noise does not determine x_0. Plans that start there need prediction "sample",
        "v_prediction" or "flow".

        Raises:
            ValueError: The schedule has one timestep.
        """
        first, last = self.sqrt_alpha_bars[0], self.sqrt_alpha_bars[-1]
        expect(first != last, "", "a schedule of at least 2 timesteps", "1")
        alpha_bars = ((self.sqrt_alpha_bars - last) * (first / (first - last))).square()
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bars[:-1]])
        return NoiseSchedule(1 - alpha_bars / previous)

    # --------------------------------------------------------------------------------------------------- coefficients

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps T."""
        return self._betas.numel()

    @property
    def betas(self) -> Tensor:
        """Variances of the forward steps q(x_t | x_{t-1}), each in (0, 1] (eq. 1, Ho et al. eq. 2)."""
        return self._betas.clone()

    @property
    def alphas(self) -> Tensor:
        """Signal kept by each forward step: alpha_t = 1 - beta_t (eq. 2)."""
        return 1 - self.betas

    @property
    def alpha_bars(self) -> Tensor:
        """Signal kept up to step t: abar_t = prod_{s <= t} alpha_s (eq. 2)."""
        return self.alphas.cumprod(0)

    @property
    def alpha_bars_prev(self) -> Tensor:
        """abar_{t-1}, and 1 at t = 0 (eq. 6-8)."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bars[:-1]])

    @property
    def sqrt_alpha_bars(self) -> Tensor:
        """Weight of x_0 in x_t: sqrt(abar_t) (eq. 3, Ho et al. eq. 4)."""
        return self.alpha_bars.sqrt()

    @property
    def sqrt_one_minus_alpha_bars(self) -> Tensor:
        """Weight of epsilon in x_t: sqrt(1 - abar_t) (eq. 3, Ho et al. eq. 4)."""
        return (1 - self.alpha_bars).sqrt()

    @property
    def sqrt_recip_alphas(self) -> Tensor:
        """1 / sqrt(alpha_t) (eq. 13, Ho et al. eq. 11)."""
        return self.alphas.rsqrt()

    @property
    def posterior_mean_coef_x_0(self) -> Tensor:
        """Weight of x_0 in mu~_t.

            sqrt(abar_{t-1}) beta_t / (1 - abar_t)

        See eq. 7 (Ho et al. eq. 7).
        """
        return self.alpha_bars_prev.sqrt() * self.betas / (1 - self.alpha_bars)

    @property
    def posterior_mean_coef_x_t(self) -> Tensor:
        """Weight of x_t in mu~_t.

            sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t)

        See eq. 7 (Ho et al. eq. 7).
        """
        return self.alphas.sqrt() * (1 - self.alpha_bars_prev) / (1 - self.alpha_bars)

    @property
    def posterior_variance(self) -> Tensor:
        """Posterior variance beta~_t, 0 at t = 0.

            beta~_t = (1 - abar_{t-1}) / (1 - abar_t) beta_t

        See eq. 8 (Ho et al. eq. 7).
        """
        return (1 - self.alpha_bars_prev) / (1 - self.alpha_bars) * self.betas

    @property
    def posterior_log_variance(self) -> Tensor:
        """Logarithm of beta~_t, with the value of t = 1 at t = 0.

        beta~_0 is 0 and has no logarithm. The code of Nichol and Dhariwal 2021 replaces it in the same way.
        """
        variance = self.posterior_variance
        return torch.cat([variance[1:2] if self.num_timesteps > 1 else self.betas[:1], variance[1:]]).log()

    @property
    def reverse_log_variances(self) -> Tensor:
        """Log variances of the reverse steps, [T, 3]: ln beta~, ln beta, and ln beta as "fixed_large" has it.

        The first and the last have at t = 0 the value of ln beta~ at t = 1, as in the code of Ho et al.
        """
        small, beta = self.posterior_log_variance, self.betas.log()
        return torch.stack([small, beta, torch.cat([small[:1], beta[1:]])], dim=1)

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio abar_t / (1 - abar_t) (Kingma et al. 2021)."""
        return self.alpha_bars / (1 - self.alpha_bars)

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the table that `q_sample` reads.

        Args:
            device: Device of the table.

        Returns:
            float32 [T, 2]: sqrt(abar_t) and sqrt(1 - abar_t), computed in float64 and rounded once.
        """
        return self.target("x_t", device).table.clone()

    def target(self, name: str, device: torch.device | str = "cpu") -> Target:
        """Return x_t, or a prediction, as kernels read it. It is computed once for each device and must not be changed."""
        if type(device) is not torch.device or (name, device) not in self._targets:
            device = numbered(device)
        if (name, device) not in self._targets:
            columns = _COLUMNS[name](self.sqrt_alpha_bars, self.sqrt_one_minus_alpha_bars)
            self._targets[name, device] = Target.of(torch.stack(columns, dim=1), device)
        return self._targets[name, device]

    # ----------------------------------------------------------------------------------------------------------- files

    def to_config(self) -> dict[str, Any]:
        """Return the JSON values from which `from_config` builds an equal schedule."""
        if self.name == "from_betas":
            return {"name": self.name, "betas": self.betas.tolist()}
        return {"name": self.name, **self._parameters}

    @classmethod
    @checked()
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Return the schedule that `to_config` described.

        Args:
            config: "name" is a builder of this class. The other keys are its arguments.

        Raises:
            TypeError: `config` is no mapping, or an argument has the wrong type.
            ValueError: "name" is not a builder of this class, or an argument is unknown, missing or out of range.
        """
        parameters = dict(config)
        name = parameters.pop("name", None)
        expect(name in BUILDERS, "name", f"to be one of {', '.join(BUILDERS)}", repr(name))
        builder: Callable[..., NoiseSchedule] = getattr(cls, name)
        known = inspect.signature(builder).parameters
        required = [key for key, parameter in known.items() if parameter.default is parameter.empty]
        expect(
            set(required) <= parameters.keys() <= known.keys(),
            "",
            f"the arguments of {name} to be among {', '.join(known)}",
            ", ".join(parameters) or "none",
        )
        return builder(**parameters)

    @property
    def name(self) -> str:
        """The builder's name. `to_config` has its arguments."""
        return self._name

    def __repr__(self) -> str:
        parameters = ", ".join(f"{k}={v}" for k, v in self._parameters.items()) or f"num_timesteps={self.num_timesteps}"
        return f"NoiseSchedule.{self.name}({parameters})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NoiseSchedule) and torch.equal(self._betas, other._betas)

    def __hash__(self) -> int:
        return hash((self.num_timesteps, float(self._betas[0]), float(self._betas[-1])))

    def __deepcopy__(self, memo: dict[int, Any]) -> NoiseSchedule:
        return self


BUILDERS = ("linear", "scaled_linear", "cosine", "sigmoid", "laplace", "flow", "sigmoid_betas", "from_betas")
_COLUMNS: dict[str, Columns] = {"x_t": lambda alpha, sigma: (alpha, sigma), **TARGETS}
_DIFFUSERS_BUILDERS = {  # diffusers' beta_schedule -> builder
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
    "laplace": "laplace",
    "sigmoid": "sigmoid_betas",
}


# Schedulers of diffusers whose abar_t follow from the betas of their configuration. In those of other schedulers, the same
# keys are absent or mean something else.
_DDPM_SCHEDULERS: Final = frozenset(
    f"{name}Scheduler"
    for name in (
        *("DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep"),
        *("DPMSolverMultistepInverse", "DPMSolverSDE", "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete"),
        *("HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "RePaint", "SASolver"),
        *("Plan", "TCD", "UnCLIP", "UniPCMultistep"),  # Plan: of this package
    )
)


def schedule_from_config(config: Mapping[str, Any]) -> NoiseSchedule:
    """Return the noise schedule that a scheduler_config.json describes.

    Files written by this package describe it under the key "_ddpm_fast".

    Args:
        config: The file's keys and values.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range, "num_train_timesteps" is not the length of the schedule, or the file is that of
            a scheduler with other noise levels, for example of flow matching.
    """
    kind, own = config.get("_class_name"), config.get("_ddpm_fast")
    if kind is not None or own is None:
        wanted = "to be a scheduler of diffusers that has the noise levels of DDPM, such as DDPMScheduler"
        expect(kind in _DDPM_SCHEDULERS, "_class_name", wanted, repr(kind))
        wanted = "to be false, because its levels are those of flow matching"
        expect(not config.get("use_flow_sigmas"), "use_flow_sigmas", wanted, "true")
    if own is None:
        return NoiseSchedule.from_diffusers(config)
    schedule = NoiseSchedule.from_config(own)
    if (length := config.get("num_train_timesteps", schedule.num_timesteps)) != schedule.num_timesteps:
        wanted = f"{schedule.num_timesteps}, as in _ddpm_fast"
        raise InvalidValue("num_train_timesteps", f"to be {wanted}", repr(length))
    return schedule


def numbered(device: torch.device | str) -> torch.device:
    """Return `device` with its index, as tensors report it: "cuda" becomes the current GPU. Raise if it is not available."""
    device = checked_device(device)
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _checked_betas(betas: Tensor) -> Tensor:
    """Return a float64 copy of betas on the CPU, or raise unless they are floating [T] in (0, 1]."""
    if not isinstance(betas, Tensor):
        raise InvalidType(
            "betas", "to be a floating tensor [T]", f"{type(betas).__name__}: NoiseSchedule.from_betas takes a sequence"
        )
    check_strided("betas", betas)
    if betas.dim() != 1 or not 1 <= betas.numel() <= MAX_TIMESTEPS or not betas.is_floating_point() or betas.is_meta:
        got = f"{betas.dtype} {list(betas.shape)} on {betas.device}"
        wanted = f"a floating tensor of shape [T] with values, T in 1..{MAX_TIMESTEPS}"
        raise InvalidValue("betas", f"to be {wanted}", got)
    betas = betas.detach().to("cpu", torch.float64, copy=True)
    outside = ~((betas > 0) & (betas <= 1))  # NaN included
    if outside.any():
        first = int(outside.nonzero()[0])
        raise InvalidValue("betas", "to be in (0, 1]", f"{betas[first]:.6g} at index {first}")
    return betas
