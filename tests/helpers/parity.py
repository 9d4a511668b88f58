"""The parity rule: a kernel's error against float64 is at most twice the reference's in the same dtype.

A few roundings of the largest value are always allowed. The reference computes in float64 what is true.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from op_calls import Call
from op_cases import Case
from small_unets import relative_error

from ddpm_fast import BackendUnavailable
from ddpm_fast.reference import opmath


def skip_unless(backend: str, call: Call) -> None:
    """Skip the test if a backend cannot run the call. `test_parity` fails if one that should be there is not."""
    try:
        call(backend)
    except BackendUnavailable as error:
        pytest.skip(str(error))


@dataclass(frozen=True)
class Results:
    """Outputs of a call, and the gradient of every floating input for fixed cotangents."""

    outputs: tuple[torch.Tensor, ...]
    grads: dict[str, torch.Tensor]

    @property
    def named(self) -> dict[str, torch.Tensor]:
        """All tensors, by what they are."""
        named = {f"output {i}": output.detach() for i, output in enumerate(self.outputs)}
        return named | {f"gradient of {name}": grad for name, grad in self.grads.items()}


def assert_same(got: Results, expected: Results, how: str = "") -> None:
    """Raise AssertionError if a bit differs."""
    for name, value in expected.named.items():
        assert torch.equal(got.named[name], value), f"{name}: other bits {how}"


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


def check_overwriting(call: Call, backend: str) -> None:
    """Raise AssertionError unless a reverse step writes over x_t, and x_0^ over the oldest one that it reads, if any."""
    names = ["x_t", *[name for name in ("x_0_prev2", "x_0_prev") if name in call.arguments][:1]]
    call = replace(call, arguments=call.arguments | {"return_x_0": len(names) == 2})
    expected, memory = call(backend), {name: call.arguments[name].clone() for name in names}
    out = (*memory.values(),)
    got = call.function(**call.arguments | memory, out=out if len(names) == 2 else out[0], backend=backend)
    for result, written, wanted in zip(got if len(names) == 2 else (got,), out, expected, strict=True):
        assert result.data_ptr() == written.data_ptr()
        assert torch.equal(written, wanted)


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
        """Raise AssertionError if `got` breaks the rule."""
        assert got.named.keys() == self.truth.named.keys()
        for name, value in got.named.items():
            self._check_close(name, value, self.baseline.named[name], self.truth.named[name])
        if self.main is not None and self.keeps_layout:
            output = got.outputs[0]
            if output.shape == self.main.shape:
                assert output.stride() == self.main.stride(), "the output keeps the memory format"
            elif output.dim() == 4:
                assert _formats(output) & _formats(self.main), "the output keeps the memory format"

    def check_norms(self, got: Results) -> None:
        """Raise AssertionError if the norm of an error is more than twice the reference's, and more than 4 roundings."""
        for name, value in got.named.items():
            baseline, truth = self.baseline.named[name], self.truth.named[name]
            assert (value.shape, value.dtype) == (truth.shape, baseline.dtype), name
            allowed = max(2 * relative_error(baseline, truth), 2 * torch.finfo(value.dtype).eps)
            assert relative_error(value, truth) <= allowed, name

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
