"""Time the ops in every backend beside their peers, forward and backward, against a copy of the bytes that must move.

    python benchmarks/benchmark_ops.py deciding --device cuda

deciding:    the few shapes by which a GPU is judged, larger than the L2 of an H100
deciding-compiled: the norms of these, as in sampling, beside torch.compile, which takes seconds each

Samples of a batch are copies of a few. Results are checked at the full batch: each sample equals its copy bit for bit, and the
reference within twice its own error. On a GPU a call is a CUDA graph, timed by events with a cold L2.
`python -m pytest benchmarks/ops` times every op at many shapes, on a CPU too.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import common
import torch
from op_calls import Call, make_call
from peers import OPS, Function, eager_op, has_idiom
from torch import Tensor
from works import LISTS, Work

from ddpm_fast.dtypes import opmath
from ddpm_fast.inference import cuda_graph
from ddpm_fast.ops import BACKENDS, why_not
from ddpm_fast.reference import STREAM_Q_SAMPLE
from ddpm_fast.reference import noise as reference_noise

DRAWING = ("noise", "q_sample", "reverse_step", "denoising_loss")  # ops that need noise
BATCHED = ("x", "x_0", "x_t", "model_output", "shift", "t", "seeds")
FEW = 2  # distinct samples of a batch


def why_missing(work: Work, peer: str, device: str) -> str | None:
    """Return why a peer cannot take part, or None."""
    if peer in BACKENDS:
        return why_not(peer, work.case.op, torch.device(device), common.DTYPES[work.dtype])
    if not has_idiom(work.case):
        return "the reference is the eager code of this case"
    return OPS[peer].why_not(work.dtype)


def make_inputs(work: Work, device: str) -> Call:
    """Return inputs whose samples are copies of the first few."""
    samples = work.case.shape[0]
    few = replace(work.case, shape=(min(FEW, samples), *work.case.shape[1:]))
    call = make_call(few, common.DTYPES[work.dtype], device, channels_last=work.layout == "channels_last")
    arguments = {name: _repeated(x, samples) if name in BATCHED else x for name, x in call.arguments.items()}
    return replace(call, arguments=arguments | ({"shape": work.case.shape} if "shape" in arguments else {}))


def _repeated(few: Tensor, samples: int) -> Tensor:
    many = few[torch.arange(samples, device=few.device) % len(few)]
    is_last = few.dim() == 4 and not few.is_contiguous()
    return many.contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)


def forward(function: Function, call: Call) -> Callable[[], object]:
    tensors = call.tensors

    def run() -> Tensor:
        with torch.no_grad():
            return function(**tensors)

    return run


def backward(function: Function, call: Call) -> Callable[[], tuple[Tensor, ...]]:
    """Return a call for the gradients. The forward pass is done here, once."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in call.tensors.items() if name != "x_0"}
    inputs = {**call.tensors, **leaves}
    y = function(**inputs)
    generator = torch.Generator().manual_seed(1)
    few = torch.randn(y.shape[:0] if y.dim() < 2 else (min(FEW, len(y)), *y.shape[1:]), generator=generator).to(y.device)
    cotangent = torch.empty_like(y).copy_(few if y.dim() < 2 else _repeated(few, len(y)))  # in the memory format of y

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, list(leaves.values()), cotangent, retain_graph=True, materialize_grads=True)

    return run


DIRECTIONS: dict[str, Callable[[Function, Call], Callable[[], Any]]] = {"forward": forward, "backward": backward}


