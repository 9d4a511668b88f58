"""Time every layer of a frozen network on this CPU, next to the time of its multiplications in a large matrix product.

    python benchmarks/benchmark_layers.py
    python benchmarks/benchmark_layers.py --batches 1 --dtypes float32 --network 256x256

A layer's kernel is timed where it stands in the network, so its weights are as cold as there. A large batch takes several
passes, of which one is timed. The floor divides the multiplications of a layer's method (direct sum or Winograd's) by the speed
of PyTorch's product of 2048 x 2048 matrices. Layers of the same shape share a row.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import common
import idioms
import torch
from torch import Tensor

import ddpm_fast
from ddpm_fast.inference.frozen import FrozenUNet
from ddpm_fast.inference.program import Buffer, Call, NativeProgram
from ddpm_fast.ops.backend import BFLOAT16, Bfloat16, product_dtype

PEAK_SIDE = 2048  # side of the matrices whose product measures the peak
SMALL = 64  # pixels of the largest map of which direct sums leave out the taps that fall outside
# Tiles of a method: pixels a side, and products of a tile for each pair of channels. After an upsampling the pixels are those
# of the small map, and the products those of four phases.
TILES = {"conv_winograd": (2, 16), "conv_winograd_large": (4, 36), "upsampled": (2, 36)}


def peak(dtype: torch.dtype, rounds: int) -> float:
    """Return the multiplications and additions per second of a product of square matrices."""
    a, b = torch.randn(2, PEAK_SIDE, PEAK_SIDE).to(dtype)
    taken = common.compare({"product": lambda: a @ b}, seconds=rounds * 0.1)["product"]
    return 2 * PEAK_SIDE**3 / taken.spread.low


def words_of(call: Call) -> tuple[str, str, float]:
    """Return the kernel, the shapes and the multiplications and additions of a call."""
    name = getattr(call.function, "name", "")
    if name.startswith("attention"):
        (_, heads, _), (n, pixels, channels) = call.arguments, call.out.shape  # type: ignore[union-attr]
        return name, f"{pixels} pixels, {heads} x {channels // heads} channels", 4.0 * n * pixels**2 * channels
    if not name.startswith("conv_"):
        return name, "", 0.0
    x, skip, *_, upsample, out_channels, height, width, kernel, stride, padding = call.arguments
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    n, side, products = x.shape[0], 1, float(kernel**2)
    if name not in ("conv_direct", "conv_tiles"):
        side, products = TILES["upsampled" if upsample else name]
    elif upsample:
        products = 16  # four phases of 2x2
    elif name == "conv_direct" and kernel == 3 and height * width <= SMALL:
        products = math.prod(_inside(*each, stride, padding) for each in ((x.shape[2], height), (x.shape[3], width)))
        products /= height * width
    small = (height // 2, width // 2) if upsample else (height, width)
    tiles = n * math.prod(math.ceil(each / side) for each in small)
    words = f"{kernel}x{kernel} {channels} -> {out_channels}, {height}x{width}"
    words += " upsampled" if upsample else f" stride {stride}" if stride > 1 else ""
    return name, words, 2.0 * tiles * products * channels * out_channels


def _inside(size: int, out: int, stride: int, padding: int) -> int:
    """Return how many taps of a row of three fall inside a map, over all pixels of a row of the output."""
    return sum(0 <= i * stride - padding + tap < size for i in range(out) for tap in range(3))


def measure(network: FrozenUNet, inputs: tuple[Tensor, ...], rounds: int) -> tuple[list[Call], list[float]]:
    """Return the calls of a network's program and the median seconds of each."""
    x, t, labels = inputs if len(inputs) == 3 else (*inputs, None)
    x = x.to(network.dtype).contiguous(memory_format=torch.channels_last)
    parts = (x, *network._constants.network.time_terms.stacks(t, labels))
    calls, buffers, output = network._built(network._layers, parts)
    stamps: list[float] = []

    def stamp(*, out: Tensor) -> None:
        stamps.append(time.perf_counter())

    # A function of Python between two kernels makes each a parallel region of its own.
    numbers = itertools.count(1 + max(buffer.index for buffer in (*buffers, *(call.out for call in calls))))  # type: ignore[union-attr]
    marks = (Call(stamp, (), Buffer(number, (1,), torch.float32)) for number in numbers)
    stamped = [next(marks)] + [each for call in calls for each in (call, next(marks))]
    program = NativeProgram(stamped, buffers, output, threads=torch.get_num_threads())
    seconds = []
    for _ in range(rounds + 2):  # two to warm up
        stamps.clear()
        program(parts)
        seconds.append([end - start for start, end in itertools.pairwise(stamps)])
    return calls, [median(each) for each in zip(*seconds[2:], strict=True)]


def compare(model: Any, dtype: torch.dtype, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each kind of layer, slowest first, and one for the whole."""
    size, classes = model.config["sample_size"], model.config["num_class_embeds"]
    x, t = torch.randn(batch, model.config["in_channels"], size, size), torch.arange(batch) * 37 % 1000
    inputs = (x, t) if classes is None else (x, t, t % classes)
    network: Any = ddpm_fast.freeze(model, dtype)
    if network.why_not_packed is not None:
        raise SystemExit(f"{dtype} has no kernels of this package: {network.why_not_packed}")
    limit = peak(dtype if BFLOAT16 is Bfloat16.MATRIX_UNITS else product_dtype(dtype), rounds)
    passes = network._num_passes(batch, size, size)
    with torch.inference_mode():
        calls, seconds = measure(network, tuple(each[: math.ceil(batch / passes)] for each in inputs), rounds)
        whole = common.compare({"whole": partial(network, *inputs)}, min_rounds=rounds, warm=True)["whole"].spread.median
    layers: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for call, taken in zip(calls, seconds, strict=True):
        name, shapes, operations = words_of(call)
        layers[f"{name} {shapes}".strip()].append((passes * taken, passes * operations))
    sums = [(words, len(each), *(sum(values) for values in zip(*each, strict=True))) for words, each in layers.items()]
    sums.sort(key=lambda row: -row[2])
    sums.append(("whole", len(calls), whole, sum(operations for *_, operations in sums)))
    return [
        {"layer": words, "count": count, "ms": 1e3 * taken, "share of the time": taken / whole}
        | {"GFLOP": operations / 1e9, "GFLOP/s": operations / taken / 1e9, "floor, ms": 1e3 * operations / limit}
        | {"share of the peak": operations / limit / taken}
        for words, count, taken, operations in sums
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    dtypes = list(common.DTYPES) if common.has_bf16() else ["float32"]
    options: dict[str, dict[str, Any]] = {
        "--network": {"choices": idioms.NETWORKS, "default": "cifar10-32", "help": "time this network (cifar10-32)"},
        "--dtypes": {"nargs": "+", "choices": common.DTYPES, "default": dtypes, "help": "compute in these"},
        "--batches": {"type": int, "nargs": "+", "default": [1, 16], "help": "use these batch sizes (1 16)"},
        "--rounds": {"type": int, "default": 15, "help": "evaluate this many times (15)"},
    }
    args = common.parse(__doc__, arguments, options, device=False)
    run = common.Run(out=args.out)
    model = idioms.random_unet(idioms.NETWORKS[args.network])
    for dtype, batch in itertools.product(args.dtypes, args.batches):
        words = f"{args.network} {dtype} batch {batch}"
        with run.going_on(words):
            rows = compare(model, common.DTYPES[dtype], batch, args.rounds)
            run.save(f"layers {words}", rows, f"{words}: share of the machine's peak, by layer")
    run.finish()


if __name__ == "__main__":
    main()
