"""Unusual tensors: lazily negated, without memory, overlapping, expanded, or of a layout that no kernel reads.

In eager and compiled code the op computes each correctly, or raises an error that names op and argument. A kernel that reads
freed memory would end the process. `test_errors.py` has other arguments than floating inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernel_calls import MATRIX_OPS
from op_calls import freed, make_call, unaligned
from op_cases import CASES, SCHEDULE, Case
from parity import evaluate, skip_unless
from torch import Tensor

from ddpm_fast import ddpm_plan, noise, q_sample, reverse_step, sample_seeds

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
BY_TRITON = [case for case in FULLEST if case.op not in MATRIX_OPS]
SMALLEST_NORM = next(case for case in SMALL if case.op == "group_norm_silu")


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager")


MODES: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {"eager": lambda function: function}
MODES["compiled"] = _compiled


def parameters(*values: Any, quick: Callable[..., bool]) -> Iterator[Any]:
    """Yield the product. Rows for which `quick` returns False are marked as slow."""
    for case, *rest in itertools.product(*values):
        row = [*(case if isinstance(case, tuple) else (case,)), *rest]
        marks = () if quick(*row) else pytest.mark.slow
        yield pytest.param(*row, id="-".join(str(value).replace(" ", "-") for value in row), marks=marks)


def is_quick_mode(case: Case, name: str, *others: str) -> bool:
    """Return whether the mode is eager, or the argument is the first of group_norm_silu. Compilation takes long."""
    is_first = name == next(other for one, other in ARGUMENTS if one.op == case.op)
    return others[-1] == "eager" or (case.op == "group_norm_silu" and is_first)


# ------------------------------------------------------------------------------------------------------------ read correctly


def negated(x: Tensor) -> Tensor:
    """Return x as a view that negates when it is read, with x's strides."""
    y = torch._neg_view(-x)
    assert y.is_neg()
    return y


def expanded(x: Tensor) -> Tensor:
    """Return the first of x in place of all others, with strides of 0."""
    return x[:1].expand(x.shape)


def every_other(x: Tensor) -> Tensor:
    """Return x with steps of two in every dimension."""
    wide = x.new_zeros([2 * size for size in x.shape])
    y = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    return y.copy_(x)


def permuted(x: Tensor) -> Tensor:
    """Return x with its dimensions in reverse order in memory."""
    order = tuple(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


KINDS = {"negated": negated, "expanded": expanded, "every-other": every_other, "permuted": permuted, "offset": unaligned}


def assert_close(got: Any, expected: Any) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def is_quick_backend(case: Case, kind: str, backend: str) -> bool:
    """Return whether the case is quick. Triton's interpreter takes long."""
    return (case.op, backend) != ("group_norm_silu", "triton")


@pytest.mark.parametrize(
    ("case", "kind", "backend"),
    [
        *parameters(FULLEST, KINDS, ["native"], quick=is_quick_backend),
        *parameters(FULLEST, KINDS, ["reference"], quick=is_quick_backend),
        *parameters(BY_TRITON, KINDS, ["triton"], quick=is_quick_backend),
    ],
)
def test_unusual_inputs_are_read_and_have_gradients(case: Case, kind: str, backend: str) -> None:
    call = make_call(case)
    skip_unless(backend, call)
    usual = call.map(lambda x: KINDS[kind](x).resolve_neg().clone(memory_format=torch.contiguous_format))
    got, expected = evaluate(call, backend, KINDS[kind]), evaluate(usual, backend)
    assert not any(value.is_neg() for value in got.named.values())
    assert_close(got.named.values(), expected.named.values())


@pytest.mark.parametrize(
    ("case", "name", "kind", "mode"),
    [row for mode in MODES for row in parameters(ARGUMENTS, ["negated", "expanded"], [mode], quick=is_quick_mode)],
)
def test_one_unusual_input_is_read(case: Case, name: str, kind: str, mode: str) -> None:
    call = make_call(case)
    value = KINDS[kind](call.tensors[name])
    run = MODES[mode](lambda value: call(**call.changed(name, value)))
    assert_close(run(value), call(**call.changed(name, value.resolve_neg().clone())))


@pytest.mark.parametrize("kind", ["negated", "expanded"])  # the gradient of `sum` is expanded
@pytest.mark.parametrize(
    ("case", "backend"), [*itertools.product(FULLEST, ["native", "reference"]), (SMALLEST_NORM, "triton")], ids=str
)
def test_an_unusual_gradient_is_read(case: Case, backend: str, kind: str) -> None:
    call = make_call(case).map(lambda x: x.detach().clone().requires_grad_())
    skip_unless(backend, call)
    (output, *_), inputs = call(backend), list(call.tensors.values())
    grad = KINDS[kind](torch.randn_like(output)[None])[0] if output.dim() == 0 else KINDS[kind](torch.randn_like(output))
    got, expected = (
        torch.autograd.grad(output, inputs, each, retain_graph=True, allow_unused=True, materialize_grads=True)
        for each in (grad, grad.resolve_neg().clone(memory_format=torch.contiguous_format))
    )
    assert_close(got, expected)


def test_lazily_negated_seeds_and_timesteps() -> None:
    x, t, seeds = torch.randn(2, 3, 4, 4), torch.tensor([3, 900]), sample_seeds(0, 2)
    assert torch.equal(q_sample(x, negated(t), SCHEDULE, seeds=negated(seeds)), q_sample(x, t, SCHEDULE, seeds=seeds))
    assert torch.equal(noise((2, 5), negated(seeds)), noise((2, 5), seeds))
    got = reverse_step(x, x, negated(t), PLAN, seeds=negated(seeds))
    assert torch.equal(got, reverse_step(x, x, t, PLAN, seeds=seeds))


# ------------------------------------------------------------------------------------------------------------------- refused


# Kind of tensor -> function that makes one, and what the error says of it.
REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sparse": (lambda x: x.to_sparse(), "to be a dense tensor, got "),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), "to be a dense tensor, got "),
    "mkldnn": (lambda x: x.to_mkldnn(), "to be a dense tensor, got "),
    "complex": (lambda x: torch.complex(x, x).conj(), "to .*got torch.complex64"),
    "freed": (freed, "to have memory"),
}
# Names of the public function, and of the kernels.
SAID = {"scale_shift.0": r"(scale_shift\[0\]|scale)", "scale_shift.1": r"(scale_shift\[1\]|scale_shift)"}


