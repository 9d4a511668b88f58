"""Programs: the memory plan, and when results are released. Tests of layers and networks run both executors."""

from __future__ import annotations

import itertools
import random
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddpm_fast.inference.program import Buffer, Builder, PythonProgram, _last_uses, plan_memory


def random_program(seed: int) -> tuple[list[Buffer], Builder, Buffer]:
    """Return inputs, calls and output of a program that reads random buffers, some of them by views."""
    choose = random.Random(seed)
    builder = Builder()

    def shape() -> tuple[int, ...]:
        return tuple(choose.choice((1, 2, 3, 8, 17)) for _ in range(choose.choice((2, 4))))

    dtypes = (torch.float32, torch.bfloat16, torch.uint8)
    inputs = [builder.buffer(shape(), choose.choice(dtypes)) for _ in range(choose.randint(1, 3))]
    known = list(inputs)
    for _ in range(choose.randint(1, 25)):
        read = [choose.choice(known[-6:] if choose.random() < 0.7 else known) for _ in range(choose.randint(0, 3))]
        arguments = [choose.choice(each.rows()) if choose.random() < 0.3 else each for each in read]
        known.append(builder.call(torch.add, *arguments, None, 1.5, shape=shape(), dtype=choose.choice(dtypes)))
    return inputs, builder, known[-1] if choose.random() < 0.8 else choose.choice(known)


@pytest.mark.parametrize("seed", range(60))
def test_buffers_that_are_alive_at_once_do_not_overlap(seed: int) -> None:
    inputs, builder, output = random_program(seed)
    calls = builder.calls
    buffers = [*inputs, *(call.out for call in calls)]
    offsets, total = plan_memory(buffers, len(inputs), _last_uses(calls, output))
    assert sorted(offsets) == [buffer.index for buffer in buffers]
    assert all(offset % 64 == 0 for offset in offsets.values())
    # A result is alive while its call reads the arguments: a kernel may not overwrite them.
    uses = [(i, value) for i, call in enumerate(calls) for value in (call.out, *call.arguments) if isinstance(value, Buffer)]
    uses += [(-1, buffer) for buffer in inputs] + [(len(calls), output)]
    spans = []
    for buffer in buffers:
        times, start = [i for i, used in uses if used.index == buffer.index], offsets[buffer.index]
        spans.append((min(times), max(times), start, start + buffer.nbytes))
    for (first, last, start, end), (other_first, other_last, other_start, other_end) in itertools.combinations(spans, 2):
        assert last < other_first or other_last < first or end <= other_start or other_end <= start
    assert max(end for *_, end in spans) <= total <= sum(-(-buffer.nbytes // 64) * 64 for buffer in buffers)


def test_memory_is_used_again() -> None:
    builder = Builder()
    x = first = builder.buffer((1, 4, 8, 8), torch.float32)
    for _ in range(10):
        x = builder.call(torch.neg, x, shape=x.shape, dtype=x.dtype)
    _, total = plan_memory([first, *(call.out for call in builder.calls)], 1, _last_uses(builder.calls, x))
    assert total == 2 * x.nbytes


def test_results_are_released_after_their_last_use() -> None:
    alive: list[list[bool]] = []
    results: list[Callable[[], Tensor | None]] = []

    def negated(x: Tensor) -> Tensor:
        alive.append([result() is not None for result in results])
        result = -x
        results.append(weakref.ref(result))
        return result

    builder = Builder()
    x = last = builder.buffer((2, 2), torch.float32)
    for _ in range(4):
        last = builder.call(negated, last, shape=x.shape, dtype=x.dtype)
    assert torch.equal(PythonProgram(builder.calls, [x], last)([torch.ones(2, 2)]), torch.ones(2, 2))
    assert alive == [[], [True], [False, True], [False, False, True]]
