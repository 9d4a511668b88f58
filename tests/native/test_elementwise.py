"""Native q_sample and reverse_step beyond parity: the last bit."""

import pytest
import torch
from kernel_calls import launch

import ddpm_fast
from ddpm_fast.plan import COLUMNS

_native = pytest.importorskip("ddpm_fast._native")

# Ends within a block, a vector and a tile; more channels than a tile holds; one pixel; several tiles a sample.
SHAPES = [(3, 3, 7, 5), (2, 37, 9, 9), (2, 5, 1, 1), (2, 3, 40, 32)]
SCHEDULE = ddpm_fast.NoiseSchedule.linear(50)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bit_for_bit_the_reference(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> None:
    """Products and sums are rounded one by one in the reference's order, so nothing may differ."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, m = (torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    t, seeds = torch.randint(50, shape[:1]), ddpm_fast.sample_seeds(3, shape[0])
    plan, order_3 = ddpm_fast.ddpm_plan(SCHEDULE), ddpm_fast.dpm_solver_plan(SCHEDULE, 50, order=3, spacing="trailing")
    for op, arguments in [
        (ddpm_fast.q_sample, {"x_0": x, "t": t, "schedule": SCHEDULE, "seeds": seeds}),
        (ddpm_fast.reverse_step, {"x_t": x, "model_output": m, "step": t, "plan": plan, "seeds": seeds}),
        (ddpm_fast.reverse_step, {"x_t": x, "model_output": m, "step": 7, "plan": plan, "noise": m, "x_0_prev": x}),
        (ddpm_fast.reverse_step, {"x_t": m, "model_output": x, "step": t, "plan": order_3, "x_0_prev": x, "x_0_prev2": m}),
    ]:
        assert torch.equal(op(**arguments, backend="native"), op(**arguments, backend="reference"))


def test_conversions_to_16_bits_round_like_torch() -> None:
    """Every 16-bit value, the ties between neighbours, what overflows, what is subnormal, NaN."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    edges = torch.tensor([65519.996, 65520.0, 2.0**-24, 2.0**-25, 2.0**-25 * 1.001, 1e-38, 1e-42, 3e38, float("nan")])
    values = torch.cat([halves.float(), halves.float().nextafter(torch.tensor(9e9)), edges, -edges])
    values = torch.cat([values, values * (1 + 2.0**-11), values * (1 + 2.0**-9)])
    values = values[~values.isinf()]
    k2_only = torch.tensor([[float(name in ("k2", "clip")) for name in COLUMNS]])  # a plan with x_{t-1} = the model's output
    noise_only = torch.tensor([[0.0, 1.0]])  # a schedule with x_t = epsilon
    first = torch.tensor([0])
    for code, dtype in ((2, torch.float16), (3, torch.bfloat16)):
        zeros, narrowed = torch.zeros(values.numel(), dtype=dtype), torch.empty(values.numel(), dtype=dtype)
        common = {"dtype": code, "n": 1, "c": 1, "channels_last": False, "stream_or_threads": 1}
        launch(
            _native.cpu, "reverse_step", **common, x_prev=narrowed, x_t=zeros, model_output=values, model_output_dtype=0,
            table=k2_only, steps=first, step_stride=0, has_guidance=False, guidance_scale=0.0, variance=0, hw=values.numel(),
        )  # fmt: skip
        torch.testing.assert_close(narrowed, (values + 0.0).to(dtype), rtol=0, atol=0, equal_nan=True)
        given = halves.view(dtype)
        back = torch.empty_like(given)
        launch(
            _native.cpu, "q_sample", **common, x_t=back, x_0=zeros, x_0_dtype=code, t=first, table=noise_only, noise=given,
            hw=given.numel(),
        )  # fmt: skip
        torch.testing.assert_close(back, given + 0.0, rtol=0, atol=0, equal_nan=True)
