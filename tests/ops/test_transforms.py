"""Every differentiable op inside transforms of torch.func and forward-mode differentiation: there its definition serves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddpm_fast import NoiseSchedule, ddpm_plan, denoising_loss, group_norm_silu, q_sample, reverse_step, sample_seeds

SCHEDULE = NoiseSchedule.linear(20)
PLAN = ddpm_plan(SCHEDULE)
SEEDS = sample_seeds(0, 3)
T = torch.tensor([3, 0, 19])
X_T = torch.linspace(-1, 1, 3 * 2 * 4 * 4, dtype=torch.float64).view(3, 2, 4, 4)


def op_functions(**backend: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Of one tensor."""
    return {
        "q_sample": lambda x: q_sample(x, T, SCHEDULE, seeds=SEEDS, **backend),
        "reverse_step": lambda x: reverse_step(X_T, x, 5, PLAN, seeds=SEEDS, **backend),
        "group_norm_silu": lambda x: group_norm_silu(x, 1, **backend),
        "denoising_loss": lambda x: denoising_loss(x, X_T, T, SCHEDULE, seeds=SEEDS, reduction="none", **backend),
    }


NAMES = tuple(op_functions())
# torch 2.9 does not read numbers from a tensor inside torch.func.grad or jvp, and the reference needs the step for its noise.
reads_no_step = pytest.mark.skipif(torch.__version__ < "2.10", reason="torch 2.9 reads no numbers inside torch.func")
DIFFERENTIATED = [pytest.param(name, marks=[reads_no_step] if name == "reverse_step" else []) for name in NAMES]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradient(name: str, x: Tensor) -> None:
    function, definition = op_functions()[name], op_functions(backend="reference")[name]
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(definition(leaf).square().sum(), leaf)
    found = torch.func.grad(lambda x: function(x).square().sum())(x)
    torch.testing.assert_close(found, expected)
    assert found.abs().max() > 0


@pytest.mark.parametrize("name", DIFFERENTIATED)
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch imports its own for jvp
def test_forward_mode(name: str, x: Tensor) -> None:
    function, definition = op_functions()[name], op_functions(backend="reference")[name]
    tangent = torch.randn_like(x)
    _, expected = torch.autograd.functional.jvp(definition, x, tangent)  # by two backward passes
    _, found = torch.func.jvp(function, (x,), (tangent,))
    torch.testing.assert_close(found, expected)
    assert found.abs().max() > 0
    with torch.autograd.forward_ad.dual_level():
        dual = function(torch.autograd.forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected)


@pytest.mark.parametrize("name", NAMES)
def test_vmap(name: str, x: Tensor) -> None:
    function = op_functions()[name]
    batch = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.func.vmap(function)(batch), torch.stack([function(one) for one in batch]))


def test_vmap_over_timesteps(x: Tensor) -> None:
    t = torch.stack([T, T.flip(0)])
    found = torch.func.vmap(lambda t: q_sample(x, t, SCHEDULE, noise=X_T))(t)
    torch.testing.assert_close(found, torch.stack([q_sample(x, one, SCHEDULE, noise=X_T) for one in t]))
