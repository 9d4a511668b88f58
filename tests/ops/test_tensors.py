"""Unusual tensors: lazily negated, without memory, overlapping, expanded, or of a layout that no kernel reads.

In eager and compiled code the op computes each correctly, or raises an error that names op and argument. A kernel that reads
freed memory would end the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from op_calls import Call, make_call
from op_cases import CASES, SCHEDULE, Case
from pairwise import covering
from parity import evaluate
from refusals import refused
from torch import Tensor

from ddpm_fast import BackendUnavailable, ddpm_plan, group_norm_silu, noise, q_sample, reverse_step, sample_seeds
from ddpm_fast.errors import InvalidValue

PLAN = ddpm_plan(SCHEDULE)
SMALL = [
    case
    for case in CASES
    if not case.benchmark and torch.Size(case.shape).numel() > 0 and make_call(case).tensors and not case.options.get("uint8")
]
# The cases of an op that between them give every tensor argument, and each argument with the first case that gives it.
FULLEST: list[Case] = []
ARGUMENTS: list[tuple[Case, str]] = []
# v's target has both x_0 and the noise.
for _case in sorted(SMALL, key=lambda case: (-len(make_call(case).tensors), case.options.get("prediction") != "v_prediction")):
    _known = {(case.op, name) for case, name in ARGUMENTS}
    _new = [(_case, name) for name in make_call(_case).tensors if (_case.op, name) not in _known]
    ARGUMENTS += _new
    FULLEST += [_case] if _new else []


def _eager(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager")


MODES = {"eager": _eager, "compiled": _compiled}


def parameters(cases: Any, *others: Any, quick: Callable[..., bool] | None = None) -> Iterator[Any]:
    """Yield every row with `--full`, otherwise rows that hold every pair of values.

    Rows for which `quick` returns False are marked as slow.
    """
    for row in covering([(case, *rest) for case in cases for rest in _product(*others)]):
        values = [value for part in row for value in (part if isinstance(part, tuple) else (part,))]
        marks = () if quick is None or quick(*values) else pytest.mark.slow
        yield pytest.param(*values, id="-".join(str(value).replace(" ", "-") for value in values), marks=marks)


def is_quick_mode(case: Case, name: str, mode: str) -> bool:
    """Return whether the mode is eager, or the argument is the first of group_norm_silu. Compilation takes long."""
    is_first = name == next(other for one, other in ARGUMENTS if one.op == case.op)
    return mode == "eager" or (case.op == "group_norm_silu" and is_first)


def is_quick_backend(case: Case, backend: str) -> bool:
    """Return whether the backend is not Triton, or the case is q_sample's smallest. Triton's interpreter takes long."""
    smallest = min((one for one in SMALL if one.op == "q_sample"), key=lambda one: torch.Size(one.shape).numel())
    return backend != "triton" or case == smallest


def _product(*values: Any) -> Iterator[tuple[Any, ...]]:
    if not values:
        yield ()
        return
    for value in values[0]:
        for rest in _product(*values[1:]):
            yield (value, *rest)


def with_argument(call: Call, name: str, value: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function of the backend that makes the call with one floating input replaced."""
    base, is_part, index = name.partition(".")
    replaced: Any = value
    if is_part:
        replaced = tuple(value if i == int(index) else part for i, part in enumerate(call.arguments[base]))
    arguments = call.arguments | {base: replaced}

    def run(backend: str | None = None) -> tuple[Tensor, ...]:
        result = call.function(**arguments, backend=backend)
        return result if isinstance(result, tuple) else (result,)

    return run


def said(name: str) -> str:
    """Return an argument as error messages write it: `scale_shift.0` of a case is `scale_shift[0]`."""
    base, dot, index = name.partition(".")
    return rf"{base}\[{index}\]" if dot else base


def skip_unless(backend: str, call: Call) -> None:
    """Skip the test if a backend cannot run the call. `test_parity` fails if one that should be there is not."""
    try:
        call(backend)
    except BackendUnavailable as error:
        pytest.skip(str(error))


# -------------------------------------------------------------------------------------------------------- negative and conj


def negated(x: Tensor) -> Tensor:
    """Return x as a view that negates when it is read, with x's strides."""
    y = torch._neg_view(-x)
    assert y.is_neg()
    return y


@pytest.mark.parametrize(
    ("case", "backend"), list(parameters(SMALL, ["native", "triton", "reference"], quick=is_quick_backend))
)
def test_lazily_negated_inputs(case: Case, backend: str) -> None:
    call = make_call(case)
    skip_unless(backend, call)
    got, expected = evaluate(call, backend, negated), evaluate(call, backend)
    for a, b in zip((*got.outputs, *got.grads.values()), (*expected.outputs, *expected.grads.values()), strict=True):
        assert not a.is_neg()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("case", "name", "mode"), list(parameters(ARGUMENTS, MODES, quick=is_quick_mode)))
