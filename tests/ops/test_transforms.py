"""Every differentiable op inside torch.func transforms and forward mode, where the reference computes, eager and compiled.

A kernel has no forward derivative, so a wrong dispatch shows as a tangent of 0. Each test compares with two backward
passes of the reference in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from op_calls import make_call
from op_cases import CASES, SCHEDULE, Case
from parameters import parametrize
from parity import skip_unless
from torch import Tensor, func
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import ddpm_fast
from ddpm_fast import q_sample

# Cases of a few hundred elements. uint8 images have no gradient, and an empty batch has nothing to compare.
CASES_BY_OP: dict[str, list[Case]] = {
    op: list(cases)
    for op, cases in itertools.groupby(
        (
            case
            for case in CASES
            if case.op != "noise"
            and not case.benchmark
            and not case.options.get("uint8")
            and torch.Size(case.shape).numel() > 0
        ),
        key=lambda case: case.op,
    )
}

pytestmark = [
    # torch imports its own deprecated function for forward mode.
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
    pytest.mark.skipif(torch.__version__ < "2.10", reason="torch 2.9 reads no numbers inside torch.func"),
]

Function = Callable[[Tensor], Tensor]


def function_of_two(case: Case, backend: str | None, dtype: torch.dtype = torch.float64) -> Function:
    """Return a function of s [2] that moves every floating input of the case, and returns a vector of 3.

    Two numbers keep Jacobians and Hessians small, and every tensor of the call has a tangent.
    """
    call = make_call(case, dtype)
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = list(call.tensors.values())
    directions = [(normal(*x.shape), normal(*x.shape)) for x in inputs]
    with torch.no_grad():
        cotangents = [normal(3, *output.shape) for output in call("reference")]

    def function(s: Tensor) -> Tensor:
        moved = iter([x + (s[0] * u + s[1] * v).to(x.dtype) for x, (u, v) in zip(inputs, directions, strict=True)])
        outputs = call.map(lambda _: next(moved))(backend)
        parts = [(c * (y + y.square())).reshape(3, -1).sum(1) for y, c in zip(outputs, cotangents, strict=True)]
        return torch.stack(parts).sum(0)

    return function


S, V = torch.tensor([0.1, -0.2], dtype=torch.float64), torch.tensor([1.5, 0.5], dtype=torch.float64)


def _jvp(f: Function) -> Function:
    return lambda s: func.jvp(f, (s,), (V.to(s.dtype),))[1]


def _dual_level(f: Function) -> Function:
    def tangent(s: Tensor) -> Tensor:
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(s, V.to(s.dtype)))).tangent
        assert tangent is not None, "expected a tangent, got None"
        return tangent

    return tangent


TRANSFORMS: dict[str, Callable[[Function], Function]] = {
    "jvp": _jvp,
    "dual_level": _dual_level,
    "jacfwd": func.jacfwd,
    "jacrev": func.jacrev,
    "grad": lambda f: func.grad(lambda s: f(s).sum()),
    "hessian": lambda f: func.hessian(lambda s: f(s).sum()),
    "vmap": lambda f: func.vmap(lambda v: f(S.to(v.dtype) + v)),
    "vmap of grad": lambda f: func.vmap(func.grad(lambda s: f(s).sum())),
}


def argument(transform: str) -> Tensor:
    return torch.stack([S, V, S - V]) if transform.startswith("vmap") else S


@sdpa_kernel(SDPBackend.MATH)  # the other attentions of PyTorch have first derivatives alone
def expected_of(case: Case, transform: str) -> Tensor:
    """Return the right value, from the reference and backward passes alone."""
    f = function_of_two(case, "reference")
    rows = argument(transform)
    if transform == "vmap":
        return torch.stack([f(S + row) for row in rows])
    if transform == "hessian":
        return torch.autograd.functional.hessian(lambda s: f(s).sum(), S)
    if transform == "vmap of grad":
        return torch.stack([torch.autograd.functional.jacobian(f, row).sum(0) for row in rows])
    jacobian = torch.autograd.functional.jacobian(f, S)
    return {"jvp": jacobian @ V, "dual_level": jacobian @ V, "grad": jacobian.sum(0)}.get(transform, jacobian)


def assert_right(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.to(found.dtype))
    assert expected.abs().max() > 0, "the case tells a right value from 0"


def compiled(f: Function) -> Function:
    torch._dynamo.reset()
    return torch.compile(f, backend="aot_eager")


def rows(transforms: Sequence[str], *others: Any, share: int = 1, each: int | None = None) -> Iterator[Any]:
    """Yield parameters: each op with each transform, its cases in turn, then the cases that are left out.

    Args:
        transforms: The names of transforms.
        others: Further values of each row.
        share: Only one row in `share` is not marked as slow. Each op has such rows, and together they have all transforms.
        each: Least number of transforms of a case. None is all. Compiling takes long, so it has few there.
    """
    for number, cases in enumerate(CASES_BY_OP.values()):
        pairs = list(zip(itertools.cycle(range(len(cases))), transforms))
        turns = itertools.cycle(transforms)
        pairs += [(i, next(turns)) for i in range(len(cases)) for _ in range(each or len(transforms))]
        for row, (i, transform) in enumerate(dict.fromkeys(pairs)):
            slow = (row + number) % share != 0
            yield pytest.param(cases[i], transform, *others, marks=pytest.mark.slow if slow else ())


def _id(value: Any) -> str:
    return str(getattr(value, "__name__", value)).replace(" ", "-")


@pytest.mark.parametrize(("case", "transform"), list(rows(list(TRANSFORMS))), ids=_id)
def test_eager(case: Case, transform: str) -> None:
    found = TRANSFORMS[transform](function_of_two(case, None))(argument(transform))
    assert_right(found, expected_of(case, transform))


def inside(transform: str, f: Function) -> Function:
    return compiled(TRANSFORMS[transform](f))


def around(transform: str, f: Function) -> Function:
    """Return a transform of a compiled function. The compiler does not see the transform."""
    return TRANSFORMS[transform](compiled(f))


@pytest.mark.parametrize(
    ("case", "transform", "place"),
    [
        *rows(list(TRANSFORMS), inside, share=7, each=3),
        *rows(("jvp", "dual_level", "grad", "vmap"), around, share=2, each=1),
    ],
    ids=_id,
)
def test_compiled(case: Case, transform: str, place: Callable[[str, Function], Function]) -> None:
    run = partial(place(transform, function_of_two(case, None)), argument(transform))
    found = right_or_refused(run, case.op, 'backend="reference"')  # the way out
    if found is not None:
        assert_right(found, expected_of(case, transform))


def right_or_refused(run: Callable[[], Tensor], *words: str) -> Tensor | None:
    """Return the result, or None for an error that has the words."""
    try:
        return run()
    except Exception as error:
        if not all(word in str(error) for word in words):
            raise
        return None


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(cases[i], name, id=f"{cases[i]}-{name}")
        for cases in CASES_BY_OP.values()
        for i in range(len(cases))
        for name in make_call(cases[i]).tensors
    ],
)
def test_forward_mode_in_one_argument(case: Case, name: str) -> None:
    """A tangent of one argument is enough to select the reference."""
    call = make_call(case, torch.float64)
    x = call.tensors[name]
    tangent = torch.randn(x.shape, dtype=torch.float64).to(x.dtype)

    def function(value: Tensor, backend: str | None = None) -> tuple[Tensor, ...]:
        return call(backend, **call.changed(name, value))

    with sdpa_kernel(SDPBackend.MATH):  # the other attentions of PyTorch have first derivatives alone
        _, expected = torch.autograd.functional.jvp(partial(function, backend="reference"), x, tangent)
    _, found = func.jvp(function, (x,), (tangent,))
    torch.testing.assert_close(found, expected)


@parametrize(backend=["native", "triton"], transform=list(TRANSFORMS), op=list(CASES_BY_OP))
def test_a_named_kernel_is_refused(backend: str, transform: str, op: str) -> None:
    case = CASES_BY_OP[op][0]
    skip_unless(backend, make_call(case))
    f = TRANSFORMS[transform](function_of_two(case, backend, torch.float32))
    with pytest.raises(ddpm_fast.BackendUnavailable, match=f'{op}: backend "{backend}" cannot run: '):
        f(argument(transform).float())


@pytest.mark.parametrize(("case", "transform"), list(rows(("jvp", "grad", "vmap"), share=3, each=1)), ids=_id)
def test_a_named_kernel_is_refused_or_right_in_compiled_code(case: Case, transform: str) -> None:
    skip_unless("native", make_call(case))
    run = partial(inside(transform, function_of_two(case, "native", torch.float32)), argument(transform).float())
    found = right_or_refused(run, f'{case.op}: backend "native" cannot run: ')
    if found is not None:
        expected = expected_of(case, transform)
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_vmap_over_timesteps() -> None:
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    t = torch.tensor([[3, 0, 19], [19, 0, 3]])
    found = func.vmap(lambda t: q_sample(x, t, SCHEDULE, noise=x))(t)
    torch.testing.assert_close(found, torch.stack([q_sample(x, one, SCHEDULE, noise=x) for one in t]))
