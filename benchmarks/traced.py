"""The calls of a step of sampling, traced on a CPU as a GPU would get them, and the time that they should take there.

A step is one evaluation of the frozen network in half precision. Bytes and operations are counted. How fast a card works them
off is assumed: no card has confirmed it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import idioms
import torch
from cards import ATTAINABLE, ISSUE_EFFICIENCY, LAUNCH, Budgets, Card, busy_seconds, launches
from op_cases import Case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from works import Work

import ddpm_fast
from ddpm_fast.ops.backend import native_error

BATCHES = (1, 16, 128)
KINDS = {  # the op's name decides; what is not here is "rest"
    **{"convolution": "convolutions", "cat": "cat", "add": "adds", "add_": "adds", "group_norm_silu": "norms"},
    **dict.fromkeys(("addmm", "addmm_"), "products"),
    "_scaled_dot_product_flash_attention_for_cpu": "attention",
}
# Assumed. The best convolutions, products and attention reach the first on maps that fill a card, with a tile of 64x64 results
# on each multiprocessor at least. Any of them takes the second at least.
DENSE_SHARE = 0.6
SHORTEST = 5e-6
TILE = 64 * 64
ASSUMED = f"""{DENSE_SHARE:.0%} of the dense bf16 rate for convolutions, products and attention, and at least
{1e6 * SHORTEST:g} us for each; with torch.compile, biases join other kernels, and norms read their input twice"""
TRACED = 7  # images of the traced call: no weight has as many rows


class Geometry(NamedTuple):
    """A convolution: the shapes of an image and of the weight, stride and padding."""

    shape: tuple[int, ...]
    weight: tuple[int, ...]
    stride: int
    padding: int

    def __str__(self) -> str:
        (out, c, *kernel), (_, *size) = self.weight, self.shape
        return f"{'x'.join(map(str, kernel))} {c}->{out}, {'x'.join(map(str, size))}" + ", stride 2" * (self.stride == 2)


class Call(NamedTuple):
    """A call that a GPU would get as one kernel, or a norm, whose kernels cards.py knows.

    Attributes:
        kind: One of `KINDS`, "bias" or "rest".
        moved: Bytes that it reads and writes for an image.
        fixed: Bytes whatever the batch is: weights.
        flops: Operations of tensor cores for an image.
        results: Results of a product for an image.
        norm: The norm of one image.
        geometry: That of a convolution.
    """

    kind: str
    moved: float
    fixed: float = 0
    flops: float = 0
    results: float = 0
    norm: Work | None = None
    geometry: Geometry | None = None

    def seconds(self, card: Card, batch: int, budgets: Budgets) -> tuple[float, int]:
        """Return the time of the kernels, without that of launches, and the number of launches."""
        if self.norm is not None:
            work = replace(self.norm, case=replace(self.norm.case, shape=(batch, *self.norm.case.shape[1:])))
            return busy_seconds(work, card, budgets, ISSUE_EFFICIENCY), len(launches(work, card))
        memory = (batch * self.moved + self.fixed) / (ATTAINABLE * card.bandwidth)
        busy = min(1, batch * self.results / TILE / card.multiprocessors)
        return max(memory, SHORTEST, batch * self.flops / (DENSE_SHARE * busy * card.dense)) if self.flops else memory, 1


class Tracer(TorchDispatchMode):
    """Records the calls that move floating numbers. Views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        given, got = ([each for each in tree_leaves(of) if isinstance(each, Tensor)] for of in (args, result))
        storages = {each.untyped_storage().data_ptr() for each in given}
        outs = [each for each in got if each.is_floating_point() and each.numel()]
        if outs and (function._schema.is_mutable or not any(each.untyped_storage().data_ptr() in storages for each in outs)):
            self.calls += _calls(function._schema.name.partition("::")[2], given, outs, args)
        return result


