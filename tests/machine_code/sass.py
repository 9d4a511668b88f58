"""Reads NVIDIA machine code (SASS): of every kernel in a cubin or a library its registers, local memory, and hot path.

The listing is cuobjdump's. It is cut into basic blocks, whose edges are the branches; an edge back to a block that comes before
closes a loop. A kernel's **hot path** is what a thread executes for whole vectors: once around the loop that holds the most
16-byte accesses to global memory or, where no loop holds any, from entry to exit. Of the ways from its first block to its last
it is one with the most 16-byte accesses or, where those of the simplest call are given, with the fewest that are no fewer (what
is switched on at run time brings more); it draws noise where there is code for that; of those that are left it computes the
most sigmoids, has the fewest other loads, and then the most instructions. A loop inside counts once; `Kernel.tiled_path` counts
some of them as often as they run. A conditional instruction counts like any other. `element_work` leaves out what a block's
threads do together. `COUNTED` in native.py and triton_cases.py says which path the figures of a kernel count.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import networkx  # torch needs it

WIDE = 16  # bytes of the widest access that all architectures have


CUOBJDUMP_IS_IN = "the CUDA toolkit and Triton's wheel, which the extra `test` brings, have it"


def tool(name: str) -> Path | None:
    """A program of the CUDA toolkit: from the PATH, the toolkit's folder, or Triton's wheel."""
    folders = [os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    found = shutil.which(name, path=os.pathsep.join(folders))
    return Path(found) if found else None


# -------------------------------------------------------------------------------------------------------- instructions


class Instruction(NamedTuple):
    """`@P0 LDG.E.128 R4, desc[UR4][R28.64]` has the opcode LDG.E.128 and is conditional."""

    address: int
    conditional: bool
    opcode: str
    operands: str

    def matches(self, pattern: str) -> bool:
        return re.match(pattern, self.opcode) is not None

    @property
    def target(self) -> int | None:
        """Return the target of a branch: its last operand, an address."""
        found = re.search(r"(?:^|[\s,(`])\(?0x([0-9a-f]+)\)?$", self.operands)
        return int(found.group(1), 16) if found else None

    @property
    def size(self) -> int:
        """Bytes that an access to memory moves."""
        size = re.search(r"\.(?:U|S)?(8|16|64|128|256)\b", self.opcode)
        return int(size.group(1)) // 8 if size else 4

    @property
    def global_bytes(self) -> int:
        """Bytes a thread loads from global memory or stores to it."""
        return self.size if self.matches(r"(LDG|STG|LD|ST)\.") else 0

    @property
    def _destinations(self) -> list[str]:
        """Return the operands that it writes: in front of a load's address, or the first one."""
        if self.matches("ST|RED|BRA|BAR|EXIT"):
            return []
        found = [operand.strip() for operand in self.operands.split(",")]
        return list(itertools.takewhile(lambda operand: "[" not in operand, found)) if self.matches(r"LD[GS]?\b") else found[:1]

    @property
    def writes(self) -> set[int]:
        """Numbers of the registers that it writes."""
        many = self.size // 4 if self.matches("LD") else 2 if self.matches(r"\w+\.WIDE|\w+\.64|CS2R$|F(FMA|ADD|MUL)2") else 1
        first = [int(operand[1:]) for operand in self._destinations if re.fullmatch(r"R\d+", operand)]
        return {number + k for number in first for k in range(max(many // len(first), 1))}

    @property
    def reads(self) -> set[int]:
        """Numbers of the registers that it names as inputs: of several in a row, the first."""
        inputs = self.operands.split(",")[len(self._destinations) :]
        return {int(number) for number in re.findall(r"\bR(\d+)\b", ",".join(inputs))}


_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;", re.MULTILINE)


def parse(listing: str) -> list[Instruction]:
    """The instructions of one kernel. No way leads to the padding at its end."""
    return [
        Instruction(int(address, 16), bool(predicate), opcode, operands)
        for address, predicate, opcode, operands in _LINE.findall(listing)
    ]


# ---------------------------------------------------------------------------------------------------------- basic blocks


class Accesses(NamedTuple):
    """Loads and stores of 16 bytes or more, to and from global memory."""

    loads: int
    stores: int


@dataclass
class Block:
    """Instructions that are executed together, and the blocks that may follow."""

    instructions: list[Instruction]
    successors: list[int]

    def count(self, pattern: str) -> int:
        return sum(i.matches(pattern) for i in self.instructions)

    @cached_property
    def wide(self) -> Accesses:
        wide = [i for i in self.instructions if i.global_bytes >= WIDE]
        return Accesses(*(sum(i.matches(kind) for i in wide) for kind in ("LD", "ST")))

    @cached_property
    def products(self) -> int:
        """Wide products of integers: Philox is made of them."""
        return self.count(r"U?IMAD\.(WIDE|HI)")

    @cached_property
    def shared(self) -> int:
        """Bytes that a thread loads from shared memory."""
        return sum(i.size for i in self.instructions if i.matches("LDS"))


def control_flow(code: Sequence[Instruction]) -> dict[int, Block]:
    """Blocks by address; the first is the entry. What follows a call is what is behind it: subroutines are rare paths."""
    jumps: dict[int, int | None] = {}  # address -> target; None: the end
    barriers: dict[str, int] = {}  # convergence barrier -> where its threads meet
    after = {a.address: b.address for a, b in pairwise(code)}
    for i in code:
        if i.matches(r"BRX|JMX"):
            raise ValueError(f"indirect branch at {i.address:#x}: where it goes is not in the listing")
        if i.matches(r"(U?BRA|JMP)\b") or (i.matches("CALL") and not _returns(code, i.target)):
            jumps[i.address] = i.target
        elif i.matches(r"EXIT|RET\b|KILL"):
            jumps[i.address] = None
        elif i.opcode.startswith("BSSY") and i.target is not None:
            barriers[re.findall(r"B\d+", i.operands)[0]] = i.target
        elif i.opcode.startswith("BSYNC"):
            meeting = barriers.get(i.operands, 0)
            if meeting > after.get(i.address, meeting):
                jumps[i.address] = meeting
    leaders = {code[0].address, *(t for t in jumps.values() if t is not None)}
    leaders |= {after[address] for address in jumps if address in after}
    blocks: dict[int, Block] = {}
    for i in code:
        if i.address in leaders:
            block = blocks[i.address] = Block([], [])
        block.instructions.append(i)
    addresses = list(blocks)
    for address, following in zip(addresses, [*addresses[1:], None], strict=True):
        block = blocks[address]
        last = block.instructions[-1]
        falls_through = last.address not in jumps or last.conditional or "," in last.operands
        jump = jumps.get(last.address)
        block.successors = [s for s in (following if falls_through else None, jump) if s is not None and s in blocks]
    return blocks


def _returns(code: Sequence[Instruction], target: int | None) -> bool:
    """Return whether there is a subroutine at `target`. The compiler also writes plain branches as calls."""
    ends = (i for i in code if target is not None and i.address >= target and not i.conditional)
    return next((i.matches("RET") for i in ends if i.matches(r"RET\b|EXIT")), True)


def _order(blocks: Mapping[int, Block]) -> list[int]:
    """Reverse postorder from the entry: without the edges back, every block comes before its successors."""
    graph = networkx.DiGraph({address: block.successors for address, block in blocks.items()})
    return list(networkx.dfs_postorder_nodes(graph, next(iter(blocks))))[::-1]


def loops(blocks: Mapping[int, Block]) -> dict[int, set[int]]:
    """Header -> the blocks of its loop."""
    order = _order(blocks)
    edges = [(block, successor) for block in order for successor in blocks[block].successors]
    found: dict[int, set[int]] = {}
    for source, header in edges:
        if order.index(header) <= order.index(source):
            # The blocks that lead to the edge back, without the header.
            graph = networkx.DiGraph([edge for edge in edges if edge[1] != header])
            found.setdefault(header, {header}).update({source}, networkx.ancestors(graph, source) if source in graph else ())
    return found


PHILOX_PRODUCTS = 20  # two in each of ten rounds
SIGMOID = r"MUFU\.EX2"  # one each: nothing else in the kernels takes an exponential


class _Does(NamedTuple):
    """Events on a path: 16-byte accesses, whether noise is drawn, and sigmoids."""

    loads: int
    stores: int
    draws: bool
    sigmoids: int


_Way = tuple[int, int, list[int]]  # to the end of a region: minus its other loads, its length, its blocks; the largest is best


def _hot(
    blocks: Mapping[int, Block], region: set[int], start: int, back_to: int | None, accesses: Accesses | None
) -> list[Instruction]:
    """The hot way through `region`: from `start` to where control leaves the kernel or, in a loop, goes back to its header."""
    order = [block for block in _order(blocks) if block in region]
    place = {block: i for i, block in enumerate(order)}
    draws = max(order, key=lambda block: blocks[block].products)
    drawing = blocks[draws].products >= PHILOX_PRODUCTS
    best: dict[int, dict[_Does, _Way]] = {}
    for address in reversed(order):
        block = blocks[address]
        ends = back_to in block.successors if back_to is not None else not block.successors
        tails: list[tuple[_Does, _Way]] = [(_Does(0, 0, False, 0), (0, 0, []))] if ends else []
        for successor in block.successors:
            if successor in best and place[successor] > place[address]:
                tails += best[successor].items()
        mine = best[address] = {}
        for does, (other_loads, length, passed) in tails:
            loads, stores = does.loads + block.wide.loads, does.stores + block.wide.stores
            drawn = does.draws or (drawing and address == draws)
            does = _Does(loads, stores, drawn, does.sigmoids + block.count(SIGMOID))
            way = (other_loads - block.count("LDG"), length + len(block.instructions), [address, *passed])
            mine[does] = max(way, mine.get(does, way))
    found = {does: way for does, way in best[start].items() if does.draws == drawing}
    if accesses is None:
        chosen = max(found, key=lambda does: (does.loads + does.stores, does.sigmoids, found[does]))
    else:
        enough = [does for does in found if does.loads >= accesses.loads and does.stores >= accesses.stores]
        if not enough:
            raise ValueError(f"no way with {accesses}; there are {sorted(found)}")
        chosen = min(enough)
    return [i for block in found[chosen][2] for i in blocks[block].instructions]


# ---------------------------------------------------------------------------------------------------------- what is read


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture.

    Attributes:
        architecture: such as sm_90a.
        stack, local: bytes a thread of memory that is no register.
    """

    name: str
    architecture: str
    registers: int
    stack: int
    local: int
    code: list[Instruction]

    @cached_property
    def blocks(self) -> dict[int, Block]:
        return control_flow(self.code)

    @cached_property
    def loops(self) -> dict[int, set[int]]:
        """Header -> blocks."""
        return loops(self.blocks)

    def body(self, header: int, *, inner: bool = True) -> Block:
        """Return the instructions of a loop, with or without its inner loops, as if they were one block."""
        blocks = self.loops[header]
        if not inner:
            blocks = blocks.difference(*(self.loops[other] for other in blocks - {header} if other in self.loops))
        return Block([i for block in blocks for i in self.blocks[block].instructions], [])

    def main_loop(self, staged: bool = False) -> int | None:
        """Header of the loop with the most 16-byte accesses; None where no loop has any.

        staged: of those that read shared memory (the compiler may have made one for each way to get the noise).
        """
        own = {header: self.body(header, inner=False) for header in self.loops}
        candidates = [header for header, block in own.items() if sum(block.wide) and (block.shared or not staged)]
        return max(candidates, key=lambda header: sum(own[header].wide), default=None)

    def hot_path(self, accesses: Accesses | None = None, *, staged: bool = False) -> list[Instruction]:
        header = self.main_loop(staged)
        if header is None:
            return _hot(self.blocks, set(self.blocks), next(iter(self.blocks)), None, accesses)
        return _hot(self.blocks, self.loops[header], header, header, accesses)

    def tiled_path(self, vectors: int) -> list[Instruction]:
        """Return the path of a thread for a tile of several vectors. It loads them together and stores some at a time.

        Once around the longest loop that loads vectors or, where a kernel has one tile, from entry to exit. A loop on the way
        that stores vectors and loads none runs until all of them are stored.
        """
        bodies = {header: self.body(header) for header in self.loops}
        loading = [header for header, body in bodies.items() if body.wide.loads]
        header = max(loading, key=lambda header: len(bodies[header].instructions), default=None)
        region = set(self.blocks) if header is None else self.loops[header]
        start = next(iter(self.blocks)) if header is None else header
        path = _hot(self.blocks, region, start, header, None)
        passed = {instruction.address for instruction in path}
        for storing in self.loops.keys() & passed:
            if bodies[storing].wide.stores and not bodies[storing].wide.loads:
                once = _hot(self.blocks, self.loops[storing], storing, storing, None)
                stores = sum(i.matches("ST") and i.global_bytes >= WIDE for i in once)
                path += once * (vectors // stores - 1)
        return path

    def drawing_loop(self) -> list[Instruction]:
        """Once around the loop that draws noise; nothing where no loop does."""
        for header, region in self.loops.items():
            if self.body(header, inner=False).products >= PHILOX_PRODUCTS:
                return _hot(self.blocks, region, header, header, None)
        return []


COLLECTIVE = r"(SHFL|BAR|REDUX|CREDUX|UCGABAR_\w+)\b"  # what a warp's, a block's or a cluster's threads do together


def element_work(path: Sequence[Instruction]) -> list[Instruction]:
    """Return a path without shuffles, barriers and the merges of what threads have found.

    Shuffles and barriers cut the path into stretches. A merge is a stretch that neither reads a register with a part of a
    vector nor accesses one in global memory. How often its loops run depends on the threads and blocks of a launch.
    """
    kept: list[Instruction] = []
    stretch: list[Instruction] = []
    touches = False
    vectors: set[int] = set()  # registers that hold what wide loads brought
    for i in path:
        if i.matches(COLLECTIVE):
            kept += stretch if touches else []
            stretch, touches = [], False
            continue
        stretch.append(i)
        touches |= i.global_bytes >= WIDE or not vectors.isdisjoint(i.reads)
        if i.matches("LD") and i.global_bytes >= WIDE:
            vectors |= i.writes
        elif not i.conditional:
            vectors -= i.writes
    return kept + (stretch if touches else [])


@dataclass(frozen=True)
class Figures:
    """Figures of a kernel's machine code.

    Attributes:
        registers: a thread's.
        spills: accesses to local memory, or 1 if there is such memory without any. Never any.
        atomics: operations whose order, and so the result's last bits, would depend on timing. Never any.
        instructions: an element, on the hot path (see `sass`).
        mufu: of these, those for the special-function unit, which starts a quarter warp a clock and not a whole one.
        wide: per cent of the hot path's global memory traffic in accesses of 16 bytes or more.
        merges: instructions of a thread that the hot path leaves out, as what merges the findings of a block's threads.
    """

    registers: int
    spills: int
    atomics: int
    instructions: float
    mufu: float
    wide: int
    merges: int = 0

    @classmethod
    def of(cls, kernel: Kernel, paths: Sequence[tuple[Sequence[Instruction], float]], merges: int = 0) -> Figures:
        """Take the figures of hot paths, with the elements that a thread handles on each."""
        everything = Block(kernel.code, [])
        sizes = [i.global_bytes for path, _ in paths for i in path]
        return cls(
            registers=kernel.registers,
            spills=everything.count(r"(LDL|STL)\b") or int(kernel.stack + kernel.local > 0),
            atomics=everything.count(r"(U?ATOM|U?RED|ATOMG|ATOMS|REDG|REDAS|UBLKRED|UTMAREDG)\b"),
            instructions=round(sum(len(path) / elements for path, elements in paths), 1),
            mufu=round(sum(sum(i.matches("MUFU") for i in path) / elements for path, elements in paths), 2),
            wide=round(100 * sum(size for size in sizes if size >= WIDE) / max(sum(sizes), 1)),
            merges=merges,
        )


def kernels(file: Path) -> Iterator[Kernel]:
    """Every kernel for every architecture in a cubin or a library."""
    command = [str(tool("cuobjdump")), "-sass", "-res-usage", file]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Each architecture has the kernels' resources, the line "code for sm_...", the kernels' listings.
    parts = re.split(r"^[ \t]*code for (sm_\w+)$", text, flags=re.MULTILINE)
    for before, architecture, section in zip(parts[::2], parts[1::2], parts[2::2], strict=False):
        resources = dict(re.findall(r"^ Function (\S+):\n\s+(REG:.*)$", before, re.MULTILINE))
        names = re.split(r"^\s*Function : (\S+)$", section, flags=re.MULTILINE)[1:]
        for name, listing in zip(names[::2], names[1::2], strict=True):
            used = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", resources[name])}
            yield Kernel(name, architecture, used["REG"], used["STACK"], used["LOCAL"], parse(listing))


def demangled(names: Sequence[str]) -> list[str]:
    """`q_sample q_sample_kernel<float, 4>` for every mangled name: the source, no return type, namespaces or parameters."""
    done = subprocess.run([str(tool("c++filt"))], input="\n".join(names), capture_output=True, text=True, check=True)
    return [f"{_source(name)} {_shortened(plain)}" for name, plain in zip(names, done.stdout.splitlines(), strict=True)]


def _source(mangled: str) -> str:
    """Nvcc calls a file's unnamed namespace _GLOBAL__N__, a hash, the length of the file's name, that name, another hash."""
    found = re.search(r"_GLOBAL__N__[0-9a-f]+_(\d+)_", mangled)
    return mangled[found.end() :][: int(found.group(1))].removesuffix("_cu") if found else "-"


def _shortened(name: str) -> str:
    name = re.sub(r"^void ", "", name)
    name = re.sub(r"\b\w+::|\(anonymous namespace\)::", "", name)
    name = re.sub(r"\([\w ]+\)(-?\d+)", r"\1", name)  # (int)4 is 4, and so is an enumerator
    found = re.match(r"\w+(<[^()]*>)?", name)  # up to the parameters
    return found[0] if found else name
