"""Destinations of a step, and a NaN of the model, on every backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from op_calls import make_call
from op_cases import CASES, SCHEDULE, Case
from parity import check_overwriting, skip_unless
from refusals import by, refused

from ddpm_fast import SamplingPlan, ddpm_plan, reverse_step, sample_seeds
from ddpm_fast.errors import InvalidValue
from ddpm_fast.ops import BACKENDS

PLAN = ddpm_plan(SCHEDULE)
SEEDS = sample_seeds(0, 2)
DENSE = [case for case in CASES if case.op == "reverse_step" and not (case.benchmark or case.options.get("strided"))]

in_each_backend = pytest.mark.parametrize("backend", BACKENDS)


@in_each_backend
@pytest.mark.parametrize("case", DENSE, ids=str)
def test_a_step_overwrites_its_state_and_history(case: Case, backend: str, device: torch.device) -> None:
    call = make_call(case, device=device)
    skip_unless(backend, call)
    check_overwriting(call, backend)


@in_each_backend
@pytest.mark.parametrize("case", [case for case in DENSE if case.name in ("multistep", "order-3")], ids=str)
def test_a_compiled_step_overwrites_its_state_and_history(case: Case, backend: str, device: torch.device) -> None:
    call = make_call(case, device=device)
    skip_unless(backend, call)
    torch._dynamo.reset()
    check_overwriting(replace(call, function=torch.compile(reverse_step, fullgraph=True, backend="eager")), backend)


def test_a_compiled_step_in_place_takes_plans_of_any_length() -> None:
    x, m = torch.randn(2, 2, 3, 5, 4)

    def step(x: torch.Tensor, plan: SamplingPlan) -> Any:
        return reverse_step(x, m, 0, plan, seeds=SEEDS, out=torch.empty_like(x))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for count in (4, 6, 8):
        plan = ddpm_plan(SCHEDULE, count)
        assert torch.equal(compiled(x, plan), step(x, plan))


def test_two_results_never_share_a_destination() -> None:
    x, m = torch.randn(2, 2, 3, 5, 4)

    def step(x: torch.Tensor) -> Any:
        return reverse_step(x, m, 4, PLAN, seeds=SEEDS, return_x_0=True, out=(x, x))

    with refused(by("reverse_step", InvalidValue("out", "to be two tensors", "one twice"))):
        step(x)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="raised exception InvalidValue"):  # torch 2.9 omits its parts
        torch.compile(step, fullgraph=True, backend="eager")(x)


@in_each_backend
def test_writing_to_out_is_seen_by_autograd(backend: str, device: torch.device) -> None:
    """A tensor that a graph has saved and `out=` overwrites is an error in backward, not a wrong gradient."""
    call = make_call(DENSE[0], device=device)
    skip_unless(backend, call)
    x, w = call.arguments["x_t"], torch.ones(3, 3, 5, 7, device=device, requires_grad=True)
    y = (x * w).sum()
    with torch.no_grad():
        reverse_step(**call.arguments, out=x, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@in_each_backend
def test_a_nan_of_the_model_is_not_clipped(backend: str, device: torch.device) -> None:
    case = Case("reverse_step", "nan", (2, 1, 2, 2), {"plan": PLAN, "return_x_0": True})
    call = make_call(case, device=device)
    skip_unless(backend, call)
    for output in call(backend, model_output=torch.full((2, 1, 2, 2), torch.nan, device=device)):
        assert output.isnan().all()