def _calls(name: str, given: Sequence[Tensor], outs: Sequence[Tensor], args: Sequence[Any]) -> list[Call]:
    """Return a call, or two if a convolution has a bias, which a GPU adds in a kernel of its own."""
    kind = KINDS.get(name, "rest")
    every = [each for each in (*given, *outs) if each.is_floating_point()]
    maps = [each.nbytes for each in every if each.dim() > 1 and len(each) % TRACED == 0]  # [N, ...] or [N HW, C]
    moved, fixed = sum(maps) / TRACED, sum(each.nbytes for each in every) - sum(maps)
    call, per_image = Call(kind, moved, fixed), outs[0].numel() / TRACED
    if kind == "norms":
        shape, groups = outs[0].shape, next(each for each in args if isinstance(each, int))
        case = Case("group_norm_silu", "traced", (1, *shape[1:]), {"groups": groups})
        return [call._replace(norm=Work(case, "bf16", "channels_last"))]
    if kind == "products":
        return [call._replace(flops=2 * per_image * given[-2].shape[-1], results=per_image)]
    if kind == "attention":
        return [call._replace(flops=4 * per_image * given[0].shape[2], results=per_image)]
    if kind != "convolutions":
        return [call]
    x, weight = given[:2]
    geometry = Geometry(tuple(x.shape[1:]), tuple(weight.shape), args[3][0], args[4][0])
    one = call._replace(flops=2 * per_image * weight[0].numel(), results=per_image, geometry=geometry)
    return [one, *([Call("bias", 2 * outs[0].nbytes / TRACED)] if len(given) > 2 else [])]


def sampling_step(config: dict[str, Any]) -> list[Call]:
    """Trace an evaluation of the frozen network. float16 runs on a CPU as bfloat16 does on a GPU.

    Raises:
        RuntimeError: There is no native module. The reference's many calls would be traced in place of its kernels.
    """
    if native_error() is not None:
        raise RuntimeError(f"a step is traced with the native module: {native_error()}. Build it: make build")
    network = ddpm_fast.freeze(idioms.random_unet(config), torch.float16)
    x = torch.zeros(TRACED, 3, config["sample_size"], config["sample_size"], dtype=torch.float16)
    with torch.no_grad(), Tracer() as tracer:
        network(x, torch.zeros(TRACED, dtype=torch.int64))
    # Under a tracer the network is planned again, with conversions of its weights that a call does not have.
    return [call for call in tracer.calls if call.moved]


def predicted(calls: Iterable[Call], card: Card, batch: int, budgets: Budgets) -> dict[str, float]:
    """Return seconds by kind, those of launches, and their sum."""
    found, count = dict.fromkeys(["convolutions", "norms", "bias", "cat", "adds", "attention", "products"], 0.0), 0
    for call in calls:
        seconds, number = call.seconds(card, batch, budgets)
        found[call.kind] = found.get(call.kind, 0) + seconds
        count += number
    found["launches"] = count * LAUNCH
    return found | {"sum": sum(found.values())}


def predicted_compiled(calls: Iterable[Call], card: Card, batch: int, budgets: Budgets) -> float:
    """Return the seconds of the same step by torch.compile: biases join other kernels, and norms read their input twice."""
    norms = [call._replace(norm=None, moved=1.5 * call.moved) for call in calls if call.norm is not None]
    others = [call for call in calls if call.norm is None and call.kind != "bias"]
    return predicted([*others, *norms, *(Call("norms", 0) for _ in norms)], card, batch, budgets)["sum"]


def expected(network: str, card: Card, batches: Iterable[int], budgets: Budgets) -> list[tuple[float, float]]:
    """Return, for each batch, the milliseconds of a step of sampling, and how many times as long torch.compile takes."""
    calls = sampling_step(idioms.NETWORKS[network])
    sums = [predicted(calls, card, n, budgets)["sum"] for n in batches]
    return [(1e3 * ours, predicted_compiled(calls, card, n, budgets) / ours) for ours, n in zip(sums, batches, strict=True)]


def table(network: str, card: Card, budgets: Budgets) -> list[dict[str, object]]:
    """Return milliseconds of a step of sampling by kind, at each of `BATCHES`."""
    calls = sampling_step(idioms.NETWORKS[network])
    found = [
        predicted(calls, card, n, budgets) | {"sum, torch.compile": predicted_compiled(calls, card, n, budgets)}
        for n in BATCHES
    ]
    return [
        {"kind": kind} | {f"batch {n}": 1e3 * times[kind] for n, times in zip(BATCHES, found, strict=True)} for kind in found[0]
    ]
