"""Inputs for the cases: each op with its arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from op_cases import SCHEDULE, Case
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.dtypes import opmath
from ddpm_fast.plan import SamplingPlan


@dataclass(frozen=True)
class Call:
    """An op with its arguments. `call(backend)` runs it.

    Attributes:
        function: The op.
        arguments: Its keyword arguments.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]

    def __call__(self, backend: str | None = None, **changed: Any) -> tuple[Tensor, ...]:
        """Run the op, with the arguments in `changed` in place of its own, and return its outputs as a tuple."""
        result = self.function(**self.arguments | changed, backend=backend)
        return result if isinstance(result, tuple) else (result,)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Floating inputs by name."""
        flat = {}
        for name, value in self.arguments.items():
            for i, part in enumerate(value if isinstance(value, tuple) else (value,)):
                if isinstance(part, Tensor) and part.is_floating_point():
                    flat[f"{name}.{i}" if isinstance(value, tuple) else name] = part
        return flat

    def changed(self, name: str, value: Any) -> dict[str, Any]:
        """Return the argument to pass for another value of one floating input, which has a name of `tensors`."""
        base, _, index = name.partition(".")
        parts = enumerate(self.arguments[base]) if index else ()
        return {base: tuple(value if i == int(index) else part for i, part in parts) if index else value}

    def map(self, convert: Callable[[Tensor], Tensor]) -> Call:
        """Return the same call with every floating input (and a dtype argument) converted."""

        def each(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(each(part) for part in value)
            if isinstance(value, torch.dtype):
                return convert(torch.empty(0, dtype=value)).dtype
            return convert(value) if isinstance(value, Tensor) and value.is_floating_point() else value

        return replace(
            self, arguments={name: value if name == "shape" else each(value) for name, value in self.arguments.items()}
        )


def make_call(
    case: Case, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", *, channels_last: bool = False
) -> Call:
    """Return reproducible inputs for a case.

    Args:
        case: The case.
        dtype: Dtype of floating inputs.
        device: Device of the inputs.
        channels_last: Make 4-D inputs channels_last.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        if case.options.get("strided") and len(shape) == len(case.shape):  # every second element of a larger tensor
            wide = torch.randn((*shape[:-1], 2 * shape[-1]), generator=generator, dtype=torch.float64)
            return wide.to(device, dtype)[..., ::2]
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        return x.contiguous(memory_format=torch.channels_last) if channels_last and x.dim() == 4 else x

    def timesteps(bound: int) -> Tensor:
        t = torch.randint(bound, case.shape[:1], generator=generator)
        t[:2] = torch.tensor([0, bound - 1])[: len(t)]  # both ends
        return t.to(device)

    arguments = _BUILDERS[case.op](case, normal, timesteps, device, dtype)
    if case.op == "noise" and channels_last:
        arguments["memory_format"] = torch.channels_last
    return Call(getattr(ops, case.op), arguments)


def unaligned(x: Tensor) -> Tensor:
    """Return a copy with x's strides, whose address is aligned to one element only."""
    return x.new_empty(x.numel() + 1)[1:].as_strided(x.shape, x.stride()).copy_(x)


def freed(x: Tensor) -> Tensor:
    """Return a tensor of x's shape whose memory was freed, as sharded training does between layers."""
    y = x.detach().clone()
    y.untyped_storage().resize_(0)
    return y


Normal = Callable[..., Tensor]


def _noise_source(case: Case, normal: Normal, device: torch.device | str) -> dict[str, Tensor]:
    source = case.options.get("source", "seeds")
    if source == "noise":
        return {"noise": normal(*case.shape)}
    return {"seeds": ops.sample_seeds(7, case.shape[0]).to(device)} if source == "seeds" else {}


