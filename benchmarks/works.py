"""The comparisons: an op at a shape, a dtype, a layout and a direction, and the lists of them that decide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import common
from op_cases import SCHEDULE, Case, bytes_moved

from ddpm_fast import ddpm_plan

BACKWARD = ("group_norm_silu", "denoising_loss", "conv3x3", "attention")  # ops with a backward kernel
PEERS = ("native", "triton", "eager", "compile")  # the reference is a definition: its noise is slow


@dataclass(frozen=True)
class Work:
    """A comparison of peers at one op, shape, dtype, layout and direction."""

    case: Case
    dtype: str = "float32"
    layout: str = "contiguous"
    direction: str = "forward"
    peers: tuple[str, ...] = PEERS

    def __str__(self) -> str:
        return " ".join(str(value) for value in self.columns().values())

    def columns(self) -> dict[str, object]:
        shape = "x".join(map(str, self.case.shape))
        return {"op": self.case.op, "case": self.case.name, "shape": shape} | {
            name: getattr(self, name) for name in ("dtype", "layout", "direction")
        }

    @property
    def moved(self) -> int:
        """The bytes that fused kernels read and write."""
        return bytes_moved(self.case, common.DTYPES[self.dtype], backward=self.direction == "backward")


def product(case_list: Iterable[Case], dtypes: Sequence[str] = tuple(common.DTYPES)) -> Iterator[Work]:
    """Yield the comparisons of each case in its layouts and directions."""
    for case in case_list:
        for dtype in dtypes:
            for layout in common.FORMATS if len(case.shape) == 4 else ("contiguous",):
                for direction in ("forward", "backward") if case.op in BACKWARD else ("forward",):
                    yield Work(case, dtype, layout, direction)


def elementwise_cases(shape: tuple[int, ...]) -> list[Case]:
    name = "x".join(map(str, shape))
    plan = {"plan": ddpm_plan(SCHEDULE)}
    options: dict[str, dict[str, Any]] = {"reverse_step": plan, "q_sample": {}, "noise": {}, "denoising_loss": {}}
    return [*(Case(op, name, shape, each) for op, each in options.items()), Case("q_sample", "uint8", shape, {"uint8": True})]


def deciding(tiny: bool = False) -> Iterator[Work]:
    """Yield the shapes that decide. Each moves more than twice an H100's L2. `tiny` shrinks them for a rehearsal."""
    pictures = (4, 3, 8, 8) if tiny else (320, 3, 256, 256)
    for work in product(elementwise_cases(pictures), ("bf16",) if tiny else ("bf16", "float32")):
        yield replace(work, peers=("native", "eager"))
    for work in _deciding_norms(tiny):
        as_in_sampling = (work.dtype, work.layout) == ("bf16", "channels_last")
        yield replace(work, peers=("native", "eager", *(["triton"] if as_in_sampling and not tiny else [])))


def deciding_compiled(tiny: bool = False) -> Iterator[Work]:
    """Yield the norms that decide, as in sampling, beside torch.compile."""
    for work in _deciding_norms(tiny):
        if (work.dtype, work.layout) == ("bf16", "channels_last"):
            yield replace(work, peers=("native", "compile"))


def _deciding_norms(tiny: bool) -> Iterator[Work]:
    maps = [(4, 32, 8, 8), (2, 64, 16, 16)] if tiny else [(256, 128, 32, 32), (8, 128, 256, 256)]
    cases = [Case("group_norm_silu", "x".join(map(str, each)), each, {"shift": True}) for each in maps]
    yield from product(cases, ("bf16",) if tiny else ("bf16", "float32"))


LISTS = {"deciding": deciding, "deciding-compiled": deciding_compiled}
