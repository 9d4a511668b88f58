"""Common part of the schedulers that step from any timestep: DDPM, DDIM and its inversion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from ...checks import check_float, checked_device
from ...errors import InvalidValue
from ...ops.reverse_step import reverse_step
from ...plan import COLUMNS, SamplingPlan, spaced_timesteps
from ...schedule import NoiseSchedule, numbered
from .common import KernelScheduler, check_steps, checked_offset, checked_timestep

_MAX_KEPT = 8  # a caller may pass another eta at every step, so old plans are dropped


class PlanScheduler(KernelScheduler):
    """Common part of the schedulers whose step needs a timestep alone, a mixin before diffusers' class."""

    def _set_up(self, build: Callable[[Any], NoiseSchedule] = NoiseSchedule.from_diffusers) -> None:
        """Check the configuration and set diffusers' attributes."""
        super()._set_up(build)
        self.timesteps = torch.arange(self.config.num_train_timesteps - 1, -1, -1)
        self._is_default = True

    def _forget(self) -> None:
        self._kept: dict[tuple[Any, ...], _Steps] = {}

    # --------------------------------------------------------------------------------------------------------- timesteps

    @property
    def timesteps(self) -> Tensor:
        """Timesteps for the model and `step`, int64 [S], in this order."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, timesteps: Tensor) -> None:
        self._timesteps, self._chain = timesteps, timesteps.cpu()
        self._is_default = False
        self._kept = {}

    def _spaced(self, num_inference_steps: Any) -> Tensor:
        """Return int64 [num_inference_steps] in the configuration's spacing."""
        name, total = f"{type(self).__name__}.set_timesteps", self.config.num_train_timesteps
        check_steps(name, num_inference_steps)
        if not 1 <= num_inference_steps <= total:
            raise InvalidValue(name, "num_inference_steps", f"to be in 1..{total} (num_train_timesteps)", num_inference_steps)
        timesteps = spaced_timesteps(name, total, int(num_inference_steps), self.config.timestep_spacing)
        if self.config.timestep_spacing == "leading":
            timesteps = checked_offset(name, self.config.steps_offset, timesteps, total)
        return timesteps

    def _set_chain(self, timesteps: Tensor, num_inference_steps: int | None, device: torch.device | str | None) -> None:
        """Make this chain of timesteps the current one and move its tables to the device."""
        if device is not None:
            device = checked_device(f"{type(self).__name__}.set_timesteps", device)
        kinds = [*self._kept] or [self._plan_arguments()]
        same = not self._is_default and num_inference_steps == self.num_inference_steps and torch.equal(timesteps, self._chain)
        if not same:
            self._kept = {}
        self.num_inference_steps, self._is_default = num_inference_steps, False
        self._timesteps, self._chain = timesteps.to(device), timesteps
        for arguments in kinds:
            self._steps(*arguments).prepare(device or "cpu")

    # ------------------------------------------------------------------------------------------------------------- plans

    def _plan_arguments(self) -> tuple[Any, ...]:
        """Return the default arguments of `_plan` after the timesteps."""
        raise NotImplementedError

    def _plan(self, timesteps: Sequence[int], previous: Sequence[int] | None, *arguments: Any) -> SamplingPlan:
        """Return the plan of steps from `timesteps` to `previous`, by default each to the next."""
        raise NotImplementedError

    def _between(self, timesteps: Tensor) -> Tensor:
        """Return where steps arrive that start between timesteps of the chain, int64."""
        raise NotImplementedError

    def _chain_plan(self, *arguments: Any) -> SamplingPlan:
        """Return a plan with a row for each of `timesteps`."""
        total, chain = self.schedule.num_timesteps, self._chain
        if total != self.config.num_train_timesteps:
            raise InvalidValue(
                type(self).__name__,
                "num_train_timesteps",
                f"to be {total}, the number of trained_betas",
                self.config.num_train_timesteps,
            )
        if self._is_default:  # every timestep from which there is a step
            chain = chain[self._has_step()[chain]]
        return self._plan(chain.tolist(), None, *arguments)

    def _has_step(self) -> Tensor:
        """Return which timesteps have a step, bool [T].

        With abar = 0, predicted noise does not determine x_0.
        """
        has_step: Tensor = (self.schedule.alpha_bars > 0) | (self.config.prediction_type != "epsilon")
        return has_step

    def _steps(self, *arguments: Any) -> _Steps:
        if arguments not in self._kept:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    f"{type(self).__name__}.step: expected a first step outside torch.compile, which makes the plan, got none "
                    f"since set_timesteps with {arguments}"
                )
            plan = self._chain_plan(*arguments)
            chain = frozenset(plan.timesteps.tolist())
            between = self._has_step()
            between[plan.timesteps] = False
            if between.any():
                timesteps = between.nonzero()[:, 0]
                others = self._plan(timesteps.tolist(), self._between(timesteps).tolist(), *arguments)
                plan = replace(
                    plan,
                    timesteps=torch.cat([plan.timesteps, others.timesteps]),
                    coefficients=torch.cat([plan.coefficients, others.coefficients]),
                    alpha_bars_prev=torch.cat([plan.alpha_bars_prev, others.alpha_bars_prev]),
                    alpha_bars=torch.cat([plan.alpha_bars, others.alpha_bars]),
                )
            if self._thresholds:
                plan = _with_given_x_0(plan)
            if len(self._kept) == _MAX_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[arguments] = _Steps(plan, chain)
        return self._kept[arguments]

    # -------------------------------------------------------------------------------------------------------------- step

    def _known(self, timestep: Any, model_output: Tensor, sample: Tensor) -> list[int] | None:
        """Return the timesteps of a step if they are on the host, else None.

        Reading timesteps from a device would synchronize. The arguments that `reverse_step` does not check are
        checked here.
        """
        name = f"{type(self).__name__}.step"
        check_float(name, "model_output", model_output)
        check_float(name, "sample", sample)
        n = sample.shape[0]
        compiling = torch.compiler.is_compiling()
        if compiling and not isinstance(timestep, Tensor):
            return None
        timestep = checked_timestep(name, timestep)
        if not isinstance(timestep, Tensor):
            return [timestep]
        if timestep.numel() not in (1, n):
            raise InvalidValue(name, "timestep", f"to have 1 or {n} elements", f"shape {list(timestep.shape)}")
        return None if compiling or timestep.device.type != "cpu" else timestep.reshape(-1).tolist()

    def _advance(
        self,
        steps: _Steps,
        known: list[int] | None,
        timestep: Any,
        model_output: Tensor,
        sample: Tensor,
        noise: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return x_{t-1} and x_0^."""
        row = steps.find(timestep, sample.device) if known is None else self._find(steps, known, sample.device)
        x_t = sample.to(torch.promote_types(sample.dtype, model_output.dtype))
        if model_output.dtype != x_t.dtype and x_t.dtype != torch.float32:
            model_output = model_output.to(x_t.dtype)  # float32 takes half precision as it is
        noise = None if noise is None else noise.to(x_t.dtype)
        seeds = self._seeds_for(steps.plan, x_t.device) if noise is None else None
        if not self._thresholds:
            stepped = reverse_step(x_t, model_output, row, steps.plan, noise=noise, seeds=seeds, return_x_0=True)
            return cast("tuple[Tensor, Tensor]", stepped)
        x_0 = self._thresholded(steps.plan.table(x_t.device)[row], x_t, model_output)
        x_prev = reverse_step(x_t, model_output, row, steps.plan, noise=noise, seeds=seeds, x_0_prev=x_0)
        return cast(Tensor, x_prev), x_0

    def _find(self, steps: _Steps, known: list[int], device: torch.device) -> int | Tensor:
        """Return the rows of timesteps that are on the host."""
        rows = [steps.rows.get(t, -1) for t in known]
        if -1 in rows:
            t = known[rows.index(-1)]
            name, total = f"{type(self).__name__}.step", self.schedule.num_timesteps
            if 0 <= t < total:
                raise InvalidValue(
                    name,
                    "prediction_type",
                    f"sample or v_prediction at timestep {t}, where abar is 0 and the noise does not tell x_0",
                    "epsilon",
                )
            raise InvalidValue(name, "timestep", f"to be in 0..{total - 1}", t)
        return rows[0] if len(rows) == 1 else torch.tensor(rows, device=device)

    def _clip(self) -> float | None:
        """Return the bound on x_0^ for a plan, or None.

        Plans for `_with_given_x_0` always have a bound, so that x_0^ keeps its own weight.
        """
        if self._thresholds:
            return 1.0
        return self.config.clip_sample_range if self._clips else None


@dataclass(frozen=True, eq=False)
class _Steps:
    """A scheduler's step at each timestep.

    Attributes:
        plan: Rows of the scheduler's chain in order, then rows of the timesteps between.
        chain: Timesteps of the chain.
        rows: Row of each timestep that has one.
    """

    plan: SamplingPlan
    chain: frozenset[int]
    rows: dict[int, int] = field(init=False)
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", {t: row for row, t in enumerate(self.plan.timesteps.tolist())})
        self.prepare("cpu")

    def prepare(self, device: torch.device | str) -> Tensor:
        """Return `rows` as int64 [T], kept per device. A timestep without a row has that of the first step."""
        device = numbered("set_timesteps", device)
        if device not in self._on_device:
            self.plan.table(device)
            rows = [self.rows.get(t, 0) for t in range(self.plan.schedule.num_timesteps)]
            with torch.inference_mode(False):  # kept for all callers
                self._on_device[device] = torch.tensor(rows, device=device)
        return self._on_device[device]

    def find(self, timestep: int | Tensor, device: torch.device) -> Tensor:
        """Return the rows of timesteps, int64 [1 or N] on the device, without synchronization."""
        if not isinstance(timestep, Tensor):
            timestep = torch.full((1,), timestep, device=device)
        return self.prepare(timestep.device).index_select(0, timestep.reshape(-1)).to(device)


def _with_given_x_0(plan: SamplingPlan) -> SamplingPlan:
    """Return the same steps with x_0^ given as `reverse_step`'s x_0_prev instead of computed."""
    coefficients = plan.coefficients.clone()
    k0, k3, clip = (COLUMNS.index(name) for name in ("k0", "k3", "clip"))
    coefficients[:, k3], coefficients[:, k0], coefficients[:, clip] = coefficients[:, k0], 0, torch.inf
    return replace(plan, coefficients=coefficients)