@pytest.mark.parametrize(
    ("case", "name", "kind", "mode"),
    [
        *parameters(ARGUMENTS, ["sparse", "nested", "mkldnn"], ["eager"], quick=is_quick_mode),
        *parameters(ARGUMENTS, ["complex"], MODES, quick=is_quick_mode),
        # PyTorch multiplies losses by their weight.
        *parameters(
            [row for row in ARGUMENTS if row[1:] != ("weight",) or row[0].op != "denoising_loss"],
            ["freed"],
            MODES,
            quick=is_quick_mode,
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.usefixtures("matrix_kernels")
def test_an_input_that_kernels_cannot_read_is_refused(case: Case, name: str, kind: str, mode: str) -> None:
    call, (make, message) = make_call(case), REFUSED[kind]
    backend = "native" if kind == "freed" else "reference"
    skip_unless(backend, call)
    # The compiler wraps some errors.
    kinds: tuple[type[Exception], ...] = (TypeError, ValueError) if mode == "eager" else (Exception,)
    with pytest.raises(kinds, match=f"{case.op}: expected {SAID.get(name, name)} {message}"):
        MODES[mode](lambda value: call(backend, **call.changed(name, value)))(make(call.tensors[name]))


@pytest.mark.parametrize(("case", "name", "mode"), list(parameters(ARGUMENTS, MODES, quick=is_quick_mode)))
def test_a_zero_tensor_is_right_or_refused(case: Case, name: str, mode: str) -> None:
    """Autograd's own zeros have no memory either."""
    call = make_call(case)
    value = call.tensors[name]
    run = MODES[mode](lambda value: call(**call.changed(name, value)))
    try:
        outputs = run(torch._efficientzerotensor(value.shape, dtype=value.dtype))
    except Exception as error:
        if f"{case.op}: expected " not in str(error) or " to have memory" not in str(error):
            raise
    else:
        assert_close(outputs, call(**call.changed(name, torch.zeros_like(value))))


@pytest.mark.parametrize("case", FULLEST, ids=str)
def test_a_zero_gradient_is_right_or_refused(case: Case) -> None:
    call = make_call(case).map(lambda x: x.detach().clone().requires_grad_())
    (output, *_), inputs = call(), list(call.tensors.values())
    try:
        grads = torch.autograd.grad(output, inputs, torch._efficientzerotensor(output.shape), allow_unused=True)
    except ValueError as error:
        assert " to have memory" in str(error)  # noqa: PT017 (zeros are as good)
    else:
        assert not any(grad is not None and grad.any() for grad in grads)


# Inputs by the name that errors have for them -> a step that reads one, and writes to memory one sample further.
X, SEEDS = torch.randn(3, 4, 5, 5), sample_seeds(0, 3)
OVERLAPPING: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "x_t": lambda read, out: reverse_step(read, X, 3, PLAN, seeds=SEEDS, out=out),
    "model_output": lambda read, out: reverse_step(X, read, 3, PLAN, seeds=SEEDS, out=out),
    "noise": lambda read, out: reverse_step(X, X, 3, PLAN, noise=read, out=out),
}


@pytest.mark.slow  # test_errors.py has them in eager mode
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", OVERLAPPING)
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # inductor's own imports
def test_a_partial_overlap_in_compiled_code_is_refused_or_right(name: str, compiler: str) -> None:
    memory, step = torch.randn(8, 4, 5, 5), OVERLAPPING[name]
    expected = step(memory[:3].clone(), torch.empty(3, 4, 5, 5))
    torch._dynamo.reset()
    try:
        got = torch.compile(lambda memory: step(memory[:3], memory[1:4]), backend=compiler)(memory)
    except Exception as error:
        if f"to be {name} itself or apart from it in memory" not in str(error):  # the compiler quotes the error's parts
            raise
    else:
        torch.testing.assert_close(got, expected)
