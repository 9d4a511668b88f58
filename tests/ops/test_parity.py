"""Values and gradients of every case, family, dtype and layout against the reference in float64.

The rule: a kernel's largest error is at most twice that of the reference in the same dtype, or a few roundings of the largest
value.
"""

import pytest
import torch

from ddpm_fast.ops.backend import FLOATS, why_not
from ddpm_fast.reference import opmath
from ddpm_fast.testing import CASES, Call, Case, make_call

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}
SELECTED = [case for case in CASES if not case.benchmark]


def _parameters():
    for case in SELECTED:
        for family in ("native", "triton"):
            for dtype in DTYPES if family == "native" else (torch.float32, torch.bfloat16):
                for channels_last in (False, True) if len(case.shape) == 4 else (False,):
                    layout = "channels_last" if channels_last else "contiguous"
                    yield pytest.param(case, family, dtype, channels_last, id=f"{case}-{family}-{DTYPES[dtype]}-{layout}")


def _evaluate(call: Call, backend: str) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Outputs, and the gradient of every floating input for fixed cotangents."""
    call = call.map(lambda x: x.detach().clone().requires_grad_())
    outputs = call(backend)
    if not call.tensors:
        return outputs, {}
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (output.double() * torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device)).sum()
        for output in outputs
    )
    grads = torch.autograd.grad(loss, list(call.tensors.values()), allow_unused=True, materialize_grads=True)
    return outputs, dict(zip(call.tensors, grads, strict=True))


def _assert_close(name: str, got: torch.Tensor, baseline: torch.Tensor, truth: torch.Tensor, condition: float = 1.0) -> None:
    assert got.dtype == baseline.dtype, name
    assert got.shape == truth.shape, name
    if truth.numel() == 0:
        return
    error, allowed = ((x.double() - truth).abs().max().item() for x in (got, baseline))
    scale = truth.abs().max().item()
    # A lucky reference is not held against a kernel: a result may be off by its rounding, and the float32 (or float64)
    # arithmetic before it by a few.
    rounding = 0.5 * torch.finfo(got.dtype).eps + 4 * torch.finfo(opmath(got.dtype)).eps
    if got.dtype == torch.float64:  # the truth is no wider: it is off itself, by roundings that the problem magnifies
        rounding *= condition
    limit = max(2 * allowed, rounding * scale)
    assert error <= limit, f"{name}: error {error:.3g}, reference's own {allowed:.3g}, limit {limit:.3g}, scale {scale:.3g}"


@pytest.mark.parametrize(("case", "family", "dtype", "channels_last"), list(_parameters()))
def test_parity(case: Case, family: str, dtype: torch.dtype, channels_last: bool, device: torch.device) -> None:
    reason = why_not(family, case.op, device, dtype)
    if reason is not None and device.type == "cuda":
        pytest.skip(reason)
    call = make_call(case, dtype, device, channels_last=channels_last)
    outputs, grads = _evaluate(call, family)
    baseline_outputs, baseline_grads = _evaluate(call, "reference")
    true_outputs, true_grads = _evaluate(call.map(lambda x: x.double()), "reference")
    # Normalising values that lie far from 0 magnifies their rounding by how far.
    condition = 1 + case.options.get("offset", 0) / case.options.get("spread", 1)
    for i, (got, baseline, truth) in enumerate(zip(outputs, baseline_outputs, true_outputs, strict=True)):
        _assert_close(f"output {i}", got, baseline, truth.detach(), condition)
    assert grads.keys() == true_grads.keys()
    for name in grads:
        _assert_close(f"gradient of {name}", grads[name], baseline_grads[name], true_grads[name], condition)
    main = next((x for x in call.tensors.values() if x.dim() == 4), None)
    if main is not None and case.op != "denoising_loss" and not case.options.get("strided"):
        assert outputs[0].stride() == main.stride(), "the output keeps the memory format"


_NOISE = [
    pytest.param(case, channels_last, id=f"{case.name}-{'channels_last' if channels_last else 'contiguous'}")
    for case in SELECTED
    if case.op == "noise"
    for channels_last in ((False, True) if len(case.shape) == 4 else (False,))
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("case", "channels_last"), _NOISE)
def test_noise_is_the_same_bits_from_every_family(
    case: Case, channels_last: bool, dtype: torch.dtype, device: torch.device
) -> None:
    call = make_call(case, dtype, device, channels_last=channels_last)
    (expected,) = call("reference")
    for family in ("native", "triton"):
        if why_not(family, "noise", device, dtype) is None:
            (got,) = call(family)
            assert torch.equal(got, expected), family
            assert got.stride() == expected.stride()
