"""`PlanScheduler`: any `SamplingPlan` as a scheduler of diffusers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import index
from typing import Any, get_args

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...checks import check_float, check_one_of, check_type, checked_device
from ...errors import expect, public, public_methods, renaming
from ...ops import reverse_step
from ...ops.arguments import index_tensor
from ...ops.q_sample import q_sample_op
from ...plan import COLUMNS, INTEGERS, SamplingPlan
from ...schedule.objective import objective_of


@dataclass(frozen=True, eq=False)
class _Chain:
    """A plan as steps read it, from one of its rows on. It never changes: a scheduler takes another one.

    Attributes:
        base: The plan without options of `step`.
        options: The options of `step` that are not its defaults.
        plan: The plan with them.
        first: The number of its first row.
        rest: The plan from there on.
        counts: Steps are counted. Otherwise their rows are looked up.
        timesteps: Those of the whole plan, int64 [S] on the device.
        row_of: The first row of each timestep in `rest`.
        rows: The same as a table, int64 [T] on the device.
        is_noisy: Whether each row of `rest` has noise.
        levels: alpha and sigma of each timestep, those of the plan where it has it, float32 [T, 2].
    """

    base: SamplingPlan
    options: Mapping[str, Any]
    plan: SamplingPlan
    first: int
    rest: SamplingPlan
    counts: bool
    timesteps: Tensor
    row_of: Mapping[int, int]
    rows: Tensor
    is_noisy: Sequence[bool]
    levels: Tensor

    @classmethod
    def of(
        cls, base: SamplingPlan, device: torch.device | str, options: Mapping[str, Any] | None = None, first: int = 0
    ) -> _Chain:
        """Return the chain of a plan from a row on.

        Raises:
            ValueError: No step begins there, or the plan is a multistep plan from coefficients.
        """
        plan = base.builder(**options) if options and base.builder is not None else base
        rest = plan
        if first > 0:
            t = int(plan.timesteps[first])
            rest = plan.starting_at(t) if plan.needs_x_0_prev else plan[first:]
            got = f"{first}, in the middle of a step, or not the first row of timestep {t}"
            expect(len(rest) == len(plan) - first, "begin_index", "to be where a step starts", got)
        listed = rest.timesteps.tolist()
        row_of = {t: row for row, t in reversed([*enumerate(listed)])}
        abar = plan.schedule.alpha_bars.clone()  # [T], with the levels of the plan, which may lie between those of timesteps
        rows = [*row_of.values()]
        abar[rest.timesteps[rows]] = rest.alpha_bars[rows]
        rest.table(device := torch.device(device))
        return cls(
            base=base,
            options=options or {},
            plan=plan,
            first=first,
            rest=rest,
            counts=rest.needs_x_0_prev or len({*listed}) < len(listed),
            timesteps=plan.timesteps.to(device),
            row_of=row_of,
            rows=torch.tensor([row_of.get(t, 0) for t in range(plan.schedule.num_timesteps)]).to(device),
            is_noisy=(rest.coefficients[:, COLUMNS.index("sigma")] > 0).tolist(),
            levels=torch.stack([abar.sqrt(), (1 - abar).sqrt()], dim=1).float(),
        )


@public_methods
class PlanScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # they differ in the type of config_name
    """A scheduler that runs a `SamplingPlan` in diffusers' pipelines and loops: `pipe.scheduler = PlanScheduler(plan)`.

    A step is one `reverse_step`. If the plan's timesteps differ and no step needs an earlier x_0^, a step is looked up by its
    timestep, so that steps have no state and may have any order. Other steps are counted, and `timestep` tells where the
    first one starts.

    A pipeline may save it if `ddpm_plan`, `ddim_plan`, `dpm_solver_plan` or `heun_plan` built the plan.

    Args:
        plan: The plan. What the network predicts must be what its builder was told.

    Attributes:
        plan: The plan of the chain: the given one, or what `set_timesteps` and the options of `step` made of it.
        timesteps: Timesteps for the model and `step`, int64 [S], in this order.
        num_inference_steps: The number of steps that the plan's builder takes, or of rows.
        order: Rows of a step: 2 for `heun_plan`, else 1.
        config: The keys of diffusers' DDPMScheduler that say what the network predicts, and the plan as in a plan.json.
        seeds: Seeds of the samples, int64 [N], or None. See `ddpm_fast.sample_seeds`. With seeds, the noise of row i is
            `ddpm_fast.noise(sample.shape, seeds, stream=i)`. It has the same bits in any batch and on any device, and equals
            the noise of `ddpm_fast.sample`. `step` then does not use its generator. They are not part of the configuration.

    Raises:
        TypeError: `plan` is not a SamplingPlan.
    """

    config: Any
    seeds: Tensor | None = None
    init_noise_sigma = 1.0  # a plan starts from unit noise at any level

    def __init__(self, plan: SamplingPlan) -> None:
        check_type("plan", plan, SamplingPlan)
        self.register_to_config(**_config(plan))  # type: ignore[no-untyped-call]
        self.betas, self.alphas = plan.schedule.betas.float(), plan.schedule.alphas.float()
        self.alphas_cumprod = plan.schedule.alpha_bars.float()
        self.order = 2 if plan.builder is not None and plan.builder.func.__name__ == "heun_plan" else 1
        self._given = plan
        self._begin(_Chain.of(plan, "cpu"))

    @classmethod
    def of(cls, scheduler: Any, num_steps: int | None = None, *, eta: float | None = None) -> PlanScheduler:
        """Return what a scheduler of diffusers does. Arguments and errors are those of `ddpm_fast.plan_of`."""
        from ..freezing import plan_of

        return cls(plan_of(scheduler, num_steps, eta=eta))

    # -------------------------------------------------------------------------------------------------------- files

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Return the scheduler that a configuration describes. `from_pretrained` reads it from a file.

        Raises:
            ValueError: The configuration has no plan, as that of another scheduler. `of` reads a scheduler.
        """
        import msgspec

        from ...schemas import Plan, read_scheduler

        got = "that of another scheduler: PlanScheduler.of(scheduler, num_steps) reads it"
        expect(config.get("plan"), "config", "to have a plan", got)
        objective, scheduler = read_scheduler(config)
        made = cls(msgspec.convert(config["plan"], Plan).build(objective, scheduler.clip))
        return (made, kwargs) if return_unused_kwargs else made

    @public("PlanScheduler.save_pretrained")
    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write scheduler_config.json. `save_pretrained` and pipelines call it.

        Raises:
            ValueError: No call that a file may name built the plan from plain values.
        """
        read = None if self.config.plan is None else self.from_config(json.loads(json.dumps(dict(self.config)))).plan
        same = read is not None and torch.equal(read.coefficients, self._given.coefficients)
        expect(same, "plan", "to be built by ddpm_plan, ddim_plan, dpm_solver_plan or heun_plan from plain values", "another")
        super().save_config(save_directory, push_to_hub, **kwargs)

    # ---------------------------------------------------------------------------------------------------- timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Begin a chain, in another number of steps than the plan's if its builder knows how.

        Args:
            num_inference_steps: The number of steps. Pass this or `timesteps`.
            device: Device of `self.timesteps`. On a GPU, steps that are looked up do not wait for it.
            timesteps: Timesteps as the `spacing` of the plan's builder.

        Raises:
            ValueError: Both or neither are given, the builder lists its timesteps, the plan was fitted in another number of
                steps, or a value is out of range.
        """
        plan = self._given
        check_one_of("num_inference_steps", num_inference_steps, "timesteps", timesteps)
        if timesteps is not None or num_inference_steps != self._count(plan):
            fixed = plan.fit is not None or plan.builder is None
            wanted = f"to be {self._count(plan)}, the number of the plan's steps"
            got = f"{timesteps if num_inference_steps is None else num_inference_steps}"
            expect(not fixed, "num_inference_steps", wanted, got)
            with renaming({"num_steps": "num_inference_steps", "spacing": "timesteps"}):
                plan = plan.in_steps(num_inference_steps, timesteps)
        self._begin(_Chain.of(plan, "cpu" if device is None else checked_device(device)))

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin in the middle, as pipelines from image to image do.

        A multistep plan is built again, so that its first step needs no x_0^ of an earlier one.

        Args:
            begin_index: Index of the first row in `timesteps`.

        Raises:
            ValueError: There is no such row, no step begins there, or the plan is a multistep plan from coefficients.
        """
        chain = self._chain
        expect(0 <= begin_index < len(chain.plan), "begin_index", f"in 0..{len(chain.plan) - 1}", begin_index)
        self._begin(_Chain.of(chain.base, self.timesteps.device, chain.options, begin_index), begin_index)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the sample: the network reads x_t."""
        return sample

    def __len__(self) -> int:
        """Return the number of timesteps T of the training."""
        return self._given.schedule.num_timesteps

    def _count(self, plan: SamplingPlan) -> int:
        """Return the number of steps that a plan's builder takes."""
        return (len(plan) + self.order - 1) // self.order

    def _begin(self, chain: _Chain, begin_index: int | None = None) -> None:
        """Take a chain, before its first step."""
        self._chain, self.plan, self.timesteps = chain, chain.plan, chain.timesteps
        self.num_inference_steps, self.begin_index = self._count(chain.base), begin_index
        self.step_index: int | None = None
        self._before: tuple[Tensor, ...] = ()  # x_0^ of the steps before, the latest first

    # --------------------------------------------------------------------------------------------------------- step

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Return x_{t-1} and x_0^, see `SamplingPlan`.

        Args:
            model_output: Like sample. With learned variance it has twice the channels, the prediction first.
            timestep: An int, or an integer tensor with 1 element or, if steps are looked up, N. A tensor on a GPU is read
                there, without synchronization or a check, so a CUDA graph of a step serves every step that is looked up.
            sample: x_t, [N, ...], floating.
            eta: Scale of the noise of `ddim_plan`. Many pipelines pass 0, which keeps the plan's own.
            use_clipped_model_output: Set that of `ddim_plan` to True. Any other value keeps the plan's own.
            generator: Draws the noise where the plan has any. With `seeds` it is not used.
            variance_noise: The noise itself, like sample, instead of a generator.
            return_dict: Return an object with prev_sample and pred_original_sample, else a tuple.

        Returns:
            prev_sample and pred_original_sample, in the wider dtype of model_output and sample. Differentiable.

        Raises:
            ValueError: An argument has an unsupported value or shape, a timestep on the host is not in the plan, or all steps
                were taken.
            TypeError: An argument has an unsupported type or dtype.
        """
        check_float("model_output", model_output)
        check_float("sample", sample)
        expect(variance_noise is None or generator is None, "", "at most one of generator and variance_noise", "both")
        self._choose(eta, use_clipped_model_output)
        row = self._next(timestep) if self._chain.counts else self._looked_up(timestep, sample)
        plan, noise = self._chain.rest, variance_noise
        if noise is None and self.seeds is None and plan.is_random:
            is_noisy = not isinstance(row, int) or self._chain.is_noisy[row]
            draw = partial(randn_tensor, generator=generator) if is_noisy else torch.zeros
            noise = draw(sample.shape, device=sample.device, dtype=model_output.dtype)
        x_t = sample.to(torch.promote_types(sample.dtype, model_output.dtype))
        m = model_output if x_t.dtype == torch.float32 else model_output.to(x_t.dtype)  # float32 takes half precision as it is
        given: dict[str, Any] = {}
        if plan.is_random:
            given = {"seeds": self.seeds} if noise is None else {"noise": noise.to(x_t)}
        if plan.needs_x_0_prev:  # the first rows weigh what they lack by 0
            first, second = [*self._before, *[torch.zeros_like(x_t)] * 2][:2]
            given |= {"x_0_prev": first.to(x_t), "x_0_prev2": second.to(x_t) if plan.needs_x_0_prev2 else None}
        x_prev, x_0 = reverse_step(x_t, m, row, plan, return_x_0=True, **given)
        if self._chain.counts:
            assert self.step_index is not None
            self.step_index += 1
            self._before = (x_0, *self._before)[:2]
        return DDIMSchedulerOutput(x_prev, x_0) if return_dict else (x_prev, x_0)

    def _choose(self, eta: float, use_clipped_model_output: bool | None) -> None:
        """Run the plan with the options of a step that `ddim_plan` takes."""
        options = {"eta": eta} if eta else {}
        options |= {"use_clipped_model_output": True} if use_clipped_model_output else {}
        if options == self._chain.options:
            return
        builder = self._chain.base.builder
        is_ddim = builder is not None and builder.func.__name__ == "ddim_plan"
        wanted = "eta 0 and use_clipped_model_output false for any plan but those of ddim_plan"
        expect(is_ddim, "", wanted, ", ".join(f"{name}={value}" for name, value in options.items()))
        expect(self.step_index is None, "", "the same options in all steps of a chain that is counted", options or "others")
        self._begin(_Chain.of(self._chain.base, self.timesteps.device, options, self._chain.first), self.begin_index)

    def _next(self, timestep: int | Tensor) -> int:
        """Return the row of the next step. The first one starts where its timestep says."""
        if self.step_index is None:
            if self.begin_index is None:
                listed = self.plan.timesteps.tolist()
                found = [row for row, t in enumerate(listed) if t == int(timestep)]
                expect(found, "timestep", "to be one of the scheduler's timesteps", timestep)
                # A step of Heun's method starts at the second of two rows of a timestep, as in diffusers.
                self.set_begin_index(0 if found[0] == 0 else found[min(1, len(found) - 1)])
            self.step_index = 0
        wanted, got = (
            f"one of the {len(self._chain.rest)} steps of the chain",
            "another: call set_timesteps to begin another chain",
        )
        expect(self.step_index < len(self._chain.rest), "", wanted, got)
        return self.step_index

    def _looked_up(self, timestep: int | Tensor, sample: Tensor) -> int | Tensor:
        """Return the row of a timestep, or rows [N] of several on the sample's device."""
        if not isinstance(timestep, Tensor):
            known = [index(timestep)]
        else:
            wanted = f"to be integers, 1 or {len(sample)}"
            whole = timestep.dtype in INTEGERS and timestep.numel() in (1, len(sample))
            expect(whole, "timestep", wanted, f"{timestep.dtype} {list(timestep.shape)}")
            t = timestep.reshape(-1)
            if torch.compiler.is_compiling() or t.device.type != "cpu":
                return self._chain.rows.to(t.device).index_select(0, t.to(torch.int64)).to(sample.device)
            known = t.tolist()
        unknown = [t for t in known if t not in self._chain.row_of]
        expect(not unknown, "timestep", "to be one of the scheduler's timesteps", ", ".join(map(str, unknown)))
        rows = [self._chain.row_of[t] for t in known]
        return rows[0] if len(rows) == 1 else torch.tensor(rows, device=sample.device)

    # ---------------------------------------------------------------------------------------------- forward process

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """Return x_t = alpha x_0 + sigma noise at the plan's levels, in any floating dtype.

        A timestep outside the plan has the level of the schedule.

        Args:
            original_samples: x_0, [N, ...], floating.
            noise: Broadcastable with x_0.
            timesteps: An int, or an integer tensor with 1 or N elements.
        """
        check_float("original_samples", original_samples)
        check_float("noise", noise)
        x_0, z = torch.broadcast_tensors(original_samples, noise)
        t = torch.as_tensor(timesteps, device=x_0.device).reshape(-1)
        t = index_tensor("timesteps", t.to(torch.int64) if t.dtype in INTEGERS else t, len(self), len(t), x_0.device)
        dtype = torch.promote_types(x_0.dtype, z.dtype)
        levels, t = self._chain.levels.to(x_0.device), t.expand(len(x_0))
        noised: Tensor = q_sample_op(x_0.to(dtype), t, levels, z.to(dtype), None, dtype, backend=None)
        return noised


def _config(plan: SamplingPlan) -> dict[str, Any]:
    """Return what pipelines and files read of a plan. Only a plan of a known builder is described whole."""
    from ...schemas import Builder, described_plan

    named = plan.builder is not None and plan.builder.func.__name__ in get_args(Builder)
    if plan.builder is None or not named or plan.prediction == "previous_sample":
        known = {"num_train_timesteps": plan.schedule.num_timesteps, "prediction_type": plan.prediction}
        return known | {"variance_type": plan.variance, "plan": None}
    told = plan.builder.keywords
    variance: Any = told.get("variance") or ("learned_range" if told.get("learned_variance") else None)
    objective = objective_of(told["schedule"], told.get("prediction"), variance)
    fit = {} if plan.fit is None else {"fit": vars(plan.fit)}
    return objective.scheduler_config(told.get("clip", 1.0)) | {"plan": described_plan(plan) | fit}
