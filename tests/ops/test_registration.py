"""torch.library's view of the ops: opcheck, compilation without graph breaks or recompiles, autocast, higher derivatives."""

import itertools
from typing import Any

import pytest
import torch
from op_calls import make_call
from op_cases import CASES, SCHEDULE, Case
from refusals import refused
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import ddpm_fast
from ddpm_fast.errors import InvalidValue
from ddpm_fast.ops import BACKENDS, backend, why_not

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
    for function, args in recorder.calls:
        schema = function._schema
        differentiable = "backward" not in schema.name
        with_grad = tuple(
            a.detach().requires_grad_(differentiable and a.is_floating_point() and parameter.name != "table")
            if isinstance(a, Tensor)
            else a
            for a, parameter in zip(args, schema.arguments, strict=False)
        )
        torch.library.opcheck(function, with_grad)


def _training_step(x_0: Tensor, t: Tensor, seeds: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
    """Every differentiable op of a training step, in one function."""
    x_t = ddpm_fast.q_sample(x_0, t, SCHEDULE, seeds=seeds)
    h = ddpm_fast.group_norm_silu(x_t, 2, weight, bias, shift=shift)
    return ddpm_fast.denoising_loss(h, x_0, t, SCHEDULE, seeds=seeds)


def _training_inputs(n: int, device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    shapes = ((n, 4, 8, 8), (4,), (4,), (n, 4))
    x_0, weight, bias, shift = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    t, seeds = torch.randint(1000, (n,), generator=generator).to(device), ddpm_fast.sample_seeds(n, n).to(device)
    return x_0, t, seeds, weight.requires_grad_(), bias.requires_grad_(), shift.requires_grad_()


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_compiles_whole_and_no_more_than_dynamic_sizes_need(channels_last: bool, device: torch.device) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_training_step, fullgraph=True, backend=counter)
    for n in (3, 3, 2, 5, 4):
        x_0, *rest = _training_inputs(n, device)
        if channels_last:
            x_0 = x_0.contiguous(memory_format=torch.channels_last)
        loss, expected = compiled(x_0, *rest), _training_step(x_0, *rest)
        torch.testing.assert_close(loss, expected, rtol=0, atol=0)
        parameters = rest[2:]
        for got, want in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
            torch.testing.assert_close(got, want)
    assert counter.frame_count == 2  # the second is for any batch size


def test_sampling_loop_body_compiles_once_for_every_step(device: torch.device) -> None:
    torch._dynamo.reset()
    plan = ddpm_fast.ddpm_plan(SCHEDULE, 10)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, m, step, seeds: ddpm_fast.reverse_step(x, m, step, plan, seeds=seeds), fullgraph=True, backend=counter
    )
    x, seeds = torch.randn(2, 3, 4, 4, device=device), ddpm_fast.sample_seeds(0, 2).to(device)
    for step in plan.steps(device):
        assert torch.equal(compiled(x, 0.1 * x, step, seeds), ddpm_fast.reverse_step(x, 0.1 * x, step, plan, seeds=seeds))
    assert counter.frame_count == 1


def test_a_plan_that_a_compiled_function_uses_first_compiles_once() -> None:
    """Its table for the CPU is there before: a table that the function adds to the plan would be a reason to recompile."""
    torch._dynamo.reset()
    plan = ddpm_fast.ddpm_plan(SCHEDULE, 10)
    x, counter = torch.randn(2, 3, 4, 4), CompileCounterWithBackend("eager")
    compiled = torch.compile(
        lambda x, m, step: ddpm_fast.reverse_step(x, m, step, plan, seeds=SEEDS), fullgraph=True, backend=counter
    )
    for step in torch.tensor([3, 4]):
        compiled(x, 0.1 * x, step)
    assert counter.frame_count == 1


