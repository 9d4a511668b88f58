"""group_norm_silu in the native module: what the cases of tests/ops do not reach."""

from __future__ import annotations

import pytest
import torch
from op_calls import make_call
from op_cases import Case
from parity import Expected, evaluate

from ddpm_fast import group_norm_silu, reference

# Slices too large to keep what the backward pass makes twice; a spread of 1e-4 of the mean, where E[x^2] - E[x]^2 in float32
# would be noise, and may be negative; squares beyond float16.
FAR = {"affine": False, "offset": 100.0, "spread": 0.01}
CASES = [
    (Case("group_norm_silu", "large-slices", (1, 32, 96, 96), {"groups": 1, "shift": True}), torch.float32),
    *((Case("group_norm_silu", "far-from-0", (2, 64, *size), FAR), torch.float32) for size in ((4, 4), (9, 7), (32, 32))),
    (Case("group_norm_silu", "large-squares", (2, 32, 8, 8), {"groups": 8, "affine": False, "spread": 2000.0}), torch.float16),
]
in_both_layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


@in_both_layouts
@pytest.mark.parametrize(("case", "dtype"), CASES, ids=str)
def test_parity(case: Case, dtype: torch.dtype, layout: torch.memory_format) -> None:
    call = make_call(case, dtype, channels_last=layout == torch.channels_last)
    Expected(case, call).check(evaluate(call, "native"))


@in_both_layouts
def test_first_value_of_a_channel_far_from_the_others(layout: torch.memory_format) -> None:
    """The sums start relative to it; if they stayed so, 1e-5 would not hold."""
    x = torch.randn(1, 32, 32, 32, generator=torch.Generator().manual_seed(0)) * 1e-3
    x[:, :, 0, 0] = 1000.0
    x = x.contiguous(memory_format=layout)
    truth = reference.group_norm_silu(x.double(), 32, None, None, 1e-6, None, None, None, False)[0]
    y = group_norm_silu(x, 32, eps=1e-6, activation=None, backend="native")
    torch.testing.assert_close(y.double(), truth, rtol=5e-6, atol=1e-6)


@in_both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_values_give_the_bias(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Exactly, though 1 / sqrt(eps) = 1000 times any error of the mean would show."""
    x = torch.full((2, 24, 7, 9), 100.3).to(dtype).contiguous(memory_format=layout)
    bias = torch.linspace(-2, 2, 24).to(dtype)
    y = group_norm_silu(x, 4, None, bias, 1e-6, activation=None, backend="native")
    assert torch.equal(y, bias[None, :, None, None].expand(y.shape))


def test_activation_over_its_whole_range() -> None:
    """SiLU alone, through the normalisation's bias, where exp overflows and where it vanishes."""
    t = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([-1e38, 1e38, 0.0, -0.0, 1e-30])])
    y = group_norm_silu(torch.zeros(1, len(t), 1, 1), 1, None, t, 1e-5, backend="native").flatten()
    truth = torch.nn.functional.silu(t.double())
    assert torch.isfinite(y).all()
    # exp(-t) is as accurate as t in float32 makes it.
    limit = (5e-7 + 6e-8 * t.abs().clamp(max=100)) * truth.abs() + 1e-34
    assert ((y - truth).abs() <= limit).all()
