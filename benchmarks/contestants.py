"""Who computes a case of `ddpm_fast.testing`: the backends and their peers, each as a function of the case's tensors.

Peers: "eager", the PyTorch that people write; "compile", torch.compile of it; and for group norm, where they are installed,
"apex" (channels_last only) and "liger" (contiguous only).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import common
import peers
import torch
import torch._functorch.config
from torch import Tensor

from ddpm_fast import SamplingPlan
from ddpm_fast.ops import BACKENDS
from ddpm_fast.reference import STREAM_Q_SAMPLE
from ddpm_fast.reference import noise as reference_noise
from ddpm_fast.testing import SCHEDULE, Call, Case

PEERS = ("eager", "compile")
DRAWING = ("noise", "q_sample", "reverse_step", "denoising_loss")  # ops that need noise

torch._functorch.config.donated_buffer = False  # a compiled backward pass is repeated


Contestant = Callable[..., Tensor]


def contestant(call: Call, case: Case, by: str) -> Contestant:
    """A function of the case's floating tensors, by name: an op in one backend, or a peer's idiom for it."""
    if by in BACKENDS:

        def op(**tensors: Tensor) -> Tensor:
            return replace(call, arguments=_replaced(call.arguments, tensors))(by)[0]

        return op
    if by == "apex":
        return _apex(call)
    if by == "liger":
        return _liger(call)
    idiom = _idiom(call, case)
    if by == "compile":
        torch._dynamo.reset()
        return torch.compile(idiom, dynamic=False)
    return idiom


def _replaced(arguments: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments with tensors instead, by the names that `Call.tensors` gives them."""

    def each(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(each(f"{name}.{i}", part) for i, part in enumerate(value))
        return tensors.get(name, value)

    return {name: each(name, value) for name, value in arguments.items()}


def others(case: Case, channels_last: bool) -> list[str]:
    """Installed peers that have the op in this layout."""
    if case.op != "group_norm_silu":
        return []
    name, module = ("apex", "apex.contrib.group_norm") if channels_last else ("liger", "liger_kernel.ops.group_norm")
    return [name] if _installed(module) else []


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of the package above it
        return False


def _apex(call: Call) -> Contestant:
    """Group norm and SiLU in one kernel of apex; the shift before them in one of PyTorch."""
    from apex.contrib.group_norm import GroupNorm

    activation = call.arguments["activation"] or ""
    channels = call.arguments["x"].shape[1]
    norm = GroupNorm(call.arguments["num_groups"], channels, call.arguments["eps"], device=_device(call), act=activation)

    def apex(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None = None) -> Tensor:
        x = x if shift is None else x + shift[:, :, None, None]
        y: Tensor = torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))
        return y

    return apex


def _liger(call: Call) -> Contestant:
    """Group norm in one kernel of Liger; what is before and after it in those of PyTorch."""
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    groups, eps, activation = (call.arguments[name] for name in ("num_groups", "eps", "activation"))

    def liger(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None = None) -> Tensor:
        x = x if shift is None else x + shift[:, :, None, None]
        y: Tensor = LigerGroupNormFunction.apply(x, weight, bias, x.shape[1], groups, eps)
        return y if activation is None else torch.nn.functional.silu(y)

    return liger


def _idiom(call: Call, case: Case, epsilon: Tensor | None = None) -> Contestant:
    """What people write; it draws its own noise unless `epsilon` is given."""
    arguments = call.arguments
    if case.op == "noise":
        like = torch.empty(arguments["shape"], dtype=arguments["dtype"], device=_device(call))
        return lambda: torch.randn_like(like) if epsilon is None else epsilon.to(like.dtype)
    if case.op == "q_sample":
        alpha_bars = SCHEDULE.alpha_bars.to(_device(call), torch.float64 if _is_wide(call) else torch.float32)
        if case.options.get("uint8"):
            images, dtype = arguments["x_0"], arguments["dtype"]
            return lambda: peers.q_sample(
                images.to(dtype) * (2 / 255) - 1, arguments["t"], alpha_bars, None if epsilon is None else epsilon.to(dtype)
            )
        return lambda x_0: peers.q_sample(x_0, arguments["t"], alpha_bars, _like(epsilon, x_0))
    if case.op == "reverse_step":
        plan: SamplingPlan = arguments["plan"]
        row = plan.coefficients[int(arguments["step"])].tolist()
        return lambda x_t, model_output: peers.reverse_step(x_t, model_output, row, _like(epsilon, x_t))
    if case.op == "denoising_loss":  # its noise was drawn before, for x_t
        given = torch.randn_like(arguments["x_0"]) if epsilon is None else epsilon
        return lambda model_output, x_0: peers.denoising_loss(model_output, given.to(model_output.dtype))
    if case.op != "group_norm_silu":  # the reference is what people write

        def reference(**tensors: Tensor) -> Tensor:
            return replace(call, arguments=_replaced(arguments, tensors))("reference")[0]

        return reference
    fixed = {name: arguments[name] for name in ("num_groups", "eps", "activation")}
    return lambda **tensors: peers.group_norm_silu(**fixed, **tensors)


def _like(epsilon: Tensor | None, x: Tensor) -> Tensor | None:
    return None if epsilon is None else epsilon.to(x.dtype)


def _device(call: Call) -> torch.device:
    return next(value.device for value in call.arguments.values() if isinstance(value, Tensor))


def _is_wide(call: Call) -> bool:
    return (
        any(tensor.dtype == torch.float64 for tensor in call.tensors.values()) or call.arguments.get("dtype") == torch.float64
    )


def forward(function: Contestant, call: Call) -> Callable[[], object]:
    tensors = call.tensors

    def run() -> Tensor:
        with torch.no_grad():
            return function(**tensors)

    return run


def backward(function: Contestant, call: Call) -> Callable[[], tuple[Tensor, ...]]:
    """The gradients of a result that was computed before."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in call.tensors.items() if name != "x_0"}
    result = function(**{**call.tensors, **leaves})
    generator = torch.Generator(result.device).manual_seed(1)
    cotangent = torch.randn(result.shape, generator=generator, dtype=torch.float32, device=result.device)
    cotangent = torch.empty_like(result).copy_(cotangent)  # in the memory format of the result
    return lambda: torch.autograd.grad(result, list(leaves.values()), cotangent, retain_graph=True)


def check(function: Contestant, call: Call, case: Case, by: str, direction: str) -> None:
    """Backends, and the idiom given their noise, are compared with float64; a compiled idiom draws noise like no other."""
    wide = call.map(lambda x: x.double())
    epsilon = None
    if case.op in DRAWING:
        stream = STREAM_Q_SAMPLE
        if case.op in ("noise", "reverse_step"):
            stream = int(call.arguments["stream" if case.op == "noise" else "step"])
        epsilon = reference_noise(case.shape, call.arguments["seeds"].cpu(), stream, torch.float64).to(_device(call))
    baseline, truth = _idiom(call, case, epsilon), _idiom(wide, case, epsilon)
    if by in PEERS and case.op in DRAWING:
        function = torch.compile(baseline, dynamic=False) if by == "compile" else baseline
    run = forward if direction == "forward" else backward
    results = [run(f, c)() for f, c in ((function, call), (baseline, call), (truth, wide))]
    for got, allowed, true in zip(*((r,) if isinstance(r, Tensor) else r for r in results), strict=True):
        common.require_parity(f"{case} by {by}", got, allowed, true)
