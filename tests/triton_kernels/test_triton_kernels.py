"""The Triton launchers against the reference: on the CPU in Triton's interpreter, on a GPU compiled.

Parity of the public ops, gradients included, is in tests/ops. Here is what belongs to the kernels: the bits of the noise,
tiles and grids that end early, several partial results, every layout that a launcher can meet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_calls import defaulting_to, launch_triton
from pairwise import pairwise
from torch import Tensor

from ddpm_fast import reference

pytest.importorskip("triton")

from refusals import refused

from ddpm_fast.errors import InvalidValue
from ddpm_fast.plan import COLUMNS
from ddpm_fast.triton_kernels import denoising_loss as loss_module
from ddpm_fast.triton_kernels import group_norm_silu as norm_module
from ddpm_fast.triton_kernels import tiles

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS = torch.tensor([0, -1, 2**62 + 12345], device=DEVICE)
Layout = Callable[[Tensor], Tensor]


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


LAYOUTS = (contiguous, channels_last)
in_both_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def nan_like(x: Tensor) -> Tensor:
    return torch.full_like(x, torch.nan)


def assert_close(actual: Tensor, exact: Tensor, roundings: int = 8) -> None:
    """Within so many float32 roundings of the largest value."""
    error = (actual.double() - exact.double()).abs().max().item()
    size = exact.abs().max().item()
    assert error <= roundings * 2.0**-24 * size, f"error {error:.2e}, {error / size * 2**24:.1f} roundings"


# ------------------------------------------------------------------------------------------------------------- the noise

# A pair; a tail and a partial block; two tiles a sample; planes that blocks straddle; one channel; two tiles of channels.
SHAPES = [(3, 2), (3, 1, 13), (3, 3, 20, 20), (3, 3, 5, 7), (3, 1, 6, 6), (3, 70, 2, 2)]


@pairwise(shape=SHAPES, dtype=[torch.float32, torch.bfloat16], layout=LAYOUTS)
def test_normals_have_the_bits_of_the_reference(shape: tuple[int, ...], dtype: torch.dtype, layout: Layout) -> None:
    out = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
    if len(shape) == 4:
        out = layout(out)
    stream = 1 if dtype == torch.float32 else reference.STREAM_X_T
    launch_triton("noise", {"out": out}, seeds=SEEDS, stream=stream)
    assert torch.equal(out, reference.noise(shape, SEEDS, stream, dtype))


@in_both_layouts
def test_every_kernel_draws_the_same_normals(layout: Layout) -> None:
    """Also where a grid has programs for samples that do not exist, as it has beyond 65535 samples."""
    x = layout(torch.zeros(3, 3, 8, 8, device=DEVICE))
    z = layout(reference.noise(x.shape, SEEDS, reference.STREAM_Q_SAMPLE, torch.float32))
    t = torch.tensor([1, 1, 1], device=DEVICE)
    table = torch.tensor([[0.0, 0.0], [0.5, 1.0]], device=DEVICE)  # x_t = x_0 / 2 + epsilon
    plan = torch.zeros(8, len(COLUMNS), device=DEVICE)
    plan[:, COLUMNS.index("sigma")] = 1  # x_{t-1} = z
    out = nan_like(x)
    launch_triton("q_sample", {"x_t": out}, x_0=x, t=t, table=table, seeds=SEEDS)
    assert torch.equal(out, z)
    losses = torch.full((3,), torch.nan, device=DEVICE)
    arguments = {"model_output": z, "t": t, "table": table, "seeds": SEEDS}
    launch_triton("denoising_loss", {"losses": losses}, **arguments)
    assert torch.equal(losses, torch.zeros(3, device=DEVICE))
    arguments = {"x_t": x, "model_output": x, "table": plan, "steps": torch.tensor([5, 0, 7], device=DEVICE), "seeds": SEEDS}
    launch_triton("reverse_step", {"x_prev": out}, **arguments, variance=0)
    expected = [reference.noise((1, 3, 8, 8), SEEDS[i : i + 1], step, torch.float32) for i, step in enumerate((5, 0, 7))]
    assert torch.equal(out, torch.cat(expected))


@in_both_layouts
def test_more_samples_than_a_grid_has_rows(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "MAX_GRID_Y", 2)  # 3 samples: 2 x 2 programs
    test_every_kernel_draws_the_same_normals(layout)
    test_group_norm_in_one_tile_and_in_chunks(layout, 2, True, monkeypatch)


# ---------------------------------------------------------------------------------------------------------- the launchers


@pairwise(
    reads={"x_0": (True, False), "epsilon": (False, True), "both": (True, True)},
    drawn={"noise": False, "seeds": True},
    layout=LAYOUTS,
)
def test_loss_of_many_tiles(reads: tuple[bool, bool], drawn: bool, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "TILES_PER_PROGRAM", 1)  # 2 partial sums a sample
    x, m, z = (layout(randn(3, 3, 20, 21, seed=seed)) for seed in range(3))
    t, table = torch.tensor([0, 2, 1], device=DEVICE), torch.rand(3, 2, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    arguments: dict[str, Any] = {"x_0": x if reads[0] else None, "t": t, "table": table, "noise": None, "seeds": None}
    if reads[1]:
        arguments |= {"seeds": SEEDS} if drawn else {"noise": z}
    losses = torch.full((3,), torch.nan, device=DEVICE)
    launch_triton("denoising_loss", {"losses": losses}, model_output=m, **arguments)
    wide = m.clone().requires_grad_()
    exact = reference.denoising_loss(wide, **arguments)
    assert_close(losses, exact)

    grad_losses = randn(3)
    exact.backward(grad_losses)
    grad = nan_like(m)
    launch_triton("denoising_loss_backward", {"grad_model_output": grad}, grad_losses=grad_losses, model_output=m, **arguments)
    assert wide.grad is not None
    assert_close(grad, wide.grad)


def plan_table() -> Tensor:
    table = torch.rand(8, len(COLUMNS), generator=torch.Generator().manual_seed(1)) * 2 - 1
    table[:, COLUMNS.index("clip")] = 1.0
    table[3, COLUMNS.index("clip")] = torch.inf
    table[0, COLUMNS.index("sigma")] = 0.0
    return table.to(DEVICE)


# Channels: one, where a channels_last state is contiguous too but the two-channel model output is not; three; two tiles.
@pairwise(variance=[0, 1, 2], channels=[1, 3, 70], layout=LAYOUTS)
def test_reverse_step_with_guidance_and_learned_variance(variance: int, channels: int, layout: Layout) -> None:
    x, x_0_prev, x_0_prev2 = (layout(randn(3, channels, 4, 6, seed=seed)) for seed in (0, 1, 3))
    m = layout(randn(6, channels if variance == 0 else 2 * channels, 4, 6, seed=2)).bfloat16()
    arguments = {
        "model_output": m,
        "table": plan_table(),
        "steps": torch.tensor([0, 3, 7], device=DEVICE),
        "noise": None,
        "seeds": SEEDS,
        "x_0_prev": x_0_prev,
        "x_0_prev2": x_0_prev2,
        "guidance_scale": 3.0,
        "variance": variance,
    }
    exact, exact_0 = reference.reverse_step(x, **arguments, return_x_0=True)
    out, x_0 = nan_like(x), nan_like(x)
    launch_triton("reverse_step", {"x_prev": out, "x_0": x_0}, x_t=x, **arguments)
    assert_close(out, exact)
    assert_close(x_0, exact_0)

    in_place = x.clone(memory_format=torch.preserve_format)
    launch_triton("reverse_step", {"x_prev": in_place}, x_t=in_place, **arguments)
    assert torch.equal(in_place, out)


def test_a_nan_of_the_model_is_not_clipped() -> None:
    x = torch.full((1, 1, 2, 2), torch.nan, device=DEVICE)
    out, x_0 = torch.zeros_like(x), torch.zeros_like(x)
    arguments = {"x_t": torch.zeros_like(x), "model_output": x, "table": plan_table(), "steps": SEEDS[:1], "seeds": SEEDS[:1]}
    launch_triton("reverse_step", {"x_prev": out, "x_0": x_0}, **arguments, variance=0)
    assert out.isnan().all()
    assert x_0.isnan().all()


def test_what_is_too_large_is_refused() -> None:
    x = torch.empty(1, 2**31, device="meta")
    with refused(InvalidValue("ddpm_fast", "", "samples of fewer than 2^31 elements", "2147483648")):
        launch_triton("noise", {"out": x}, seeds=SEEDS[:1], stream=0)
    with refused(InvalidValue("group_norm_silu", "", "samples of fewer than 2^31 elements", "2147483648")):
        launch_triton("group_norm_silu", {"y": x, "mean": x, "rstd": x}, x=x, num_groups=1, eps=1e-5, silu=True)
    x = torch.empty(1, 5000, device="meta")
    with refused(InvalidValue("group_norm_silu", "", "at most 4096 channels in a group for the Triton kernels", "5000")):
        launch_triton("group_norm_silu", {"y": x, "mean": x, "rstd": x}, x=x, num_groups=1, eps=1e-5, silu=True)


# ---------------------------------------------------------------------------------------------------------- the group norm


SMALL = ("weight", "bias", "shift", "scale", "scale_shift")


def run_norm(x: Tensor, dy: Tensor, small: list[Tensor], groups: int, silu: bool) -> list[Tensor]:
    """y, mean, rstd and the gradients of x, weight, bias, shift, scale and scale_shift."""
    y, dx = nan_like(x), nan_like(x)
    mean, rstd = (torch.full((x.shape[0], groups), torch.nan, dtype=torch.float32, device=DEVICE) for _ in range(2))
    gradients = [nan_like(value) for value in small]
    arguments = {"x": x, "num_groups": groups, "eps": 1e-5, "silu": silu, **dict(zip(SMALL, small, strict=True))}
    launch_triton("group_norm_silu", {"y": y, "mean": mean, "rstd": rstd}, **arguments)
    results = {"grad_x": dx} | {f"grad_{name}": gradient for name, gradient in zip(SMALL, gradients, strict=True)}
    launch_triton("group_norm_silu_backward", results, grad_y=dy, mean=mean, rstd=rstd, **arguments)
    return [y, mean, rstd, dx, *gradients]


def exact_norm(x: Tensor, dy: Tensor, small: list[Tensor], groups: int, silu: bool) -> list[Tensor]:
    leaves = [value.double().requires_grad_() for value in (x, *small)]
    weight, bias, *modulation = leaves[1:]
    y, mean, rstd = reference.group_norm_silu(leaves[0], groups, weight, bias, 1e-5, *modulation, silu)
    y.backward(dy.double())
    return [y.detach(), mean.detach(), rstd.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def norm_inputs(n: int, c: int, h: int, w: int, layout: Layout) -> tuple[Tensor, Tensor, list[Tensor]]:
    x, dy = layout(2 * randn(n, c, h, w) + 1), layout(randn(n, c, h, w, seed=1))
    return x, dy, [randn(c, seed=2), randn(c, seed=3), *(randn(n, c, seed=seed) for seed in (4, 5, 6))]


# Groups: 2 of 8 channels, nothing is padded; 3 of 6 in 9 x 5 pixels, padded in every way.
@pairwise(groups=[2, 3], silu={"silu": True, "linear": False}, layout=LAYOUTS)
def test_group_norm_in_one_tile_and_in_chunks(layout: Layout, groups: int, silu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, dy, small = norm_inputs(3, 18, 9, 5, layout) if groups == 3 else norm_inputs(3, 16, 8, 8, layout)
    exact = exact_norm(x, dy, small, groups, silu)
    resident = run_norm(x, dy, small, groups, silu)
    for value, expected in zip(resident, exact, strict=True):
        assert_close(value, expected, roundings=24)

    limits = {"RESIDENT_FORWARD": (0, 0), "RESIDENT_BACKWARD": (0, 0), "SPLIT_TILE": 256, "TILES_PER_CHUNK": 2}
    for name, value in limits.items():
        monkeypatch.setattr(norm_module, name, value)
    launched = count_launches(norm_module, "_apply_kernel", monkeypatch)
    in_chunks = run_norm(x, dy, small, groups, silu)
    assert launched == ["_apply_kernel"]
    for value, expected in zip(in_chunks, exact, strict=True):
        assert_close(value, expected, roundings=24)


def count_launches(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    kernel, launched = getattr(module, name), []

    class Spy:
        arg_names = kernel.arg_names

        def __getitem__(self, grid: Any) -> Any:
            launched.append(name)
            return kernel[grid]

    monkeypatch.setattr(module, name, Spy())
    return launched


@in_both_layouts
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "chunks"])
def test_group_norm_far_from_zero(resident: bool, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deviations of a hundredth around a thousand: E[x^2] - E[x]^2 has no digit right, nor has a mean summed carelessly."""
    if not resident:
        monkeypatch.setattr(norm_module, "RESIDENT_FORWARD", (0, 0))
        monkeypatch.setattr(norm_module, "SPLIT_TILE", 512)
    x = layout(1000 + randn(2, 8, 16, 16) / 64)
    y, mean, rstd = nan_like(x), *(torch.full((2, 2), torch.nan, device=DEVICE) for _ in range(2))
    launch_triton("group_norm_silu", {"y": y, "mean": mean, "rstd": rstd}, x=x, num_groups=2, eps=1e-5, silu=False)
    exact, exact_mean, exact_rstd = reference.group_norm_silu(x.double(), 2, None, None, 1e-5, None, None, None, False)
    assert_close(mean, exact_mean, roundings=1)
    assert_close(rstd, exact_rstd, roundings=32)
    assert_close(y, exact, roundings=32)


