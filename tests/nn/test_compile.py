"""torch.compile of whole networks: the values and gradients of eager mode.

Inductor takes seconds to compile a kernel's C++, so half of the rows stop after its decompositions and partitions. By default
one row runs, and with `--full` all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_fast import NoiseSchedule, UNet, denoising_loss, freeze, q_sample, sample_seeds

SCHEDULE = NoiseSchedule.linear()
OPTIONS: dict[str, dict[str, Any]] = {"dynamic": {"dynamic": True}, "fullgraph": {"fullgraph": True}}
DECOMPOSED = "aot_eager_decomp_partition"  # what inductor does before it writes code

# Inductor's own imports.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_DEBUG_COMPILE", "1")  # -O0
    torch._dynamo.reset()
    with config.patch(compile_threads=1):  # each process would import torch
        yield
    torch._dynamo.reset()


def make(*, channels_last: bool = False, train: bool = False, levels: int = 2) -> UNet:
    """Return a network with attention, skip connections and, on two levels, resampling, in as few kernels as they need."""
    blocks = {
        "down_block_types": ["DownBlock2D"] * levels,
        "up_block_types": ["UpBlock2D"] * levels,
        "attention_head_dim": None,
    }
    model = UNet(sample_size=8, block_out_channels=[8] * levels, norm_num_groups=4, layers_per_block=1, **blocks)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # a residual branch starts at 0
                parameter.normal_(std=0.1)
    return model.train(train).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)  # type: ignore[call-overload]


def make_inputs(n: int, channels_last: bool) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return x.contiguous(memory_format=layout), torch.arange(n) * 100


def training_step(model: Any, x_0: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """Return the loss and the gradient of every parameter."""
    seeds = sample_seeds(0, len(x_0))
    model.zero_grad()
    loss = denoising_loss(model(q_sample(x_0, t, SCHEDULE, seeds=seeds), t), x_0, t, SCHEDULE, seeds=seeds)
    loss.backward()
    return loss.detach(), *(parameter.grad for parameter in model.parameters())


def assert_same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


QUICK = ("fullgraph", False, False, DECOMPOSED)
# By default Dynamo makes the same graph as with fullgraph, which makes sure that there is one. Inductor begins with the
# decompositions and partitions, so no row has both. A dynamic row of it once failed in its symbolic ranges.
ROWS = [
    *(QUICK, ("fullgraph", True, True, DECOMPOSED), ("dynamic", False, True, DECOMPOSED), ("dynamic", True, False, DECOMPOSED)),
    *(("dynamic", False, False, "inductor"), ("dynamic", True, True, "inductor")),
    *(("fullgraph", False, True, "inductor"), ("fullgraph", True, False, "inductor")),
]


@pytest.mark.again  # with --full it has a second batch size
@pytest.mark.parametrize(
    ("options", "train", "channels_last", "backend"),
    [pytest.param(*row, marks=() if row == QUICK else pytest.mark.slow) for row in ROWS],
    ids=str,
)
def test_a_network_is_that_of_eager_mode(
    options: str, train: bool, channels_last: bool, backend: str, pytestconfig: pytest.Config
) -> None:
    # Inductor's dynamic rows, and the others, have resampling.
    is_short = backend == "inductor" and options == "fullgraph"
    model = make(channels_last=channels_last, train=train, levels=1 if is_short else 2)
    compiled = torch.compile(model, backend=backend, **OPTIONS[options])
    # A second batch size makes a dynamic graph of a static one, which is all the work again. Inductor has dynamic rows.
    again = OPTIONS[options].get("dynamic") or (pytestconfig.getoption("full") and backend == DECOMPOSED)
    for n in (4, 3) if again else (4,):
        inputs = make_inputs(n, channels_last)
        if train:
            assert_same(training_step(compiled, *inputs), training_step(model, *inputs))
        else:
            with torch.no_grad():
                assert_same(compiled(*inputs), model(*inputs))


DTYPES = (torch.float32, torch.bfloat16, torch.float64)
FROZEN = [
    *(("fullgraph", dtype, DECOMPOSED) for dtype in DTYPES),
    *(("dynamic", torch.float32, "inductor"), ("dynamic", torch.bfloat16, "inductor"), ("dynamic", torch.float64, DECOMPOSED)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "dtype", "backend"), FROZEN, ids=str)
def test_a_frozen_network_is_that_of_eager_mode(options: str, dtype: torch.dtype, backend: str) -> None:
    frozen = freeze(make().eval(), dtype)
    compiled = torch.compile(frozen, backend=backend, **OPTIONS[options])
    # Decompositions round an attention's weights at other places.
    tolerance = {torch.bfloat16: 0.05, torch.float32: 1e-4, torch.float64: 1e-6}[dtype]
    # A graph must not take a batch of 2 for the 2 phases of an upsampling.
    for n, stance in ((2, "default"), (3, "fail_on_recompile")) if options == "dynamic" else ((2, "default"),):
        inputs = make_inputs(n, False)
        with torch.compiler.set_stance(stance):
            got = compiled(*inputs)
        torch.testing.assert_close(got, frozen(*inputs), rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_a_frozen_network_compiles_after_its_model() -> None:
    """They share code, and a graph that was made dynamic for one must not be taken for the other."""
    model = make(levels=1).eval()
    frozen = [freeze(model, dtype) for dtype in DTYPES]
    options: dict[str, Any] = {"dynamic": True, "backend": "eager"}  # graphs and their guards
    for n in (2, 3):
        inputs = make_inputs(n, False)
        with torch.no_grad():
            assert_same(torch.compile(model, **options)(*inputs), model(*inputs))
            for network in frozen:
                torch.testing.assert_close(torch.compile(network, **options)(*inputs), network(*inputs))