def _noise(case: Case, normal: Normal, timesteps: Any, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    seeds = ops.sample_seeds(7, case.shape[0]).to(device)
    return {"shape": case.shape, "seeds": seeds, "stream": case.options.get("stream", 0), "dtype": dtype}


def _q_sample(case: Case, normal: Normal, timesteps: Any, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    t = case.options["t"] if "t" in case.options else timesteps(SCHEDULE.num_timesteps)
    arguments = {"x_0": normal(*case.shape), "t": t, "schedule": SCHEDULE, **_noise_source(case, normal, device)}
    if case.options.get("uint8"):  # images as they are stored
        arguments["x_0"] = (arguments["x_0"] * 64 + 128).clamp(0, 255).to(torch.uint8)
        arguments["dtype"] = dtype
    return arguments


def _denoising_loss(
    case: Case, normal: Normal, timesteps: Any, device: torch.device | str, dtype: torch.dtype
) -> dict[str, Any]:
    arguments = _q_sample(case, normal, timesteps, device, dtype)
    arguments["model_output"] = normal(*case.shape)
    arguments["prediction"] = case.options.get("prediction", "epsilon")
    arguments["reduction"] = case.options.get("reduction", "mean")
    if case.options.get("weight"):
        arguments["weight"] = normal(case.shape[0]).abs()
    return arguments


def _reverse_step(case: Case, normal: Normal, timesteps: Any, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    plan: SamplingPlan = case.options["plan"]
    n, channels, *rest = case.shape
    guidance = case.options.get("guidance_scale")
    model_shape = (n * (1 if guidance is None else 2), channels * (1 if plan.variance == "fixed" else 2), *rest)
    step = case.options.get("step", "device")
    if step == "device":
        step = plan.steps(device)[plan.num_steps // 2]
    elif step == "sample":
        step = timesteps(plan.num_steps)
    half = case.options.get("half_model") and dtype == torch.float32
    arguments = {
        "x_t": normal(*case.shape),
        "model_output": normal(*model_shape, dtype=torch.bfloat16 if half else dtype),
        "step": step,
        "plan": plan,
        "guidance_scale": guidance,
        "return_x_0": case.options.get("return_x_0", False),
        **_noise_source(case, normal, device),
    }
    if plan.needs_x_0_prev:
        arguments["x_0_prev"] = normal(*case.shape)
    if plan.needs_x_0_prev2:
        arguments["x_0_prev2"] = normal(*case.shape)
    return arguments


def _group_norm_silu(
    case: Case, normal: Normal, timesteps: Any, device: torch.device | str, dtype: torch.dtype
) -> dict[str, Any]:
    n, channels = case.shape[:2]
    options = case.options
    small = torch.float32 if options.get("float32_parameters") and dtype != torch.float64 else dtype
    x = normal(*case.shape)
    arguments: dict[str, Any] = {
        "x": x * options.get("spread", 1.0) + options.get("offset", 0.0),
        "num_groups": options.get("groups", 32),
        "activation": options.get("activation", "silu"),
        "eps": 1e-6,
    }
    if options.get("affine", True):
        arguments["weight"] = normal(channels, dtype=small) + 1
        arguments["bias"] = normal(channels, dtype=small)
    if options.get("shift"):
        arguments["shift"] = normal(n, channels)
    if options.get("scale_shift"):
        arguments["scale_shift"] = (normal(n, channels), normal(n, channels))
    return arguments


def _group_norm_affine(
    case: Case, normal: Normal, timesteps: Any, device: torch.device | str, dtype: torch.dtype
) -> dict[str, Any]:
    n, channels, *size = case.shape
    skip_channels = case.options.get("skip", 0)
    wide = replace(case, shape=(n, channels + skip_channels, *size))
    arguments = _group_norm_silu(wide, normal, timesteps, device, dtype)
    arguments["x"] = arguments["x"][:, :channels].contiguous()
    del arguments["activation"]
    if skip_channels:
        arguments["skip"] = normal(n, skip_channels, *size)
    return arguments


def _conv3x3(case: Case, normal: Normal, timesteps: Any, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    n, channels, height, width = case.shape
    options = case.options
    all_channels, out_channels = channels + options.get("skip", 0), options["out"]
    scale = 2 if options.get("upsample") else 1
    wide = opmath(dtype)
    arguments: dict[str, Any] = {
        "x": normal(*case.shape),
        "weight": normal(out_channels, all_channels, 3, 3) * (9 * all_channels) ** -0.5,
        "upsample": scale == 2,
        "activation": options.get("activation"),
        "divisor": options.get("divisor", 1.0),
    }
    if options.get("bias", True):
        arguments["bias"] = normal(out_channels)
    if "skip" in options:
        arguments["skip"] = normal(n, options["skip"], height, width)
    if options.get("affine"):
        arguments["affine"] = normal(n, 3, all_channels, dtype=wide) * 0.5 + 0.5
    if options.get("residual"):
        arguments["residual"] = normal(n, out_channels, scale * height, scale * width)
    return arguments


def _attention(case: Case, normal: Normal, timesteps: Any, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    n, pixels, channels = case.shape
    return {"qkv": normal(n, pixels, 3 * channels), "num_heads": case.options.get("heads", 1)}


_BUILDERS: dict[str, Callable[..., dict[str, Any]]] = {
    "noise": _noise,
    "q_sample": _q_sample,
    "reverse_step": _reverse_step,
    "group_norm_silu": _group_norm_silu,
    "denoising_loss": _denoising_loss,
    "group_norm_affine": _group_norm_affine,
    "conv3x3": _conv3x3,
    "attention": _attention,
}
