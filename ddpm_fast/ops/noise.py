"""noise and sample_seeds: standard normals from a counter, so that each sample's noise depends on its own seed alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ._library import check_seeds, define, dtype_code, is_plain_inference, pointer, sizes
from .backend import FLOATS, choose, launch


def sample_seeds(seed: int, n: int, start: int = 0) -> Tensor:
    """Seeds for samples start .. start + n - 1 of a run, derived by Philox so that runs with neighbouring seeds share nothing.

    Args:
        seed: the run's seed, -2^63 .. 2^64 - 1.
        n, start: at least 0; start + n at most 2^32.

    Returns:
        int64 [n] on the CPU.
    """
    for name, value, low, high in (
        ("seed", seed, -(1 << 63), (1 << 64) - 1),
        ("n", n, 0, 1 << 32),
        ("start", start, 0, 1 << 32),
    ):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"sample_seeds: expected {name} to be an int, got {type(value).__name__}")
        if not low <= value <= high:
            raise ValueError(f"sample_seeds: expected {name} in {low}..{high}, got {value}")
    if start + n > 1 << 32:
        raise ValueError(f"sample_seeds: expected start + n to be at most 2^32, got {start + n}")
    return reference.sample_seeds(seed, n, start)


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
    """Standard normals. Sample i depends on (seeds[i], stream) only: not on the batch, the device, the layout or the threads.

    The float32 values are the same bits from every family; other dtypes hold them rounded (or widened).

    Args:
        shape: [N, ...].
        seeds: int64 [N], one a sample: see `sample_seeds`.
        stream: 0..2^32-1; another stream is other noise for the same seeds.
        dtype: float32, float64, float16 or bfloat16.
        device: where to draw; by default where the seeds are.
        memory_format: torch.contiguous_format or, for [N, C, H, W], torch.channels_last.
        backend: "native", "triton" or "reference"; by default the first that can run.

    Raises:
        ValueError, TypeError: an argument that is not as above. BackendUnavailable: the family named cannot run.

    Source: Philox4x32-10 (Salmon et al. 2011) and Box-Muller; README, "Noise".
    """
    if not isinstance(shape, Sequence) or not all(isinstance(size, int | torch.SymInt) for size in shape):
        raise TypeError(f"noise: expected shape to be a sequence of ints, got {shape!r}")
    shape = tuple(shape)
    if len(shape) < 1 or any(size < 0 for size in shape):
        raise ValueError(f"noise: expected shape to be [N, ...] without negative sizes, got {list(shape)}")
    if not math.prod(shape[1:]) <= 1 << 34:
        raise ValueError(f"noise: expected at most 2^34 elements a sample, got {math.prod(shape[1:])}")
    if dtype not in FLOATS:
        raise TypeError(f"noise: expected dtype to be float32, float64, float16 or bfloat16, got {dtype}")
    if not isinstance(stream, int) or isinstance(stream, bool):
        raise TypeError(f"noise: expected stream to be an int, got {type(stream).__name__}")
    if not 0 <= stream < 1 << 32:
        raise ValueError(f"noise: expected stream in 0..2^32-1, got {stream}")
    channels_last = memory_format == torch.channels_last
    if not (memory_format == torch.contiguous_format or (channels_last and len(shape) == 4)):
        raise ValueError(
            f"noise: expected memory_format to be torch.contiguous_format or, for [N, C, H, W], torch.channels_last, "
            f"got {memory_format} with shape {list(shape)}"
        )
    device = torch.device(device) if device is not None else getattr(seeds, "device", torch.device("cpu"))
    seeds = check_seeds("noise", seeds, shape[0], device)
    family = choose("noise", backend, device, dtype)
    if family == "reference":
        return reference.noise(shape, seeds, stream, dtype).contiguous(memory_format=memory_format)
    run = _impl if is_plain_inference(seeds) else torch.ops.ddpm_fast.noise
    drawn: Tensor = run(shape, seeds, stream, dtype, channels_last, family)
    return drawn


def _impl(shape: Sequence[int], seeds: Tensor, stream: int, dtype: torch.dtype, channels_last: bool, family: str) -> Tensor:
    out = _fake(shape, seeds, stream, dtype, channels_last, family)
    if family == "native":
        launch("noise", out.device, dtype_code(out), pointer(out), pointer(seeds), stream, *sizes(out))
    else:
        from ..triton_kernels.noise import noise as run

        run(out, seeds, stream)
    return out


def _fake(shape: Sequence[int], seeds: Tensor, stream: int, dtype: torch.dtype, channels_last: bool, family: str) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype, device=seeds.device, memory_format=layout)


define(
    "noise",
    "(SymInt[] shape, Tensor seeds, int stream, ScalarType dtype, bool channels_last, str family) -> Tensor",
    _impl,
    _fake,
)
