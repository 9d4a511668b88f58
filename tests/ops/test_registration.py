"""torch.library's view of the ops: opcheck, compilation without graph breaks or recompiles, second derivatives."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import ddpm_fast
from ddpm_fast.ops.backend import OPS
from ddpm_fast.testing import CASES, Case, make_call

OPCHECKED = [
    case
    for case in CASES
    if not case.benchmark and case.name in ("odd-sizes", "ddpm-clip", "guidance", "learned-range-guidance", "scale-shift", "epsilon", "v_prediction-given-noise")
]


def _recorded(case: Case, channels_last: bool) -> list[tuple[Any, tuple[Any, ...]]]:
    """The torch.ops calls that a case makes, forward and backward, with their arguments."""
    calls = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "ddpm_fast":
                calls.append((function, args))
            return function(*args, **(kwargs or {}))

    call = make_call(case, channels_last=channels_last).map(lambda x: x.detach().clone().requires_grad_())
    with Recorder():
        outputs = call("native")
        if call.tensors:
            sum(output.double().sum() for output in outputs).backward()
    return calls


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck(case: Case, channels_last: bool) -> None:
    calls = _recorded(case, channels_last)
    assert calls
    for function, args in calls:
        backward = "backward" in function._schema.name
        args = tuple(a.detach().requires_grad_(a.is_floating_point() and not backward) if isinstance(a, torch.Tensor) else a for a in args)
        args = tuple(a.detach() if i == 2 and "table" in function._schema.arguments[i].name else a for i, a in enumerate(args))
        torch.library.opcheck(function, args)
