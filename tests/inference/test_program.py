"""Programs: the memory plan, and both executors on calls made by hand."""

from __future__ import annotations

import itertools
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_unets import relative_error
from torch import Tensor

from ddpm_fast.inference.program import Buffer, Builder, NativeProgram, PythonProgram, _last_uses, plan_memory
from ddpm_fast.ops import backend
from ddpm_fast.ops.attention import attention_op
from ddpm_fast.ops.group_norm_affine import group_norm_affine_op
from ddpm_fast.ops.packed_conv import conv_ops, pack_weights

needs_kernels = pytest.mark.skipif(backend.native_error() is not None, reason="there is no compiled module")


def dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------------------- memory


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
    buffers = [first, *(call.out for call in builder.calls)]
    _, total = plan_memory(buffers, 1, _last_uses(builder.calls, x))
    assert total == 2 * x.nbytes


# ---------------------------------------------------------------------------------------------------------------- executors


def test_results_are_released_after_their_last_use() -> None:
    alive: list[list[bool]] = []
    results: list[Callable[[], Tensor | None]] = []

    def negated(*tensors: Tensor) -> Tensor:
        alive.append([result() is not None for result in results])
        result = -tensors[0]
        results.append(weakref.ref(result))
        return result

    builder = Builder()
    options: dict[str, Any] = {"shape": (2, 2), "dtype": torch.float32}
    x = builder.buffer(**options)
    a, b = (builder.call(negated, x, **options) for _ in range(2))
    c = builder.call(negated, a, **options)
    d = builder.call(negated, c, b.rows()[0], **options)
    e = builder.call(negated, d, **options)
    assert torch.equal(PythonProgram(builder.calls, [x], e)([torch.ones(2, 2)]), torch.ones(2, 2))
    assert alive == [[], [True], [True, True], [False, True, True], [False, False, False, True]]


@needs_kernels
@pytest.mark.usefixtures("matrix_kernels")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", backend.MATRIX_DTYPES)
def test_both_executors_make_calls_by_hand(dtype: torch.dtype, threads: int) -> None:
    """An attention layer whose norm has a shift, with its residual connection."""
    n, channels, height, width = 2, 8, 3, 5
    generator = torch.Generator().manual_seed(0)
    qkv_weight, out_weight = (torch.randn(c, 8, 1, 1, generator=generator).to(dtype).float() for c in (24, 8))
    packed_qkv, packed_out = (pack_weights(weight, "direct", dtype) for weight in (qkv_weight, out_weight))
    builder = Builder()
    x, stack = builder.buffer((n, channels, height, width), dtype), builder.buffer((3, n, channels), torch.float32)
    arguments = (x, None, 4, None, None, 1e-5, stack.rows()[1], None, None)
    affine = builder.call(group_norm_affine_op, *arguments, shape=(n, 3, channels), dtype=torch.float32)
    geometry = (height, width, 1, 1, 0)
    qkv = builder.call(
        *(conv_ops["direct"], x, None, affine, False, packed_qkv, None, None, 1.0, False, 24, *geometry),
        shape=(n, 24, height, width),
        dtype=dtype,
    )
    h = builder.call(attention_op, qkv.as_pixels(), 2, 0.5, shape=(n, height * width, 8), dtype=dtype)
    h = h.as_map(height, width)
    out = builder.call(
        *(conv_ops["direct"], h, None, None, False, packed_out, None, x, 2.0, False, 8, *geometry),
        shape=x.shape,
        dtype=dtype,
    )
    native, python = (
        NativeProgram(builder.calls, [x, stack], out, threads=threads),
        PythonProgram(builder.calls, [x, stack], out, "native"),
    )
    results = []
    for _ in range(3):
        values = dense(torch.randn(x.shape, generator=generator).to(dtype))
        terms = torch.randn(stack.shape, generator=generator)
        before = values.clone()
        got = native([values, terms])
        assert torch.equal(got, python([values, terms]))
        assert got.stride() == values.stride()
        assert torch.equal(values, before)
        wide, shift = values.double(), terms[1].double()[:, :, None, None]
        q, k, v = F.conv2d(F.group_norm(wide + shift, 4), qkv_weight.double()).flatten(2).unflatten(1, (3, 2, 4)).unbind(1)
        attended = F.scaled_dot_product_attention(*(each.transpose(2, 3) for each in (q, k, v)), scale=0.5)
        attended = attended.transpose(2, 3).reshape(x.shape)
        expected = (F.conv2d(attended, out_weight.double()) + wide) / 2
        assert relative_error(got, expected) <= 4 * torch.finfo(dtype).eps
        results.append((got, got.clone()))
    assert all(torch.equal(got, copied) for got, copied in results)  # later calls do not write to earlier results