def test_one_lazily_negated_input(case: Case, name: str, mode: str) -> None:
    call = make_call(case)

    def run(value: Tensor) -> tuple[Tensor, ...]:
        return with_argument(call, name, value)()

    for got, expected in zip(MODES[mode](run)(negated(call.tensors[name])), call(), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("mode", MODES)
def test_the_imaginary_part_of_a_conjugate(mode: str) -> None:
    x = torch.view_as_complex(torch.ones(1, 1, 1, 1, 2)).conj().imag
    assert x.is_neg()
    run = MODES[mode](lambda x: q_sample(x, 0, SCHEDULE, noise=torch.zeros(1, 1, 1, 1)))
    torch.testing.assert_close(run(x), -q_sample(torch.ones(1, 1, 1, 1), 0, SCHEDULE, noise=torch.zeros(1, 1, 1, 1)))


def test_lazily_negated_gradients() -> None:
    for case in FULLEST:
        call = make_call(case).map(lambda x: x.detach().clone().requires_grad_())
        (output, *_), inputs = call(), list(call.tensors.values())
        grad = torch.randn_like(output)
        got, expected = (
            torch.autograd.grad(output, inputs, g, retain_graph=True, allow_unused=True, materialize_grads=True)
            for g in (negated(grad), grad)
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_lazily_negated_seeds_and_timesteps() -> None:
    x, t, seeds = torch.randn(2, 3, 4, 4), torch.tensor([3, 900]), sample_seeds(0, 2)
    assert torch.equal(q_sample(x, negated(t), SCHEDULE, seeds=negated(seeds)), q_sample(x, t, SCHEDULE, seeds=seeds))
    assert torch.equal(noise((2, 5), negated(seeds)), noise((2, 5), seeds))
    got = reverse_step(x, x, negated(t), PLAN, seeds=negated(seeds))
    assert torch.equal(got, reverse_step(x, x, t, PLAN, seeds=seeds))


def test_a_lazily_negated_out_is_refused() -> None:
    x, seeds = torch.randn(2, 3, 4, 4), sample_seeds(0, 2)
    out = torch._neg_view(torch.zeros(2, 3, 4, 4))
    error = InvalidValue("reverse_step", "out", "to be a tensor without lazy negation", "one: pass out.resolve_neg()")
    for backend in ("native", "reference"):
        with refused(error):
            reverse_step(x, x, 3, PLAN, seeds=seeds, out=out, backend=backend)


# ---------------------------------------------------------------------------------------------------------- without memory


def freed(x: Tensor) -> Tensor:
    """Return a tensor of x's shape whose memory was freed, as sharded training does between layers."""
    y = x.detach().clone()
    y.untyped_storage().resize_(0)
    assert y.data_ptr() == 0
    return y


@pytest.mark.parametrize(
    ("case", "name", "mode"),
    list(parameters([(c, n) for c, n in ARGUMENTS if (c.op, n) != ("denoising_loss", "weight")], MODES, quick=is_quick_mode)),
)
def test_a_freed_input_is_refused(case: Case, name: str, mode: str) -> None:
    call = make_call(case)
    skip_unless("native", call)

    def run(value: Tensor) -> tuple[Tensor, ...]:
        return with_argument(call, name, value)("native")

    kind: type[Exception] = ValueError if mode == "eager" else Exception  # the compiler wraps some
    # The kernels' name of scale_shift[0] is scale.
    kernel_s = {"scale_shift.0": "scale", "scale_shift.1": "scale_shift"}.get(name, name)
    with pytest.raises(kind, match=f"{case.op}: expected {kernel_s} to have memory"):
        MODES[mode](run)(freed(call.tensors[name]))


def test_other_freed_tensors_are_refused() -> None:
    x, seeds = torch.randn(2, 3, 4, 4), sample_seeds(0, 2)
    t = torch.tensor([3, 900])
    for name, call in {
        "seeds": lambda: noise((2, 4), freed(seeds), backend="native"),
        "out": lambda: reverse_step(x, x, 3, PLAN, seeds=seeds, out=freed(x), backend="native"),
        "step": lambda: reverse_step(x, x, freed(t), PLAN, seeds=seeds, backend="native"),
    }.items():
        with pytest.raises(ValueError, match=f"expected {name} to have memory"):
            call()


def test_a_freed_gradient_is_refused() -> None:
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    y = group_norm_silu(x, 2, backend="native")
    with pytest.raises(ValueError, match=r"group_norm_silu.*: expected .* to have memory"):
        torch.autograd.grad(y, x, freed(y))


@pytest.mark.parametrize(("case", "name", "mode"), list(parameters(ARGUMENTS, MODES, quick=is_quick_mode)))
def test_a_zero_tensor_is_right_or_refused(case: Case, name: str, mode: str) -> None:
    """Autograd's own zeros have no memory either."""
    call = make_call(case)
    value = call.tensors[name]

    def run(value: Tensor) -> tuple[Tensor, ...]:
        return with_argument(call, name, value)()

    expected = run(torch.zeros_like(value))
    try:
        outputs = MODES[mode](run)(torch._efficientzerotensor(value.shape, dtype=value.dtype))
    except Exception as error:
        if f"{case.op}: expected " not in str(error) or " to have memory" not in str(error):
            raise
    else:
        for got, wanted in zip(outputs, expected, strict=True):
            torch.testing.assert_close(got, wanted)


def test_a_zero_gradient_is_right_or_refused() -> None:
    for case in FULLEST:
        call = make_call(case).map(lambda x: x.detach().clone().requires_grad_())
        (output, *_), inputs = call(), list(call.tensors.values())
        try:
            grads = torch.autograd.grad(output, inputs, torch._efficientzerotensor(output.shape), allow_unused=True)
        except ValueError as error:
            assert " to have memory" in str(error)  # noqa: PT017 (zeros are as good)
        else:
            assert not any(grad is not None and grad.any() for grad in grads)


# ------------------------------------------------------------------------------------------------------------------ overlap


def overlapping_calls() -> dict[str, Callable[[Tensor], Tensor]]:
    """Return calls with out= one sample further in memory than an input, by the input's name."""
    x, seeds, plan = torch.randn(3, 4, 5, 5), sample_seeds(0, 3), PLAN
    return {
        "x_t": lambda b: reverse_step(b[:3], x, 3, plan, seeds=seeds, out=b[1:4]),
        "model_output": lambda b: reverse_step(x, b[:3], 3, plan, seeds=seeds, out=b[1:4]),
        "noise": lambda b: reverse_step(x, x, 3, plan, noise=b[:3], out=b[1:4]),
    }


@pytest.mark.parametrize("mode", ["eager", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("compiled", "inductor"))])
@pytest.mark.parametrize("name", overlapping_calls())
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # inductor's own imports
def test_a_partial_overlap_is_refused_or_right(name: str, mode: str) -> None:
    call, memory = overlapping_calls()[name], torch.randn(8, 4, 5, 5)
    apart = torch.cat([memory[:3], memory[:3]])  # the input again, in memory apart from out
    expected = _without_overlap(call, apart)
    torch._dynamo.reset()
    run = torch.compile(call) if mode == "inductor" else MODES[mode](call)
    message = f"reverse_step: expected out to be {name} itself or apart from it in memory, got a partial overlap"
    if mode == "eager":
        with pytest.raises(ValueError, match=message):
            run(memory)
        return
    try:
        got = run(memory)
    except Exception as error:
        if f"to be {name} itself or apart from it in memory" not in str(error):  # the compiler quotes the error's parts
            raise
    else:
        torch.testing.assert_close(got, expected)


def _without_overlap(call: Callable[[Tensor], Tensor], memory: Tensor) -> Tensor:
    """Return the call's result with copies for inputs: slices of this tensor do not share memory."""

    class Copies:
        def __getitem__(self, index: slice) -> Tensor:
            return memory[:3].clone()

    return call(Copies())  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
def test_out_may_be_the_input_itself(mode: str) -> None:
    x, m, seeds = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5), sample_seeds(0, 3)
    expected = reverse_step(x, m, 3, PLAN, seeds=seeds)
    run = MODES[mode](lambda x: reverse_step(x, m, 3, PLAN, seeds=seeds, out=x))
    assert torch.equal(run(x), expected)
    assert torch.equal(x, expected)


