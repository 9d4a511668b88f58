"""reverse_step: one step of any sampler in one pass (eq. 13, Ho et al. 2020, eq. 11 and Algorithm 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..checks import check_device, check_float, check_int, check_number, check_range, check_strided, check_type, checked_seeds
from ..dtypes import opmath
from ..errors import InvalidType, InvalidValue, public
from ..plan import COLUMNS, SamplingPlan
from .arguments import check_apart, check_like
from .compiled_kernel import is_dense
from .fused_op import FusedOp
from .op_spec import Gradient, OpSpec


@public(traced=True)
def reverse_step(
    x_t: Tensor,
    model_output: Tensor,
    step: int | Tensor,
    plan: SamplingPlan,
    *,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    x_0_prev: Tensor | None = None,
    x_0_prev2: Tensor | None = None,
    guidance_scale: float | None = None,
    return_x_0: bool = False,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Advance x_t by one step of a sampler.

    With row `step` (p, q, k0, k1, k2, k3, k4, sigma, ..., clip) of the plan, std = sigma unless the variance
    is learned:

        x_0^    = clip(p x_t + q m)
        x_{t-1} = k0 x_0^ + k1 x_t + k2 m + k3 x_0_prev + k4 x_0_prev2 + std z

    Source: derivation eq. 13 (Ho et al. 2020, eq. 11 and Algorithm 2).

    Args:
        x_t: [N, C, ...], floating.
        model_output: m, shaped like x_t, in x_t's dtype. Half precision is allowed if x_t is float32. With
            learned variance it has 2 C channels, the prediction first. With guidance it has 2 N samples,
            the conditional half first.
        step: 0..S-1, counted from the first step executed (the largest timestep): an int, a 0-d int64
            tensor on x_t's device, or int64 [N]. A tensor is read on the device, without
            synchronization. One captured CUDA graph therefore serves every step.
        plan: Plan of the sampler, from `ddpm_plan`, `ddim_plan`, ...
        noise: z, like x_t. Pass at most one of `noise` and `seeds`.
        seeds: int64 [N]. z is `noise(x_t.shape, seeds, stream=step)`. A plan without randomness (DDIM)
            needs neither.
        x_0_prev: x_0^ of the previous step, like x_t, for plans that use k3. The first step weighs it by 0: pass
            zeros.
        x_0_prev2: x_0^ of the step before that, like x_t, for plans that use k4. The first two steps weigh it by 0.
        guidance_scale: Scale w of classifier-free guidance, m = m_u + w (m_c - m_u) (Ho and Salimans
            2022). torch.compile treats the number as a constant and recompiles for each new value.
        return_x_0: Also return x_0^.
        out: Destination of x_{t-1}, like x_t, or destinations of (x_{t-1}, x_0^) with return_x_0. They may
            be x_t itself and x_0_prev or x_0_prev2 itself but must not overlap an input in another way, or
            each other, which eager calls check. Not differentiable.
        backend: "native", "triton" or "reference". None: the first that can run, and "reference" inside
            torch.func transforms and forward-mode differentiation.

    Returns:
        x_{t-1} with the shape, dtype and memory format of x_t. With return_x_0, (x_{t-1}, x_0^).
        Differentiable in x_t, model_output, noise, x_0_prev and x_0_prev2.

    Raises:
        ValueError: An argument has an unsupported value, shape or device.
        TypeError: An argument has an unsupported type or dtype.
        BackendUnavailable: The named backend cannot run.
    """
    check_float("x_t", x_t)
    check_type("plan", plan, SamplingPlan)
    if guidance_scale is not None:
        check_number("guidance_scale", guidance_scale, finite=True)
    given: Any = return_x_0
    if type(given) is not bool:  # faster than a call of the check
        check_type("return_x_0", return_x_0, bool)
    n = x_t.shape[0]
    _check_model_output(x_t, model_output, plan, guidance_scale)
    if isinstance(step, Tensor):
        if step.layout is not torch.strided or step.is_nested:
            check_strided("step", step)
        if step.dtype != torch.int64:
            raise InvalidType("step", "to be an int or an int64 tensor", step.dtype)
        if step.numel() != 1 and step.shape != (n,):
            raise InvalidValue("step", f"to be an int or to have 1 or {n} elements", f"shape {list(step.shape)}")
        check_device("step", step, "x_t", x_t)
        steps = step.reshape(-1)
    else:
        check_int("step", step, 0, plan.num_steps - 1)
        steps = plan.steps(x_t.device)[step : step + 1]
    if noise is not None and seeds is not None:
        raise InvalidValue("", "at most one of noise and seeds", "both")
    if noise is None and seeds is None and plan.is_random:
        raise InvalidValue("", "noise or seeds, since the plan's steps draw noise (sigma > 0)", "neither")
    if noise is not None:
        check_like("noise", noise, "x_t", x_t)
    if seeds is not None:
        seeds = checked_seeds(seeds, n, x_t.device)
    if x_0_prev is not None:
        check_like("x_0_prev", x_0_prev, "x_t", x_t)
    elif plan.needs_x_0_prev:
        raise InvalidValue("x_0_prev", "to be given, as the plan weighs it by k3", "None")
    if x_0_prev2 is not None:
        check_like("x_0_prev2", x_0_prev2, "x_t", x_t)
    elif plan.needs_x_0_prev2:
        raise InvalidValue("x_0_prev2", "to be given, as the plan weighs it by k4", "None")
    inputs = x_t, model_output, plan.table(x_t.device), steps, noise, seeds, x_0_prev, x_0_prev2
    options = guidance_scale, reference.VARIANCES.index(plan.variance), return_x_0
    outs = () if out is None else _checked_out(out, x_t, inputs, return_x_0)
    x_prev, x_0 = reverse_step_op(*inputs, *options, backend=backend, out=outs)
    return (x_prev, x_0) if return_x_0 else x_prev


