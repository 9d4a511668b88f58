"""`SamplingPlan`: a sampler as a table of coefficients."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import TYPE_CHECKING, Annotated, Final, Literal, ParamSpec, get_args

import torch
from torch import Tensor

from ..checks import check_choice, check_strided, check_type
from ..errors import InvalidValue, expect, public, public_methods
from ..options import checked, within
from ..predictions import TARGETS, Prediction, Variance
from ..reference import VARIANCES, PlanRow
from ..schedule import NoiseSchedule, numbered

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Clip = Annotated[float | None, within(above=0)]
"""The bound on x_0^."""
PlanPrediction = Prediction | Literal["previous_sample"]
"""The meaning of a model's output: a prediction of `Objective`, or the mean of x_{t-1}."""

COLUMNS: Final = PlanRow._fields
"""The columns of `SamplingPlan.coefficients`, in order."""
VARIANCE_TYPES: Final[tuple[str, ...]] = get_args(Variance)
"""The values of `ddpm_plan`'s argument `variance`."""

_SPACED: Final = frozenset({"previous", "sigma_min", "sigma_max", "rho", "start"})  # arguments that go with other timesteps
_PRINTED_ROWS: Final = 10  # a longer plan shows the first and the last


@dataclass(frozen=True)
class Fit:
    """The fit of a plan to a slower one, see `fit_plan`.

    Attributes:
        teacher: The call that builds the teacher.
        guidance_scale: The scale of guidance with which both drew.
        error_before: Root of the mean squared difference from the teacher's images in [-1, 1], of images that the fit did not
            see, before the fit.
        error: The same after it.
        network: In a plan.json, `Pretrained.digest` of the model. Elsewhere empty.
    """

    teacher: str
    guidance_scale: float
    error_before: float
    error: float
    network: str = ""