@in_both_layouts
def test_group_norm_of_a_sample_does_not_depend_on_its_batch(layout: Layout) -> None:
    x, dy, small = norm_inputs(3, 16, 8, 8, layout)
    weight, bias, *modulation = small
    batch = run_norm(x, dy, small, 4, True)
    alone = run_norm(x[1:2], dy[1:2], [weight, bias, *(value[1:2] for value in modulation)], 4, True)
    for index in (0, 1, 2, 3, 6, 7, 8):  # all but the gradients of weight and bias, which are sums over the batch
        assert torch.equal(batch[index][1:2], alone[index])


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "chunks"])
def test_scratch_is_float32_under_any_default_dtype(resident: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics, partial sums and sums of gradients keep their digits, so the results keep their bits."""
    if not resident:
        for name, value in {"RESIDENT_FORWARD": (0, 0), "RESIDENT_BACKWARD": (0, 0), "SPLIT_TILE": 256}.items():
            monkeypatch.setattr(norm_module, name, value)
        monkeypatch.setattr(norm_module, "TILES_PER_CHUNK", 2)
        monkeypatch.setattr(loss_module, "TILES_PER_PROGRAM", 1)
    x, dy, small = norm_inputs(3, 16, 20, 21, channels_last)
    losses = {"losses": torch.empty(3, device=DEVICE)}
    target = {"model_output": dy, "x_0": x, "t": torch.zeros(3, dtype=torch.int64, device=DEVICE), "noise": randn(*x.shape)}
    table = torch.tensor([[0.6, 0.8]], device=DEVICE)

    def results() -> list[Tensor]:
        y = nan_like(x)
        launch_triton("group_norm_silu", {"y": y}, x=x, num_groups=4, eps=1e-5, silu=True)
        launch_triton("denoising_loss", losses, **target, table=table)
        return [y, *run_norm(x, dy, small, 4, True), losses["losses"].clone()]

    expected = results()
    with defaulting_to(torch.bfloat16):
        got = results()
    assert all(map(torch.equal, got, expected))


def test_group_norm_of_an_empty_batch_has_zero_gradients() -> None:
    x = torch.empty(0, 4, 2, 2, device=DEVICE)
    weight, gradient = torch.ones(4, device=DEVICE), torch.full((4,), torch.nan, device=DEVICE)
    statistics = torch.empty(0, 2, device=DEVICE)
    arguments = {"x": x, "num_groups": 2, "weight": weight, "eps": 1e-5, "silu": True}
    results = {"mean": statistics, "rstd": statistics}
    launch_triton("group_norm_silu", {"y": x, **results}, **arguments)
    launch_triton("group_norm_silu_backward", {"grad_x": x, "grad_weight": gradient}, grad_y=x, **results, **arguments)
    assert torch.equal(gradient, torch.zeros(4, device=DEVICE))