def test_an_expanded_out_is_refused() -> None:
    x, seeds = torch.randn(2, 3, 4, 4), sample_seeds(0, 2)
    with refused(InvalidValue("reverse_step", "out", "to be dense, with the strides of x_t, (48, 16, 4, 1)", "(0, 16, 4, 1)")):
        reverse_step(x, x, 3, PLAN, seeds=seeds, out=torch.empty(1, 3, 4, 4).expand(2, 3, 4, 4))


# ------------------------------------------------------------------------------------------------------ layouts without kernels


def _sparse(x: Tensor) -> Tensor:
    return x.to_sparse()


def _nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(x))


def _mkldnn(x: Tensor) -> Tensor:
    return x.to_mkldnn()


# Kind of tensor -> function that makes one.
ODD: dict[str, Callable[[Tensor], Tensor]] = {"sparse": _sparse, "nested": _nested, "mkldnn": _mkldnn}


@pytest.mark.parametrize(("case", "name", "kind"), list(parameters(ARGUMENTS, ODD)))
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_a_tensor_that_is_not_dense_is_refused(case: Case, name: str, kind: str) -> None:
    call = make_call(case)
    odd = ODD[kind](call.tensors[name])
    with pytest.raises((TypeError, ValueError), match=f"{case.op}: expected {said(name)} to be a dense tensor, got "):
        call_with_odd(call, name, odd)