def _checked_out(
    out: Tensor | tuple[Tensor, Tensor], x_t: Tensor, inputs: tuple[Tensor | None, ...], return_x_0: bool
) -> tuple[Tensor, ...]:
    """Return the destinations as a tuple, after a check."""
    outs = out if isinstance(out, tuple) else (out,)
    if isinstance(out, tuple) and not (return_x_0 and len(outs) == 2):
        wanted = "a pair (x_{t-1}, x_0^)" if return_x_0 else "a tensor, without return_x_0"
        raise InvalidValue("out", f"to be {wanted}", f"a tuple of {len(outs)}")
    if not is_dense(x_t):
        got = f"strides {x_t.stride()} for shape {list(x_t.shape)}: pass x_t.contiguous(), or no out"
        raise InvalidValue("x_t", "to be contiguous or channels_last with out=", got)
    for each in outs:
        check_like("out", each, "x_t", x_t)
        if not torch.compiler.is_compiling() and each.is_neg():
            raise InvalidValue("out", "to be a tensor without lazy negation", "one: pass out.resolve_neg()")
        if each.stride() != x_t.stride():
            raise InvalidValue("out", f"to be dense, with the strides of x_t, {x_t.stride()}", each.stride())
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*inputs, *outs)):
        raise InvalidValue("", "no gradients with out= (call under torch.no_grad())", "an input that requires one")
    if len(outs) == 2 and outs[0] is outs[1]:
        raise InvalidValue("out", "to be two tensors", "one twice")
    if len(outs) == 2 and x_t.numel() and not torch.compiler.is_compiling():
        check_apart(outs[1], {"the destination of x_{t-1}": outs[0]}, may_be_same=False)
    return outs


def _check_model_output(x_t: Tensor, model_output: Tensor, plan: SamplingPlan, guidance_scale: float | None) -> None:
    check_float("model_output", model_output)
    shape = list(x_t.shape)
    why = ""
    if guidance_scale is not None:
        shape[0] *= 2
        why += " (two halves, for guidance)"
    if plan.variance != "fixed":
        if x_t.dim() < 2:
            raise InvalidValue("x_t", "of shape [N, C, ...] with learned variance", shape)
        shape[1] *= 2
        why += " (twice the channels, for learned variance)"
    if list(model_output.shape) != shape:
        raise InvalidValue("model_output", f"to have shape {shape}{why}", list(model_output.shape))
    half = (torch.float16, torch.bfloat16)
    if model_output.dtype != x_t.dtype and not (x_t.dtype == torch.float32 and model_output.dtype in half):
        raise InvalidType(
            "model_output",
            f"to have the dtype of x_t, {x_t.dtype}, or half precision if that is float32",
            model_output.dtype,
        )
    check_device("model_output", model_output, "x_t", x_t)