@public_methods
@dataclass(frozen=True, eq=False, repr=False)
class SamplingPlan:
    """A sampler as a table of coefficients.

    `ddpm_plan`, `ddim_plan`, `dpm_solver_plan` and `heun_plan` build plans. Row 0 is the first step to run. A step computes,
    from x_t and the model's output m:

        x_0^    = clip(p x_t + q m)
        x_{t-1} = k0 x_0^ + k1 x_t + k2 m + k3 x_0_prev + k4 x_0_prev2 + std z

    Here x_0_prev is the x_0^ of the step before, x_0_prev2 that of the step before it, and z is standard normal noise.

    `print(plan)` and a notebook show a table, and `plan.plot()` draws it. `plan[10:]` is a plan of the steps from 10 on.

    Attributes:
        schedule: The noise schedule to sample from.
        timesteps: The model's t for each step: int64 [S] on the CPU, in 0..T-1. Most samplers' descend. They ascend in
            `ddim_inversion_plan`, jump up in `repaint_plan`, and may repeat in `heun_plan` and with Karras's levels.
        coefficients: float64 [S, 11] on the CPU. COLUMNS names the columns. An infinite `clip` disables the clip. The
            tensor is a copy. Changing it has no effect, because steps, `print` and `plot` read `table`.
        prediction: The meaning of m: a name of `Objective`'s, "custom" for columns of your own, or "previous_sample", the mean
            of x_{t-1}, for the previous timestep of this plan.
        variance: "fixed", "learned" or "learned_range". If "fixed", std is the column sigma. Otherwise m has variance
            channels, see `reverse_step`.
        alpha_bars_prev: abar of the x_{t-1} that each step gives: float64 [S] on the CPU, in 0..1. Empty: that of the
            next step's timestep, and 1 at last.
        alpha_bars: abar of the x_t that each step starts from: float64 [S] on the CPU, in 0..1. Empty: that of its timestep.
        is_random: True if any step draws noise.
        needs_x_0_prev: True if any step uses x_0_prev or x_0_prev2, as multistep samplers do.
        needs_x_0_prev2: True if any step uses x_0_prev2, as multistep samplers of order 3 do.
        builder: The call that built the plan. None for a plan from coefficients.
        fit: What `fit_plan` says of a plan that it returns. None for other plans.

    Raises:
        ValueError: An unknown prediction or variance, coefficients of another shape, or a coefficient that is not finite.
    """

    schedule: NoiseSchedule
    timesteps: Tensor
    coefficients: Tensor
    prediction: str
    variance: Literal["fixed", "learned", "learned_range"]
    alpha_bars_prev: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    alpha_bars: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    is_random: bool = field(init=False)
    needs_x_0_prev: bool = field(init=False)
    needs_x_0_prev2: bool = field(init=False)
    builder: partial[SamplingPlan] | None = field(default=None, init=False, repr=False)
    fit: Fit | None = field(default=None, init=False, repr=False)
    _on_device: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the fields, and derive what the plan needs."""
        check_type("schedule", self.schedule, NoiseSchedule)
        _check_tensor("timesteps", self.timesteps, torch.int64, 1)
        _check_tensor("coefficients", self.coefficients, torch.float64, 2)
        total, low, high = self.schedule.num_timesteps, int(self.timesteps.min()), int(self.timesteps.max())
        expect(low >= 0 and high < total, "timesteps", f"in 0..{total - 1}", f"values from {low} to {high}")
        check_choice("prediction", self.prediction, (*TARGETS, "previous_sample", "custom"))
        check_choice("variance", self.variance, VARIANCES)
        if self.coefficients.shape != (self.num_steps, len(COLUMNS)):
            wanted, got = [self.num_steps, len(COLUMNS)], list(self.coefficients.shape)
            raise InvalidValue("coefficients", f"of shape {wanted}", got)
        for name in ("timesteps", "coefficients"):  # the caller may change its tensors
            object.__setattr__(self, name, getattr(self, name).clone())
        abar = self.schedule.alpha_bars[self.timesteps]
        following = torch.cat([abar[1:], torch.ones(1, dtype=torch.float64)])
        for name, default in (("alpha_bars_prev", following), ("alpha_bars", abar)):
            given = getattr(self, name)
            values = default if isinstance(given, Tensor) and given.numel() == 0 else given
            _check_tensor(name, values, torch.float64, 1)
            if values.numel() != self.num_steps or not bool(((values >= 0) & (values <= 1)).all()):
                raise InvalidValue(name, f"to be {self.num_steps} values in 0..1", values.tolist())
            object.__setattr__(self, name, values.clone())
        usable = torch.isfinite(self.coefficients[:, : COLUMNS.index("clip")])
        if not bool(usable.all()):
            row, column = (int(i) for i in (~usable).nonzero()[0])
            t, value = int(self.timesteps[row]), float(self.coefficients[row, column])
            raise InvalidValue(
                "",
                "finite coefficients",
                f"{COLUMNS[column]} = {value} at timestep {t} (abar = {float(abar[row]):.3g}) "
                f"with prediction {self.prediction!r}, which does not determine x_0 and epsilon there"
                + ('; "sample", "v_prediction" and "flow" do' if abar[row] == 0 else ""),
            )
        object.__setattr__(self, "is_random", self._uses("sigma"))
        object.__setattr__(self, "needs_x_0_prev2", self._uses("k4"))
        object.__setattr__(self, "needs_x_0_prev", self._uses("k3") or self.needs_x_0_prev2)
        self.table()  # torch.compile must find the CPU's table ready

    def _uses(self, column: str) -> bool:
        """Return True if any row of `column` is nonzero."""
        return bool((self.coefficients[:, COLUMNS.index(column)] != 0).any())

    @property
    def num_steps(self) -> int:
        """The number of steps S."""
        return self.timesteps.numel()

    def __len__(self) -> int:
        """Return the number of steps S."""
        return self.num_steps

    def __getitem__(self, steps: slice) -> SamplingPlan:
        """Return a plan of consecutive steps, such as `plan[10:]`. It counts them from 0 for their noise.

        Raises:
            TypeError: `steps` is not a slice.
            ValueError: The slice is empty or has a stride, or the plan uses x_0_prev, which its first step would lack.
        """
        check_type("steps", steps, slice)
        rows = range(self.num_steps)[steps]
        expect(rows.step == 1 and rows, "", f"a slice of consecutive steps in 0..{self.num_steps - 1}", steps)
        if len(rows) == self.num_steps:
            return self
        if self.needs_x_0_prev:
            raise InvalidValue(
                "",
                "a whole plan, as its steps use the x_0^ of earlier ones",
                "a slice: build it with start=, or call starting_at(timestep)",
            )
        some = slice(rows.start, rows.stop)
        names = ("timesteps", "coefficients", "alpha_bars_prev", "alpha_bars")
        return replace(self, **{name: getattr(self, name)[some] for name in names})

    @checked()
    def starting_at(self, timestep: Annotated[int, within(low=0)]) -> SamplingPlan:
        """Return the plan from a timestep on, for a start from x_t instead of x_T.

        A multistep plan is built again with `start=timestep`, so that its first step needs no x_0_prev. Any other plan keeps
        its rows from the first one with the timestep.

        Args:
            timestep: One of the plan's timesteps.

        Raises:
            ValueError: The plan does not have the timestep, or is a multistep plan from coefficients.
        """
        timesteps = self.timesteps.tolist()
        if timestep not in timesteps:
            nearest = min(timesteps, key=lambda each: abs(each - timestep))
            raise InvalidValue("timestep", "to be one of the plan's", f"{timestep}; the nearest is {nearest}")
        if not self.needs_x_0_prev:
            return self[timesteps.index(timestep) :]
        wanted = "a plan that remembers how it was built, as its steps use the x_0^ of earlier ones"
        expect(self.builder is not None, "", wanted, "one from coefficients")
        assert self.builder is not None
        return self.builder(start=timestep)

    @checked()
    def in_steps(self, num_steps: Annotated[int | None, within(low=1)], timesteps: Sequence[int] | None = None) -> SamplingPlan:
        """Return the plan of the same call in another number of steps, or at other timesteps.

        A plan that was fitted in its own number of steps is built without the fit, between its first and last level.

        Args:
            num_steps: The number of steps that the call takes. None: that of `timesteps`.
            timesteps: The timesteps. None: those of the call's spacing.

        Raises:
            ValueError: The plan is one from coefficients, the call lists its timesteps, or an argument is out of range.
        """
        given = self.builder
        expect(given is not None, "", "a plan that remembers how it was built", "one from coefficients")
        assert given is not None
        options = {name: value for name, value in given.keywords.items() if name not in ("levels", "corrections")}
        if timesteps is not None:
            options = {name: value for name, value in options.items() if name not in _SPACED} | {"spacing": timesteps}
        elif (levels := given.keywords.get("levels")) is not None:
            options |= {"spacing": "karras", "sigma_max": levels[0], "sigma_min": levels[-1]}
        return given.func(**options | {"num_steps": num_steps})

    def __repr__(self) -> str:
        """Return a short table: for each step its timestep, abar at its start and on arrival, and the noise's sigma."""
        title = "SamplingPlan" if self.builder is None else call_of(self.builder)
        traits = [f"{self.num_steps} step{'s' * (self.num_steps != 1)}", f"the model predicts {self.prediction}"]
        traits.append("random" if self.is_random else "deterministic")
        if self.needs_x_0_prev:
            traits.append(
                "uses the x_0^ of the two steps before" if self.needs_x_0_prev2 else "uses the x_0^ of the step before"
            )
        if self.fit is not None:
            title += f"\nfitted to {self.fit.teacher}: error {self.fit.error_before:.4g} -> {self.fit.error:.4g}"
        lines = [title, ", ".join(traits), f"{'step':>5} {'t':>6} {'abar':>10} {'arrives at':>10} {'sigma':>10}"]
        shown = [*range(self.num_steps)]
        if self.num_steps > _PRINTED_ROWS:
            shown = shown[: _PRINTED_ROWS // 2] + shown[-(_PRINTED_ROWS // 2) :]
        sigma = self.table()[:, COLUMNS.index("sigma")]
        for before, step in zip([-1, *shown], shown, strict=False):
            if step != before + 1:
                lines.append("  ...")
            t = int(self.timesteps[step])
            numbers = (self.alpha_bars[step], self.alpha_bars_prev[step], sigma[step])
            lines.append(f"{step:>5} {t:>6} " + " ".join(f"{float(number):>10.4g}" for number in numbers))
        return "\n".join(lines)

    def plot(self) -> Figure:
        """Draw the timesteps, the signal and noise levels on arrival, and sigma, over the steps.

        Returns:
            A figure of three panels. `plan.plot().savefig("plan.png")` writes it.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("matplotlib is missing: install it with pip install 'ddpm_fast[bench]'") from error

        figure = Figure(figsize=(10, 2.8), layout="constrained")
        levels, noise, sigmas = figure.subplots(1, 3)
        steps = range(self.num_steps)
        levels.plot(steps, self.timesteps, ".-")
        levels.set(title="timestep", xlabel="step")
        noise.plot(steps, self.alpha_bars_prev.sqrt(), ".-", label="signal")
        noise.plot(steps, (1 - self.alpha_bars_prev).sqrt(), ".-", label="noise")
        noise.set(title="levels on arrival", xlabel="step")
        noise.legend()
        sigmas.plot(steps, self.table()[:, COLUMNS.index("sigma")], ".-")
        sigmas.set(title="sigma", xlabel="step")
        return figure

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """Return `coefficients` in float32, [S, 11], rounded once. The tensor is cached for each device."""
        return self._tensors(device)[0]

    def steps(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the steps 0..S-1, int64 [S]. The tensor is cached for each device.

        `steps(device)[i]` is a step on the device, without a copy from the host.
        """
        return self._tensors(device)[1]

    def _tensors(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Return the table and the steps on `device`, from the cache if they are there."""
        if type(device) is not torch.device or device not in self._on_device:
            device = numbered(device)
        if device not in self._on_device:
            # The cache serves all callers. Autograd cannot save an inference tensor, so make ordinary ones.
            with torch.inference_mode(False):
                steps = torch.arange(self.num_steps, device=device)
                self._on_device[device] = (self.coefficients.to(device, torch.float32), steps)
        return self._on_device[device]


_P = ParamSpec("_P")


def builds_plan(build: Callable[_P, SamplingPlan]) -> Callable[_P, SamplingPlan]:
    """Check the arguments of a function that builds plans, see `checked`, and record its call in `SamplingPlan.builder`."""
    build = checked()(build)

    @public()
    @wraps(build)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> SamplingPlan:
        plan = build(*args, **kwargs)
        arguments = inspect.signature(build).bind(*args, **kwargs).arguments
        object.__setattr__(plan, "builder", partial(wrapped, **deepcopy(arguments)))  # a caller may change a list of timesteps
        return plan

    return wrapped


def call_of(builder: partial[SamplingPlan]) -> str:
    """Return the builder's call as text, without the schedule."""
    given = (f"{name}={reprlib.repr(value)}" for name, value in builder.keywords.items() if name != "schedule")
    return f"{builder.func.__name__}({', '.join(given)})"


def _check_tensor(name: str, value: Tensor, dtype: torch.dtype, dim: int) -> None:
    """Raise unless `value` is a dense tensor of this dtype and number of dimensions on the CPU, with elements."""
    check_strided(name, value)
    if value.dtype != dtype or value.device.type != "cpu" or value.numel() == 0 or value.dim() != dim:
        got = f"{value.dtype} {list(value.shape)} on {value.device}"
        wanted = f"{dtype} of {dim} dimension{'s' * (dim > 1)} on the CPU, with elements"
        raise InvalidValue(name, f"to be {wanted}", got)