def call_with_odd(call: Call, name: str, value: Tensor) -> Any:
    """Run the call with any object as one input. `Call.map` asks tensors for their dtype, so it is not used."""
    base, dot, index = name.partition(".")
    arguments = dict(call.arguments)
    if dot:
        parts = list(arguments[base])
        parts[int(index)] = value
        arguments[base] = tuple(parts)
    else:
        arguments[base] = value
    return call.function(**arguments)


def test_other_tensors_that_are_not_dense_are_refused() -> None:
    x, t, seeds = torch.randn(2, 3, 4, 4), torch.tensor([3, 900]), sample_seeds(0, 2)
    for message, call in {
        "noise: expected seeds to be a dense tensor": lambda: noise((2, 4), seeds.to_sparse()),
        "q_sample: expected t to be a dense tensor": lambda: q_sample(x, t.to_sparse(), SCHEDULE, seeds=seeds),
        "reverse_step: expected step to be a dense tensor": lambda: reverse_step(x, x, t.to_sparse(), PLAN, seeds=seeds),
        "reverse_step: expected out to be ": lambda: reverse_step(x, x, 3, PLAN, seeds=seeds, out=x.to_sparse()),
    }.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()


@pytest.mark.parametrize(("case", "name", "mode"), list(parameters(ARGUMENTS, MODES, quick=is_quick_mode)))
def test_a_complex_tensor_is_refused(case: Case, name: str, mode: str) -> None:
    call = make_call(case)
    x = torch.complex(call.tensors[name], call.tensors[name]).conj()
    kind: type[Exception] = TypeError if mode == "eager" else Exception  # the compiler wraps some
    with pytest.raises(kind, match=f"{case.op}: expected {said(name)} to .*got torch.complex64"):
        MODES[mode](lambda x: call_with_odd(call, name, x))(x)


# ------------------------------------------------------------------------------------------------------- strided and expanded


def every_other(x: Tensor) -> Tensor:
    """Return x with steps of two in every dimension."""
    wide = x.new_zeros([2 * size for size in x.shape])
    y = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    return y.copy_(x)


def permuted(x: Tensor) -> Tensor:
    """Return x with its dimensions in reverse order in memory."""
    order = tuple(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def offset(x: Tensor) -> Tensor:
    """Return x from the second element of its memory on."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"every-other": every_other, "permuted": permuted, "offset": offset}


@pytest.mark.parametrize(
    ("case", "layout", "backend"),
    list(
        parameters(
            *(FULLEST, LAYOUTS, ["native", "triton", "reference"]),
            quick=lambda case, layout, backend: (case.op, backend) != ("group_norm_silu", "triton"),
        )
    ),
)
def test_strided_inputs(case: Case, layout: str, backend: str) -> None:
    call = make_call(case)
    skip_unless(backend, call)
    got, expected = evaluate(call, backend, LAYOUTS[layout]), evaluate(call, backend, lambda x: x.clone().contiguous())
    for a, b in zip((*got.outputs, *got.grads.values()), (*expected.outputs, *expected.grads.values()), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("case", "name", "mode"), list(parameters(ARGUMENTS, MODES, quick=is_quick_mode)))
def test_an_expanded_input(case: Case, name: str, mode: str) -> None:
    call = make_call(case)
    one = call.tensors[name][:1]

    def run(one: Tensor) -> tuple[Tensor, ...]:
        return with_argument(call, name, one.expand(call.tensors[name].shape))()

    expected = with_argument(call, name, one.expand(call.tensors[name].shape).clone())()
    for got, wanted in zip(MODES[mode](run)(one), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_an_expanded_gradient() -> None:
    """The gradient of `sum` has strides of 0."""
    for case in FULLEST:
        call = make_call(case).map(lambda x: x.detach().clone().requires_grad_())
        (output, *_), inputs = call(), list(call.tensors.values())
        grad = torch.ones(()).to(output.dtype).expand(output.shape)
        got, expected = (
            torch.autograd.grad(output, inputs, g, retain_graph=True, allow_unused=True, materialize_grads=True)
            for g in (grad, grad.contiguous())
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
