"""Standard normals from a counter (Philox4x32-10): each sample's noise depends on its own seed and a stream alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..checks import check_dtype, check_int, check_ints, checked_device, checked_seeds
from ..errors import InvalidType, InvalidValue, public
from .fused_op import FusedOp
from .op_spec import OpSpec


@public()
def sample_seeds(seed: int, n: int, start: int = 0) -> Tensor:
    """Return the seeds of samples start .. start + n - 1 of a run.

    Philox derives them from the run's seed, so runs with neighbouring seeds share none. A loop that needs new
    noise at each step takes new samples: `sample_seeds(seed, batch_size, start=step * batch_size)`.

    Args:
        seed: The run's seed, -2^63 .. 2^64 - 1.
        n: The number of seeds, at least 0.
        start: The number of the first sample, at least 0; start + n is below 2^63.

    Returns:
        int64 [n] on the CPU.

    Raises:
        TypeError: An argument is not an int.
        ValueError: An argument is out of range.
    """
    check_int("seed", seed, -(1 << 63), (1 << 64) - 1)
    check_int("n", n, 0, 1 << 32)
    check_int("start", start, 0, 1 << 63)
    if start + n >= 1 << 63:
        raise InvalidValue("start + n", "to be below 2^63", start + n)
    return reference.sample_seeds(seed, n, start)


@public(traced=True)
def noise(
    shape: Sequence[int],
    seeds: Tensor,
    *,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    backend: str | None = None,
) -> Tensor:
    """Draw standard normals. Sample i depends on (seeds[i], stream) alone, in C, H, W order.

    The float32 values are the same bits for every backend, batch size, device, memory format and number of
    threads. Other dtypes hold them rounded or widened.

    Equal (seed, stream) gives equal noise. These streams are taken:

        0 .. S - 1         `reverse_step` at row 0 .. S - 1 of a plan
        STREAM_X_T         `initial_noise`, the x_T of a sampler
        STREAM_Q_SAMPLE    the epsilon of `q_sample` and `denoising_loss`
        STREAM_SEEDS       `sample_seeds`
        STREAM_KNOWN + k   the known region after step k of `inpaint`
        STREAM_DROPOUT + k dropout in residual block k of a `UNet`

    `noise(shape, seeds)` as x_T would repeat the noise of a sampler's step 0: use `initial_noise`. The same
    seeds draw the same noise at each step of a loop: take new seeds from `sample_seeds`.

    Args:
        shape: [N, ...].
        seeds: int64 [N], one seed per sample, from `sample_seeds`.
        stream: 0 .. 2^32 - 1. Another stream gives independent noise for the same seeds.
        dtype: float32, float64, float16 or bfloat16.
        device: Device of the result. None: the device of the seeds.
        memory_format: torch.contiguous_format or, for [N, C, H, W], torch.channels_last.
        backend: "native", "triton" or "reference". None: the first that can run.

    Returns:
        Standard normals of the given shape, dtype, device and memory format.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
        BackendUnavailable: The named backend cannot run.

    Source: Philox4x32-10 (Salmon et al. 2011) and Box-Muller.
    """
    return _noise(shape, seeds, stream, dtype, device, memory_format, backend)


def _noise(
    shape: Sequence[int],
    seeds: Tensor,
    stream: int,
    dtype: torch.dtype,
    device: torch.device | str | None,
    memory_format: torch.memory_format,
    backend: str | None = None,
) -> Tensor:
    check_ints("shape", shape, 0, "a sequence of ints")
    shape = tuple(shape)
    if not math.prod(shape[1:]) <= 1 << 34:
        raise InvalidValue("shape", "to have at most 2^34 elements per sample", math.prod(shape[1:]))
    check_dtype("dtype", dtype)
    check_int("stream", stream, 0, (1 << 32) - 1)
    channels_last = memory_format is torch.channels_last
    if not (memory_format is torch.contiguous_format or (channels_last and len(shape) == 4)):
        kind = InvalidValue if isinstance(memory_format, torch.memory_format) else InvalidType
        raise kind(
            "memory_format",
            "to be torch.contiguous_format or, for [N, C, H, W], torch.channels_last",
            f"{memory_format!r} with shape {list(shape)}",
        )
    device = checked_device(device) if device is not None else getattr(seeds, "device", torch.device("cpu"))
    seeds = checked_seeds(seeds, shape[0], device)
    drawn: Tensor = noise_op(shape, seeds, stream, dtype, channels_last, backend=backend)
    return drawn


@public()
def initial_noise(
    shape: Sequence[int],
    seeds: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Draw x_T ~ N(0, I), the start of a sampler (eq. 4). `sample` starts from the same bits.

    The noise uses the stream STREAM_X_T, so it shares nothing with the noise of any step.

    Args:
        shape: [N, C, H, W], or any [N, ...].
        seeds: int64 [N], one seed per sample, from `sample_seeds`.
        dtype: float32, float64, float16 or bfloat16.
        device: Device of the result. None: the device of the seeds.
        memory_format: torch.contiguous_format or, for [N, C, H, W], torch.channels_last.

    Returns:
        x_T of the given shape, dtype, device and memory format.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """
    return _noise(shape, seeds, reference.STREAM_X_T, dtype, device, memory_format)


def _output(arguments: Any) -> Tensor:
    layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
    return torch.empty(tuple(arguments.shape), dtype=arguments.dtype, device=arguments.seeds.device, memory_format=layout)


def _reference(shape: Sequence[int], seeds: Tensor, stream: int, dtype: torch.dtype, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return reference.noise(shape, seeds, stream, dtype).contiguous(memory_format=layout)


noise_op = FusedOp(
    OpSpec(
        "noise",
        _reference,
        outputs={"out": _output},
        has_triton=True,
        fields={"shape": None},
    )
)
