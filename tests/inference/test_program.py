"""Programs: the memory plan, and both executors on calls made by hand and on whole networks."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_unets import VARIANTS, make_inputs, make_unet, relative_error
from torch import Tensor

from ddpm_fast import freeze
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
    sizes = {buffer.index: buffer.nbytes for buffer in buffers}
    assert all(offset % 64 == 0 and offset + sizes[index] <= total for index, offset in offsets.items())

    # Run it: each byte holds the index of the buffer that wrote it last.
    memory = [-1] * total

    def write(buffer: Buffer) -> None:
        start = offsets[buffer.index]
        memory[start : start + buffer.nbytes] = [buffer.index] * buffer.nbytes

    def check(index: int) -> None:
        start = offsets[index]
        assert set(memory[start : start + sizes[index]]) <= {index}

    largest = 0
    for buffer in inputs:
        write(buffer)
    for i, call in enumerate(calls):
        write(call.out)  # before the inputs are read: a kernel may not overwrite them
        for argument in call.arguments:
            if isinstance(argument, Buffer):
                check(argument.index)
        later = {a.index for other in calls[i:] for a in other.arguments if isinstance(a, Buffer)} | {output.index}
        made = {buffer.index for buffer in buffers[: len(inputs) + i]}
        largest = max(largest, sum(sizes[index] for index in (later & made) | {call.out.index}))
    check(output.index)
    assert largest <= total <= sum(-(-size // 64) * 64 for size in sizes.values())


def test_memory_is_used_again() -> None:
    builder = Builder()
    x = first = builder.buffer((1, 4, 8, 8), torch.float32)
    for _ in range(10):
        x = builder.call(torch.neg, x, shape=x.shape, dtype=x.dtype)
    buffers = [first, *(call.out for call in builder.calls)]
    _, total = plan_memory(buffers, 1, _last_uses(builder.calls, x))
    assert total == 2 * x.nbytes


# ---------------------------------------------------------------------------------------------------------------- executors


def test_views_of_buffers_are_those_of_tensors() -> None:
    builder = Builder()
    stack = builder.buffer((3, 2, 5), torch.float32)
    x = builder.buffer((2, 5, 3, 4), torch.float32)
    row = stack.rows()[2]
    assert (row.shape, row.row, row.nbytes) == ((2, 5), 2, 40)
    shifted = builder.call(lambda x, row: x + row[:, :, None, None], x, row, shape=x.shape, dtype=x.dtype)
    pixels = builder.call(lambda p: 2 * p, shifted.as_pixels(), shape=(2, 12, 5), dtype=x.dtype)
    flat = shifted.as_pixels()
    assert (flat.index, flat.shape) == (shifted.index, (2, 12, 5))
    assert pixels.as_map(3, 4).shape == x.shape
    out = builder.call(torch.add, pixels.as_map(3, 4), x, shape=x.shape, dtype=x.dtype)
    run = PythonProgram(builder.calls, [x, stack], out)
    values, terms = torch.randn(2, 5, 3, 4), torch.randn(3, 2, 5)
    for tensor in (values, dense(values)):
        torch.testing.assert_close(run([tensor, terms]), 2 * (values + terms[2, :, :, None, None]) + values)


def test_results_are_released_after_their_last_use() -> None:
    alive: list[list[bool]] = []
    results: list[Callable[[], Tensor | None]] = []

    def negated(*tensors: Tensor) -> Tensor:
        alive.append([result() is not None for result in results])
        result = -tensors[0]
        results.append(weakref.ref(result))
        return result

    builder = Builder()
    x = builder.buffer((2, 2), torch.float32)
    a = builder.call(negated, x, shape=x.shape, dtype=x.dtype)
    b = builder.call(negated, x, shape=x.shape, dtype=x.dtype)
    c = builder.call(negated, a, shape=x.shape, dtype=x.dtype)
    d = builder.call(negated, c, b.rows()[0], shape=x.shape, dtype=x.dtype)
    e = builder.call(negated, d, shape=x.shape, dtype=x.dtype)
    assert torch.equal(PythonProgram(builder.calls, [x], e)([torch.ones(2, 2)]), torch.ones(2, 2))
    assert alive == [[], [True], [True, True], [False, True, True], [False, False, False, True]]


def test_the_output_may_be_read_later_or_be_an_input() -> None:
    builder = Builder()
    x = builder.buffer((2, 3), torch.float32)
    a = builder.call(torch.neg, x, shape=x.shape, dtype=x.dtype)
    builder.call(torch.neg, a, shape=x.shape, dtype=x.dtype)
    value = torch.randn(2, 3)
    assert torch.equal(PythonProgram(builder.calls, [x], a)([value]), -value)
    assert torch.equal(PythonProgram(builder.calls, [x], x)([value]), value)


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


@needs_kernels
@pytest.mark.usefixtures("matrix_kernels")
@pytest.mark.parametrize("dtype", backend.MATRIX_DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_both_executors_compute_the_same_bits(variant: str, dtype: torch.dtype) -> None:
    model, config = make_unet(variant)
    frozen = freeze(model, dtype)
    assert frozen.why_not_packed is None
    for n in (3, 1):
        x, t, labels = make_inputs(config, n, dtype)
        inputs = (dense(x), *frozen._constants.network.time_terms.stacks(t, labels))
        parts = frozen._built(frozen._layers, inputs)
        native, python = NativeProgram(*parts, threads=torch.get_num_threads()), PythonProgram(*parts, backend="native")
        expected = python(inputs)
        for _ in range(2):
            got = native(inputs)
            assert torch.equal(got, expected)
            assert got.stride() == expected.stride()
