"""The small kernels of a sampling step, which copy, cast and count: their results have the bits of the reference."""

from __future__ import annotations

import pytest
import torch

from ddpm_fast import NoiseSchedule, ddpm_plan, reverse_step
from ddpm_fast.ops import BackendUnavailable, backend
from ddpm_fast.ops.region import in_one_region
from ddpm_fast.ops.reverse_step import reverse_step_op
from ddpm_fast.ops.step_parts import count_step_op, network_input_op, time_terms_op
from ddpm_fast.reference import VARIANCES

pytestmark = [
    pytest.mark.skipif(backend.native_error() is not None, reason="there is no compiled module"),
    pytest.mark.usefixtures("matrix_kernels"),
]


@pytest.mark.parametrize(("tables", "width", "samples"), [(1, 1, 1), (3, 7, 5), (2, 130, 16), (22, 1030, 2), (2, 8, 0)])
def test_time_terms_are_those_of_the_steps_timestep(tables: int, width: int, samples: int) -> None:
    table = torch.randn(tables, 11, width)
    timesteps, step = torch.tensor([10, 4, 0]), torch.tensor([1])
    terms = time_terms_op(table, timesteps, step, samples, backend="native")
    assert torch.equal(terms, time_terms_op(table, timesteps, step, samples, backend="reference"))
    assert torch.equal(terms, table[:, 4:5].expand(tables, samples, width))


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("dtype", backend.MATRIX_DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (3, 16, 24, 32)])
def test_the_networks_input(shape: tuple[int, ...], dtype: torch.dtype, copies: int, centered: bool) -> None:
    x_t = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    x_t[0, 0, 0, 0], x_t[-1, -1, -1, -1] = 3e38, torch.nan  # 2 x overflows
    x = network_input_op(x_t, dtype, copies, centered, backend="native")
    expected = network_input_op(x_t, dtype, copies, centered, backend="reference")
    torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)
    assert (x.shape, x.dtype) == ((copies * shape[0], *shape[1:]), dtype)
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_the_counter_counts_in_place() -> None:
    step = torch.tensor([7])
    assert count_step_op(step, backend="reference").item() == count_step_op(step, backend="native").item() == 8
    run = in_one_region([(count_step_op, (step,), (step,))], 2)
    for _ in range(3):
        run()
    assert step.item() == 10


def test_what_a_kernel_would_read_wrongly_is_refused() -> None:
    table, timesteps, step = torch.zeros(1, 4, 8), torch.tensor([3, 0]), torch.tensor([1])
    with pytest.raises(BackendUnavailable, match="it copies float32, not torch"):
        time_terms_op(table.bfloat16(), timesteps, step, 2, backend="native")
    for name in ("native", "reference"):
        with pytest.raises(ValueError, match=r"^expected step .*0\.\.1"):
            time_terms_op(table, timesteps, step + 1, 2, backend=name)
        with pytest.raises(ValueError, match=r"^expected timesteps .*0\.\.3"):
            time_terms_op(table, timesteps + 1, step, 2, backend=name)


def test_calls_of_one_region_have_one_memory_format_each() -> None:
    """The kernels' shape has room for one. A tensor of one channel has both."""
    plan = ddpm_plan(NoiseSchedule.linear(10), variance="learned_range")
    step, seeds = torch.tensor([2]), torch.arange(2)
    for channels in (1, 3):
        x = torch.randn(2, channels, 4, 4).contiguous(memory_format=torch.channels_last)
        m = torch.randn(2, 2 * channels, 4, 4).contiguous(memory_format=torch.channels_last)
        arguments = (m, plan.table(), step, None, seeds, None, None, None, VARIANCES.index(plan.variance), False)
        expected, out = reverse_step(x, m, step, plan, seeds=seeds), torch.empty_like(x)
        in_one_region([(reverse_step_op, (x, *arguments), (out,))], 2)()
        assert torch.equal(out, expected)
    with pytest.raises(ValueError, match=r"^expected tensors of one memory format, got strides"):
        in_one_region([(reverse_step_op, (x.contiguous(), *arguments), (out,))], 2)