def test_a_build_without_cuda_does_not_keep_the_other_backends_from_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reason comes from compiled code, which torch.compile does not see through."""
    monkeypatch.delitem(backend.KERNELS, "cuda", raising=False)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def doubled(x: Tensor) -> Tensor:
        return x if why_not("native", "noise", torch.device("cuda", 0)) is None else 2 * x

    assert doubled(torch.ones(1)).item() == 2


def test_reasons_why_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(backend, "_TRITON_INSTALLED", True)
    monkeypatch.setattr(backend, "_TRITON_INTERPRETED", True)
    assert backend.why_not_triton(cpu, torch.float32) is None
    assert "float64" in str(backend.why_not_triton(cpu, torch.float64))
    monkeypatch.setattr(backend, "_TRITON_INTERPRETED", False)
    assert backend.why_not_triton(gpu, torch.float32) is None
    assert "TRITON_INTERPRET=1" in str(backend.why_not_triton(cpu, torch.float32))
    assert "meta tensors" in str(backend.why_not_triton(torch.device("meta"), torch.float32))
    monkeypatch.setattr(backend, "_TRITON_INSTALLED", False)
    assert "not installed" in str(backend.why_not_triton(gpu, torch.float32))


def test_autocast_keeps_the_norm_in_its_input_dtype(device: torch.device) -> None:
    x = torch.randn(2, 8, 4, 4, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        h = torch.nn.functional.conv2d(x, torch.randn(8, 8, 1, 1, device=device))
        assert h.dtype == torch.bfloat16
        y = ddpm_fast.group_norm_silu(h, 2, torch.ones(8, device=device), torch.zeros(8, device=device))
    assert y.dtype == torch.bfloat16


_DIFFERENTIATED = ("scale-shift", "v_prediction", "upsample", "residual", "everything", "heads")


@pytest.mark.parametrize("case", [case for case in CASES if case.name in _DIFFERENTIATED], ids=str)
def test_higher_derivatives_are_as_right_as_the_reference_s(case: Case, device: torch.device) -> None:
    """A kernel computes the first, if there is one. The reference computes the others."""
    reason = why_not("native", case.op, device)
    if reason is not None:
        pytest.skip(reason)
    call = make_call(case, device=device)
    name, x = next(iter(call.tensors.items()))

    def derivatives(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaf = x.to(dtype).requires_grad_()
        arguments = call.map(lambda x: x.to(dtype)).arguments | {name: leaf}
        y = call.function(**arguments, backend=backend)
        found = []
        for _ in range(3):
            (y,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
            found.append(y.detach().double())
        return found

    got = derivatives("native", torch.float32)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the fused one has no second derivatives
        baseline, exact = (derivatives("reference", dtype) for dtype in (torch.float32, torch.float64))
    for one, other, truth in zip(got, baseline, exact, strict=True):
        error, allowed = ((each - truth).abs().max().item() for each in (one, other))
        # Squares magnify the roundings of the derivative before.
        assert error <= max(2 * allowed, 32 * torch.finfo(torch.float32).eps * truth.abs().max().item())


def test_second_derivative_of_the_linear_ops() -> None:
    """Their gradients are plain PyTorch, so gradgradcheck holds."""
    plan = ddpm_fast.ddpm_plan(SCHEDULE, clip=None, variance="learned_range")
    seeds = ddpm_fast.sample_seeds(0, 2)
    x = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    m = torch.randn(2, 4, 2, 2, dtype=torch.float64, requires_grad=True)

    def step(x: Tensor, m: Tensor) -> Tensor:
        result = ddpm_fast.reverse_step(x, m, 700, plan, seeds=seeds, backend="native")
        assert isinstance(result, Tensor)
        return result

    def q_sample(x: Tensor) -> Tensor:
        return ddpm_fast.q_sample(x, 300, SCHEDULE, seeds=seeds, backend="native").square()

    assert torch.autograd.gradcheck(step, (x, m))
    assert torch.autograd.gradgradcheck(step, (x, m))
    assert torch.autograd.gradgradcheck(q_sample, (x,))


def test_gradcheck_of_the_kernels_in_float64() -> None:
    def double(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def norm(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, shift_2: Tensor) -> Tensor:
        return ddpm_fast.group_norm_silu(x, 2, weight, bias, shift=shift, scale_shift=(scale, shift_2), backend="native")

    inputs = (double(2, 4, 3, 3), double(4), double(4), double(2, 4), double(2, 4), double(2, 4))
    assert torch.autograd.gradcheck(norm, inputs)
    assert torch.autograd.gradgradcheck(norm, inputs)

    def loss(m: Tensor, x_0: Tensor, noise: Tensor) -> Tensor:
        return ddpm_fast.denoising_loss(m, x_0, 400, SCHEDULE, prediction="v_prediction", noise=noise, backend="native")

    inputs = (double(2, 1, 3, 3), double(2, 1, 3, 3), double(2, 1, 3, 3))
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_writing_to_out_is_seen_by_autograd(device: torch.device) -> None:
    """A tensor that a graph has saved and `out=` overwrites is an error in backward, not a wrong gradient."""
    plan = ddpm_fast.ddpm_plan(SCHEDULE)
    backends = [name for name in BACKENDS if why_not(name, "reverse_step", device) is None]
    assert "native" in backends
    for name in backends:
        x, w = torch.randn(2, 3, 4, 4, device=device), torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
        y = (x * w).sum()
        with torch.no_grad():
            ddpm_fast.reverse_step(x, x.clone(), 3, plan, seeds=SEEDS, out=x, backend=name)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_a_multistep_step_overwrites_its_state_and_history(device: torch.device) -> None:
    """x_t and x_0_prev are read before x_{t-1} and x_0^ take their memory, eagerly and compiled, on every backend."""
    x, m, x_0, x_1 = torch.randn(4, 2, 3, 5, 4, device=device)
    backends = [name for name in BACKENDS if why_not(name, "reverse_step", device) is None]
    for name, order in itertools.product(backends, (2, 3)):
        plan = ddpm_fast.dpm_solver_plan(SCHEDULE, 10, order=order, eta=1.0)

        def step(x: Tensor, x_0: Tensor, out: Any, name: str = name, order: int = order, plan: Any = plan) -> Any:
            options: dict[str, Any] = {"seeds": SEEDS, "return_x_0": True, "backend": name}
            history = {"x_0_prev": x_0} if order == 2 else {"x_0_prev": x_1, "x_0_prev2": x_0}
            return ddpm_fast.reverse_step(x, m, 4, plan, **history, out=out, **options)

        expected = step(x, x_0, None)
        compiled = torch.compile(step, fullgraph=True, backend="eager")
        for run in (step, compiled):
            state, history = x.clone(), x_0.clone()
            got = run(state, history, (state, history))
            assert [each.data_ptr() for each in got] == [state.data_ptr(), history.data_ptr()]
            assert torch.equal(state, expected[0])
            assert torch.equal(history, expected[1])


def test_a_compiled_step_in_place_takes_plans_of_any_length() -> None:
    x, m = torch.randn(2, 2, 3, 5, 4)

    def step(x: Tensor, plan: ddpm_fast.SamplingPlan) -> Any:
        return ddpm_fast.reverse_step(x, m, 0, plan, seeds=SEEDS, out=torch.empty_like(x))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for count in (4, 6, 8):
        plan = ddpm_fast.ddpm_plan(SCHEDULE, count)
        assert torch.equal(compiled(x, plan), step(x, plan))


def test_two_results_never_share_a_destination() -> None:
    plan = ddpm_fast.dpm_solver_plan(SCHEDULE, 10)
    x, m, x_0 = torch.randn(3, 2, 3, 5, 4)

    def step(x: Tensor) -> Any:
        return ddpm_fast.reverse_step(x, m, 4, plan, x_0_prev=x_0, return_x_0=True, out=(x, x))

    with refused(InvalidValue("reverse_step", "out", "to be two tensors", "one twice")):
        step(x)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="raised exception InvalidValue"):  # torch 2.9 omits its parts
        torch.compile(step, fullgraph=True, backend="eager")(x)


def test_tables_first_used_in_inference_mode_serve_training() -> None:
    schedule, device = ddpm_fast.NoiseSchedule.linear(10), torch.device("meta")
    plan = ddpm_fast.ddpm_plan(schedule)
    with torch.inference_mode():
        tables = schedule._target("x_t", device).table, plan.table(device), plan.steps(device)
    assert not any(table.is_inference() for table in tables)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_expanded_gradients(backend: str, device: torch.device) -> None:
    """The gradient of `sum` is expanded, with strides of 0."""
    if backend == "triton" and torch.cuda.is_available() and device.type == "cpu":
        pytest.skip("beside a GPU Triton's interpreter is off")
    x = torch.randn(2, 8, 5, 3, device=device).contiguous(memory_format=torch.channels_last)
    grads = []
    for name in (backend, "reference"):
        leaf = x.clone().requires_grad_()
        ddpm_fast.group_norm_silu(leaf, 4, backend=name).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)
