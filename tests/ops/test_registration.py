"""torch.library's view of the ops: opcheck, compilation without graph breaks or recompiles, autocast, higher derivatives."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from op_calls import make_call
from op_cases import CASES, SCHEDULE, Case
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import ddpm_fast
from ddpm_fast.ops import backend, why_not

# One case an op and code path; opcheck is slow and repeats what test_parity shows of values.
_PATHS = (
    *("odd-sizes", "ddpm-clip", "learned-range-guidance", "scale-shift", "epsilon", "v_prediction-given-noise"),
    *("everything", "heads"),
)
SEEDS = ddpm_fast.sample_seeds(0, 2)
OPCHECKED = [case for case in CASES if case.name in _PATHS]


class _Recorder(TorchDispatchMode):
    """Record calls of this package's ops below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "ddpm_fast":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "channels_last", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["contiguous", "channels_last"]
)
@pytest.mark.parametrize("case", OPCHECKED, ids=str)
@pytest.mark.usefixtures("matrix_kernels")
def test_opcheck(case: Case, channels_last: bool, device: torch.device) -> None:
    call = make_call(case, device=device, channels_last=channels_last).map(lambda x: x.detach().clone().requires_grad_())
    with _Recorder() as recorder:
        outputs = call("native")
        if call.tensors:
            sum(output.double().square().sum() for output in outputs).backward()
        with torch.no_grad():  # records an op without a backward kernel: PyTorch computes its gradient
            call("native")
    assert recorder.calls[-1][0].name() == f"ddpm_fast::{case.op}"
    for function, args in dict(recorder.calls).items():  # each op once
        schema = function._schema
        differentiable = "backward" not in schema.name
        with_grad = tuple(
            a.detach().requires_grad_(differentiable and a.is_floating_point() and parameter.name != "table")
            if isinstance(a, Tensor)
            else a
            for a, parameter in zip(args, schema.arguments, strict=False)
        )
        torch.library.opcheck(function, with_grad)


def _training_step(x_0: Tensor, t: Tensor, seeds: Tensor, *parameters: Tensor) -> Tensor:
    """Every differentiable op of a training step, in one function."""
    x_t = ddpm_fast.q_sample(x_0, t, SCHEDULE, seeds=seeds)
    weight, bias, shift = parameters
    h = ddpm_fast.group_norm_silu(x_t, 2, weight, bias, shift=shift)
    return ddpm_fast.denoising_loss(h, x_0, t, SCHEDULE, seeds=seeds)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_compiles_whole_and_no_more_than_dynamic_sizes_need(layout: torch.memory_format, device: torch.device) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_training_step, fullgraph=True, backend=counter)
    for n in (3, 3, 2, 5, 4):
        x_0 = torch.randn(n, 4, 8, 8, device=device).contiguous(memory_format=layout)
        t, seeds = torch.randint(1000, (n,), device=device), ddpm_fast.sample_seeds(n, n).to(device)
        parameters = [torch.randn(shape, device=device, requires_grad=True) for shape in ((4,), (4,), (n, 4))]
        loss, expected = (function(x_0, t, seeds, *parameters) for function in (compiled, _training_step))
        torch.testing.assert_close(loss, expected, rtol=0, atol=0)
        torch.testing.assert_close(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters))
    assert counter.frame_count == 2  # the second is for any batch size


def test_a_sampling_step_compiles_once_for_every_step(device: torch.device) -> None:
    """The plan's table for the CPU is there before: a table that the function adds to it would be a reason to recompile."""
    torch._dynamo.reset()
    plan, counter = ddpm_fast.ddpm_plan(SCHEDULE, 10), CompileCounterWithBackend("aot_eager")
    x, seeds = torch.randn(2, 3, 4, 4, device=device), SEEDS.to(device)

    def step(x: Tensor, number: Tensor) -> Any:
        return ddpm_fast.reverse_step(x, 0.1 * x, number, plan, seeds=seeds)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for number in torch.arange(10) if device.type == "cpu" else plan.steps(device):
        assert torch.equal(compiled(x, number), step(x, number))
    assert counter.frame_count == 1


def test_a_build_without_cuda_does_not_keep_the_other_backends_from_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reason comes from compiled code, which torch.compile does not see through."""
    monkeypatch.delitem(backend.KERNELS, "cuda", raising=False)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def doubled(x: Tensor) -> Tensor:
        return x if why_not("native", "noise", torch.device("cuda", 0)) is None else 2 * x

    assert doubled(torch.ones(1)).item() == 2


@pytest.mark.parametrize(
    ("is_interpreted", "device", "dtype", "reason"),
    [
        (True, "cpu", torch.float32, None),
        (True, "cpu", torch.float64, "float64"),
        (False, "cuda:0", torch.float32, None),
        (False, "cpu", torch.float32, "TRITON_INTERPRET=1"),
        (False, "meta", torch.float32, "meta tensors"),
        (None, "cuda:0", torch.float32, "not installed"),
    ],
)
def test_reasons_why_triton_cannot_run(
    is_interpreted: bool | None, device: str, dtype: torch.dtype, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_TRITON_INSTALLED", is_interpreted is not None)
    monkeypatch.setattr(backend, "_TRITON_INTERPRETED", is_interpreted)
    got = backend.why_not_triton(torch.device(device), dtype)
    assert got is None if reason is None else reason in str(got)


def test_autocast_keeps_the_norm_in_its_input_dtype(device: torch.device) -> None:
    h, weight = torch.randn(2, 8, 4, 4, device=device).bfloat16(), torch.ones(8, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert ddpm_fast.group_norm_silu(h, 2, weight, weight).dtype == torch.bfloat16


_DIFFERENTIATED = (
    *("scale-shift", "v_prediction", "upsample", "residual", "everything", "heads"),
    *("learned-range-guidance", "learned", "order-3", "odd-sizes"),
)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in _DIFFERENTIATED and make_call(case).tensors], ids=str)
@pytest.mark.usefixtures("matrix_kernels")
def test_higher_derivatives_are_as_right_as_the_reference_s(case: Case, device: torch.device) -> None:
    """A kernel computes the first, if there is one. The reference computes the others."""
    reason = why_not("native", case.op, device)
    if reason is not None:
        pytest.skip(reason)
    call = make_call(case, device=device)

    def derivatives(backend: str, dtype: torch.dtype) -> list[Tensor]:
        typed = call.map(lambda x: x.to(dtype).requires_grad_())
        leaves, found = list(typed.tensors.values()), []
        values: Sequence[Tensor] = typed(backend)
        for _ in range(3):
            total = torch.stack([value.square().sum() for value in values]).sum()
            values = torch.autograd.grad(total, leaves, create_graph=True, materialize_grads=True, allow_unused=True)
            found += [value.detach().double() for value in values]
        return found

    got = derivatives("native", torch.float32)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the fused one has no second derivatives
        baseline, exact = (derivatives("reference", dtype) for dtype in (torch.float32, torch.float64))
    for one, other, truth in zip(got, baseline, exact, strict=True):
        error, allowed = ((each - truth).abs().max().item() for each in (one, other))
        # Squares magnify the roundings of the derivative before.
        assert error <= max(2 * allowed, 32 * torch.finfo(torch.float32).eps * truth.abs().max().item())


def test_tables_first_used_in_inference_mode_serve_training() -> None:
    schedule, device = ddpm_fast.NoiseSchedule.linear(10), torch.device("meta")
    plan = ddpm_fast.ddpm_plan(schedule)
    with torch.inference_mode():
        tables = schedule.target("x_t", device).table, plan.table(device), plan.steps(device)
    assert not any(table.is_inference() for table in tables)