def _backward(arguments: Any, results: Any, grads: Any, needs: Any) -> dict[str, Tensor | None]:
    """Return the gradients of a step.

    The step is linear except for the clip, which has gradient 0 where it acts, and the learned std.
    """
    x_t, model_output, table, steps = arguments.x_t, arguments.model_output, arguments.table, arguments.steps
    noise, seeds, scale = arguments.noise, arguments.seeds, arguments.guidance_scale
    grad_x_prev, grad_x_0 = grads
    wide, row = opmath(x_t.dtype), reference.plan_row(table, steps, x_t)
    x = x_t.to(wide)
    m, log_variance = reference.prediction_and_variance(model_output.to(wide), row, scale, arguments.variance)
    grad = torch.zeros_like(x_t, dtype=wide) if grad_x_prev is None else grad_x_prev.to(wide)
    through = row.k0 * grad
    if grad_x_0 is not None:
        through = through + grad_x_0.to(wide)
    through = torch.where((row.p * x + row.q * m).abs() <= row.clip, through, 0)
    grad_x_t = row.p * through + row.k1 * grad
    grad_m = row.q * through + row.k2 * grad
    std, grad_v = row.sigma, None
    if log_variance is not None:
        ranged = reference.VARIANCES[arguments.variance] == "learned_range"
        slope = (row.log_beta - row.log_beta_tilde) / 2 if ranged else torch.ones_like(row.sigma)
        std = row.sigma * torch.exp(0.5 * log_variance)
        if noise is None and seeds is None:  # every sigma is 0
            grad_v = torch.zeros_like(grad)
        else:
            z = noise if noise is not None else _draw(x_t, table, steps, seeds, arguments.backend)
            grad_v = grad * z.to(wide) * std * 0.5 * slope
    if scale is not None:  # the variance is the conditional one
        halves = [scale * grad_m, (1 - scale) * grad_m]
        if grad_v is not None:
            halves = [torch.cat([halves[0], grad_v], dim=1), torch.cat([halves[1], torch.zeros_like(grad_v)], dim=1)]
        grad_m = torch.cat(halves)
    elif grad_v is not None:
        grad_m = torch.cat([grad_m, grad_v], dim=1)
    weights = {"noise": std, "x_0_prev": row.k3, "x_0_prev2": row.k4}
    return {
        "x_t": grad_x_t.to(x_t.dtype),
        "model_output": grad_m.to(model_output.dtype),
        **{name: (weight * grad).to(x_t.dtype) for name, weight in weights.items() if getattr(needs, name)},
    }


def _draw(x_t: Tensor, table: Tensor, steps: Tensor, seeds: Tensor, backend: str | None) -> Tensor:
    """Draw the noise of the forward pass again, in the dtype of its arithmetic: a kernel adds it before it rounds.

    A step whose only nonzero coefficient is sigma = 1 returns the noise itself.
    """
    unit = torch.zeros_like(table)
    unit[:, COLUMNS.index("sigma")] = 1
    zero = torch.zeros_like(x_t, dtype=opmath(x_t.dtype))
    step = {"table": unit, "steps": steps, "seeds": seeds, "variance": 0, "return_x_0": False}
    drawn: Tensor = reverse_step_op(*reverse_step_op.spec.Arguments(zero, zero, **step)[:-1], backend=backend)[0]
    return drawn


reverse_step_op = FusedOp(
    OpSpec(
        "reverse_step",
        reference.reverse_step,
        outputs={
            "x_prev": lambda a: torch.empty_like(a.x_t),
            "x_0": lambda a: torch.empty_like(a.x_t) if a.return_x_0 else None,
        },
        has_triton=True,
        gradient=Gradient(_backward),
        fields={
            "return_x_0": None,
            "step_stride": lambda a: a.steps.numel() > 1,
            "has_guidance": lambda a: a.guidance_scale is not None,
            "guidance_scale": lambda a: a.guidance_scale or 0.0,
        },
        check=lambda a: check_range("step", a.steps, a.table.shape[0]),
    )
)
