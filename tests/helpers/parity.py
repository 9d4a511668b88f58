"""The parity rule: a kernel's error against float64 is at most twice the reference's in the same dtype.

A few roundings of the largest value are always allowed. The reference computes in float64 what is true.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from op_calls import Call
from op_cases import Case

from ddpm_fast.reference import opmath


@dataclass(frozen=True)
class Results:
    """Outputs of a call, and the gradient of every floating input for fixed cotangents."""

    outputs: tuple[torch.Tensor, ...]
    grads: dict[str, torch.Tensor]


def evaluate(call: Call, backend: str, copy: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> Results:
    """Return outputs and gradients of a call on tensors that `copy` makes.

    Gradients flow back in the dtype of an output. All dtypes hold the cotangents, so that all calls start from the same.
    """
    call = call.map(lambda x: copy(x.detach()).requires_grad_())
    outputs = call(backend)
    if not call.tensors:
        return Results(outputs, {})
    generator = torch.Generator().manual_seed(1)
    cotangents = (torch.randn(x.shape, generator=generator, dtype=torch.float64).bfloat16().to(x.device) for x in outputs)
    loss = sum((output.double() * cotangent).sum() for output, cotangent in zip(outputs, cotangents, strict=True))
    grads = torch.autograd.grad(loss, list(call.tensors.values()), allow_unused=True, materialize_grads=True)
    return Results(outputs, dict(zip(call.tensors, grads, strict=True)))


class Expected:
    """The reference's results of a call, in its dtype and in float64."""

    def __init__(self, case: Case, call: Call) -> None:
        self.baseline = evaluate(call, "reference")
        self.truth = evaluate(call.map(lambda x: x.double()), "reference")
        # Normalising values that lie far from 0 magnifies their rounding by how far.
        self.condition = 1 + case.options.get("offset", 0) / case.options.get("spread", 1)
        self.main = next((x for x in call.tensors.values() if x.dim() == 4), None)
        self.keeps_layout = self.main is not None and case.op != "denoising_loss" and not case.options.get("strided")
        # Winograd's algorithm rounds transformed maps and weights too.
        self.roundings = 4 if case.op == "conv3x3" else 1

    def check(self, got: Results) -> None:
        """Raises AssertionError where `got` breaks the rule."""
        for i, (x, baseline, truth) in enumerate(zip(got.outputs, self.baseline.outputs, self.truth.outputs, strict=True)):
            self._check_close(f"output {i}", x, baseline, truth.detach())
        assert got.grads.keys() == self.truth.grads.keys()
        for name, grad in got.grads.items():
            self._check_close(f"gradient of {name}", grad, self.baseline.grads[name], self.truth.grads[name])
        if self.main is not None and self.keeps_layout:
            output = got.outputs[0]
            if output.shape == self.main.shape:
                assert output.stride() == self.main.stride(), "the output keeps the memory format"
            elif output.dim() == 4:
                assert _formats(output) & _formats(self.main), "the output keeps the memory format"

    def _check_close(self, name: str, got: torch.Tensor, baseline: torch.Tensor, truth: torch.Tensor) -> None:
        assert got.dtype == baseline.dtype, name
        assert got.shape == truth.shape, name
        if truth.numel() == 0:
            return
        error, allowed = ((x.double() - truth).abs().max().item() for x in (got, baseline))
        scale = truth.abs().max().item()
        # A lucky reference is not held against a kernel: a result may be off by its rounding, and the float32 (or float64)
        # arithmetic before it by a few.
        rounding = self.roundings * 0.5 * torch.finfo(got.dtype).eps + 4 * torch.finfo(opmath(got.dtype)).eps
        if got.dtype == torch.float64:  # the truth is no wider: it is off itself, by roundings that the problem magnifies
            rounding *= self.condition
        limit = max(2 * allowed, rounding * scale)
        message = f"{name}: error {error:.3g}, reference's own {allowed:.3g}, limit {limit:.3g}, scale {scale:.3g}"
        assert error <= limit, message


def _formats(x: torch.Tensor) -> set[torch.memory_format]:
    """The memory formats that x has; a map of one channel or pixel has both."""
    return {f for f in (torch.contiguous_format, torch.channels_last) if x.is_contiguous(memory_format=f)}
