"""Properties of the noise: seeds, streams and normality."""

import math

import pytest
import torch
from op_calls import make_call
from op_cases import SCHEDULE, Case
from parity import skip_unless

from ddpm_fast import STREAM_X_T, ddpm_plan, initial_noise, noise, reference, sample_seeds
from ddpm_fast.ops import BACKENDS

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_fused_multiply_add_rounds_once() -> None:
    """(1 + 2^-12)^2 - 1 - 2^-11 is 2^-24 exactly; with two roundings it would be 0."""
    a = torch.tensor([1 + 2.0**-12])
    assert reference._fma(a, a, -(1 + 2.0**-11)).item() == 2.0**-24
    # 1 + 2^-24 + 2^-60 lies above the midpoint of 1 and its successor; rounding to float64 first would land on the midpoint.
    x = torch.tensor([2.0**-24])
    assert reference._fma(x, 1 + 2.0**-23, 1.0).item() == 1 + 2.0**-23


def test_sample_seeds_are_distinct_across_runs_and_pure() -> None:
    a, b = sample_seeds(0, 1000), sample_seeds(1, 1000)
    assert len(set(a.tolist()) | set(b.tolist())) == 2000
    assert torch.equal(sample_seeds(0, 10, start=5), a[5:15])
    assert torch.equal(sample_seeds(-1, 3), sample_seeds(2**64 - 1, 3))


def test_normals_are_normal() -> None:
    """Moments within five standard errors, and the largest gap of the distribution function (Kolmogorov-Smirnov)."""
    z = noise((64, 1 << 15), sample_seeds(11, 64), dtype=torch.float64).flatten()
    n = z.numel()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(z.pow(power).mean().item() - mean) < 5 * math.sqrt(variance / n), power
    cdf = torch.special.ndtr(z.sort().values)
    gap = (cdf - (torch.arange(n, dtype=torch.float64) + 0.5) / n).abs().max().item()
    assert gap < 1.95 / math.sqrt(n)  # a chance of 0.001


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["q_sample", "reverse_step", "denoising_loss"])
def test_ops_draw_what_noise_draws(op: str, backend: str, device: torch.device) -> None:
    call = make_call(
        Case(op, "drawn", (4, 3, 6, 6), {"plan": ddpm_plan(SCHEDULE), "step": 7, "reduction": "none"}), device=device
    )
    skip_unless(backend, call)
    stream = 7 if op == "reverse_step" else reference.STREAM_Q_SAMPLE
    z = noise((4, 3, 6, 6), call.arguments["seeds"], stream=stream, backend=backend)
    assert torch.equal(*call(backend), *call(backend, seeds=None, noise=z))


@pytest.mark.gpu
@needs_gpu
def test_many_normals_of_a_gpu_have_the_bits_of_the_cpus() -> None:
    """The approximate reciprocal square root of a GPU is known only on a GPU."""
    shape, seeds = (64, 1 << 20), sample_seeds(12, 64)
    for stream in range(4):
        assert torch.equal(noise(shape, seeds.cuda(), stream=stream).cpu(), noise(shape, seeds, stream=stream))


@pytest.mark.gpu
@needs_gpu
def test_more_than_2_31_elements() -> None:
    last, n = 4096, (1 << 31) + 4096
    if torch.cuda.mem_get_info()[0] < 4 * n:
        pytest.skip("needs 9 GB of the GPU's memory")
    seeds = sample_seeds(13, 3)
    words = reference.philox(seeds[:1], 0, (n - last) // 4, last // 4)[:, 0]
    pairs = [torch.stack(reference._normal_pair(words[i], words[i + 1]), dim=1) for i in (0, 2)]
    long = noise((1, n), seeds[:1].cuda(), dtype=torch.bfloat16)
    assert torch.equal(long[0, -last:].cpu(), torch.cat(pairs, dim=1).flatten().bfloat16())
    del long
    many = noise((3, 1 << 30), seeds.cuda(), dtype=torch.bfloat16)
    assert torch.equal(many[2:], noise((1, 1 << 30), seeds[2:].cuda(), dtype=torch.bfloat16))


def test_initial_noise_is_no_steps_noise() -> None:
    """`test_properties.py` shows that `sample` starts from it."""
    seeds, shape = sample_seeds(4, 2), (2, 1, 8, 8)
    x_T = initial_noise(shape, seeds)
    assert torch.equal(x_T, noise(shape, seeds, stream=STREAM_X_T))
    assert not any(torch.equal(x_T, noise(shape, seeds, stream=step)) for step in range(3))
