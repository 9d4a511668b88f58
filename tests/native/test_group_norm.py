"""group_norm_silu in the native module: what the cases of tests/ops do not reach."""

import pytest
import torch
from torch import Tensor

from ddpm_fast import group_norm_silu, reference


def _gradients(x: Tensor, small: dict[str, Tensor], groups: int, backend: str) -> dict[str, Tensor]:
    """Y and the gradient of every input."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in {"x": x, **small}.items()}
    inputs = dict(leaves)
    y = group_norm_silu(inputs.pop("x"), groups, eps=1e-6, backend=backend, **inputs)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), cotangent)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    n, c = shape[:2]
    x = torch.randn(shape, generator=generator).to(dtype)
    small = {
        "weight": torch.randn(c, generator=generator).to(dtype),
        "bias": torch.randn(c, generator=generator).to(dtype),
        "shift": torch.randn(n, c, generator=generator).to(dtype),
    }
    return (x.contiguous(memory_format=torch.channels_last) if channels_last else x), small


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype, channels_last: bool) -> None:
    # 3 samples: one thread takes them whole, two cut each into slices of channels.
    x, small = _inputs((3, 96, 13, 13), dtype, channels_last)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(_gradients(x, small, 32, "native"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_sample_does_not_depend_on_its_batch(channels_last: bool) -> None:
    x, small = _inputs((5, 64, 8, 8), torch.bfloat16, channels_last)
    whole = group_norm_silu(x, 32, backend="native", **small)
    for i in range(len(x)):
        alone = group_norm_silu(x[i : i + 1], 32, backend="native", **{**small, "shift": small["shift"][i : i + 1]})
        assert torch.equal(whole[i : i + 1], alone)


@pytest.mark.parametrize("channels_last", [False, True])
def test_slices_too_large_to_keep_what_the_backward_makes_twice(channels_last: bool) -> None:
    x, small = _inputs((1, 8, 192, 192), torch.float32, channels_last)
    truth = _gradients(x.double(), {name: value.double() for name, value in small.items()}, 1, "reference")
    baseline = _gradients(x, small, 1, "reference")
    for name, value in _gradients(x, small, 1, "native").items():
        error, allowed = ((v.double() - truth[name]).abs().max().item() for v in (value, baseline[name]))
        assert error <= max(2 * allowed, 1e-6 * truth[name].abs().max().item()), name


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [(4, 4), (9, 7), (32, 32)])
def test_statistics_far_from_zero(size: tuple[int, int], channels_last: bool) -> None:
    """Spread 1e-4 of the mean: E[x^2] - E[x]^2 in float32 would be noise, and may be negative."""
    x = 100 + 0.01 * torch.randn(2, 64, *size, generator=torch.Generator().manual_seed(0))
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    arguments = (32, None, None, 1e-6, None, None, None, True)
    truth, baseline = reference.group_norm_silu(x.double(), *arguments)[0], reference.group_norm_silu(x, *arguments)[0]
    error, allowed = (
        (y.double() - truth).abs().max().item() for y in (group_norm_silu(x, 32, eps=1e-6, backend="native"), baseline)
    )
    assert error <= max(2 * allowed, 1e-6)


@pytest.mark.parametrize("channels_last", [False, True])
def test_first_value_of_a_channel_far_from_the_others(channels_last: bool) -> None:
    """The sums start relative to it; if they stayed so, 1e-5 would not hold."""
    x = torch.randn(1, 32, 32, 32, generator=torch.Generator().manual_seed(0)) * 1e-3
    x[:, :, 0, 0] = 1000.0
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    truth = reference.group_norm_silu(x.double(), 32, None, None, 1e-6, None, None, None, False)[0]
    y = group_norm_silu(x, 32, eps=1e-6, activation=None, backend="native")
    torch.testing.assert_close(y.double(), truth, rtol=5e-6, atol=1e-6)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_values_give_the_bias(dtype: torch.dtype, channels_last: bool) -> None:
    """Exactly, though 1 / sqrt(eps) = 1000 times any error of the mean would show."""
    x = torch.full((2, 24, 7, 9), 100.3).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    bias = torch.linspace(-2, 2, 24).to(dtype)
    y = group_norm_silu(x, 4, None, bias, 1e-6, activation=None, backend="native")
    assert torch.equal(y, bias[None, :, None, None].expand(y.shape))


def test_squares_beyond_float16() -> None:
    x = (torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(0)) * 2000).half()
    truth = reference.group_norm_silu(x.double(), 8, None, None, 1e-5, None, None, None, True)[0]
    y = group_norm_silu(x, 8, backend="native")
    torch.testing.assert_close(y.double(), truth, rtol=2**-10, atol=2**-14)


def test_activation_over_its_whole_range() -> None:
    """SiLU alone, through the normalisation's bias, where exp overflows and where it vanishes."""
    t = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([-1e38, 1e38, 0.0, -0.0, 1e-30])])
    y = group_norm_silu(torch.zeros(1, len(t), 1, 1), 1, None, t, 1e-5, backend="native").flatten()
    truth = torch.nn.functional.silu(t.double())
    assert torch.isfinite(y).all()
    # exp(-t) is as accurate as t in float32 makes it.
    limit = (5e-7 + 6e-8 * t.abs().clamp(max=100)) * truth.abs() + 1e-34
    assert ((y - truth).abs() <= limit).all()