def check(peer: str, function: Function, work: Work, call: Call) -> tuple[Tensor, ...]:
    """Return a peer's results. Raise an AssertionError unless they are right.

    A peer that draws noise of its own is given the kernels' noise. Its compiled form computes what was checked as eager.
    """
    case, epsilon = work.case, None
    if case.op in DRAWING and "seeds" in call.arguments and has_idiom(case):
        if peer == "compile":
            return ()
        stream = STREAM_Q_SAMPLE
        if case.op in ("noise", "reverse_step"):
            stream = int(call.arguments["stream" if case.op == "noise" else "step"])
        seeds, which = call.arguments["seeds"].unique(return_inverse=True)  # samples may be copies of a few
        drawn = reference_noise((len(seeds), *case.shape[1:]), seeds.cpu(), stream, torch.float64)
        epsilon = drawn.to(seeds.device)[which]
    wide = call.map(lambda x: x.double())
    baseline, truth = eager_op(call, case, epsilon), eager_op(wide, case, epsilon)
    run = DIRECTIONS[work.direction]
    results, *others = (
        (r,) if isinstance(r, Tensor) else r
        for r in (run(f, c)() for f, c in ((baseline if peer == "eager" else function, call), (baseline, call), (truth, wide)))
    )
    for got, allowed, true in zip(results, *others, strict=True):
        assert got.shape == true.shape, f"{case} by {peer}: shape {tuple(got.shape)}, {tuple(true.shape)} expected"
        if got.numel():
            common.require_parity(f"{case} by {peer}", got, allowed, true)
        if got.numel() and peer in BACKENDS:
            # The rule of the tests: the largest error may be twice the reference's, or a few roundings.
            error, limit = ((x.double() - true).abs().max().item() for x in (got, allowed))
            roundings = (4 if case.op == "conv3x3" else 1) * 0.5 * torch.finfo(got.dtype).eps
            roundings += 4 * torch.finfo(opmath(got.dtype)).eps
            limit = max(2 * limit, roundings * true.abs().max().item())
            assert error <= limit, f"{case} by {peer}: largest error {error:.3g}, at most {limit:.3g} expected"
    return results


def require_copies(what: str, results: Sequence[Tensor], samples: int) -> None:
    """Raise an AssertionError unless every sample equals the one that it is a copy of, bit for bit."""
    for got in results:
        if got.dim() > 1 and len(got) == samples:
            assert torch.equal(got, _repeated(got[:FEW], samples)), f"{what}: samples differ from their copies"


def measure(work: Work, device: str, seconds: float, run: common.Run) -> list[dict[str, object]]:
    """Return a row per peer that can run and is right. A failure is kept in `run`."""
    functions: dict[str, Callable[[], object]] = {}
    on_gpu = torch.device(device).type == "cuda"
    # A backward pass runs on the stream of its forward pass, which must be the one that graphs are captured on.
    stream = torch.cuda.Stream(device) if on_gpu else None
    with torch.cuda.stream(stream), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        call = make_inputs(work, device)
        for name in work.peers:
            if why_missing(work, name, device) is None:
                with run.going_on(f"{work} by {name}"):
                    function = OPS[name].build(call, work.case)
                    results = check(name, function, work, call)
                    if name in BACKENDS:
                        require_copies(f"{work.case} by {name}", results, work.case.shape[0])
                    functions[name] = DIRECTIONS[work.direction](function, call)
                    functions[name]()
        functions["copy"] = common.copy_of(work.moved, device)
        for name, function in functions.items() if stream is not None else ():
            try:
                functions[name] = common.graphed(function, stream)
            except cuda_graph.CaptureError as error:
                print(f"{work} by {name}: no graph, timed as a call: {error}")
    times = common.compare(functions, device, seconds=seconds)
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if on_gpu else 1 << 27
    return [
        work.columns()
        | {"by": name, "beyond L2": work.moved > 2 * l2, "ms": taken.ms, "GB/s": work.moved / taken.spread.median / 1e9}
        | {"share of copy": taken.speedup_over(times["copy"]).median}
        | {"native is faster by": times["native"].speedup_over(taken) if "native" in times else None}
        for name, taken in times.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    options: dict[str, dict[str, Any]] = {
        "what": {"choices": LISTS, "help": "compare these"},
        "--seconds": {"type": float, "default": 3600, "help": "begin no comparison after this many seconds (3600)"},
        "--each": {"type": float, "default": 0.25, "help": "spend this many seconds on a comparison (0.25)"},
        "--tiny": {"action": "store_true", "help": "shrink the shapes and leave out float32, for a rehearsal"},
    }
    args = common.parse(__doc__, arguments, options)
    deadline = time.monotonic() + args.seconds
    run, works = common.Run(args.device, args.out), list(LISTS[args.what](args.tiny))
    rows: list[dict[str, object]] = []
    done = 0
    for work in takewhile(lambda _: time.monotonic() <= deadline, works):
        with run.going_on(str(work)):
            rows += measure(work, args.device, args.each, run)
            run.save(f"benchmark_ops {args.what}", rows)
        done += 1
        if args.device != "cpu":
            gc.collect()
            torch.cuda.empty_cache()
    if rows:
        common.print_table("median [quartiles]", rows)
    run.finish(f"{done} of {len(works)} comparisons made")


if __name__ == "__main__":
    main()
