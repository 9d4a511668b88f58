"""OpSpec: the declaration of an op, which its calls, its operator in torch.library and its derivative read."""

from __future__ import annotations

import inspect
import re
from collections import namedtuple
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

_KINDS: Final = {"torch.dtype": "ScalarType", "Sequence[int]": "SymInt[]"}  # annotations that torch.library names otherwise
_MAPS: Final = ("Map", "Image")


class Gradient(NamedTuple):
    """The gradient of an op.

    Attributes:
        compute: Function(arguments, results, grads, needs) that returns gradients by argument name. `needs` says by name
            whether a gradient is needed.
        reads: Arguments and results that `compute` reads, besides those of `saved`. The other tensors are None there. None:
            all tensor arguments.
    """

    compute: Callable[[Any, Any, Any, Any], dict[str, Tensor | None]]
    reads: tuple[str, ...] | None = None


class OpSpec:
    """An op, its backends and its gradient.

    Functions read arguments and results by name: `arguments.x`. The arguments end with `backend`, the backend that was
    chosen.

    Args:
        name: Name of the op, its native kernel, its Triton module and its launcher.
        reference: Definition in plain PyTorch. It returns the results, then those of `saved` if it has them. None: kernels
            alone compute the op.
        schema: Arguments in torch.library's syntax, with `Map` for a large tensor, or `Image` for one that kernels read in
            channels_last. None: those that the reference declares. The first map sets shape and dtype for the kernel, and the
            memory format of all maps. Any other tensor is made contiguous if it is neither contiguous nor channels_last.
        outputs: Result -> function(arguments) that allocates it. All but the first may return None, if the result is
            not wanted. The fake implementation calls the same functions.
        saved: Like `outputs`, for results that only the backward pass reads. A call does not return them.
        native: Function(results, arguments) that computes the results. None: the kernel of the op's name.
        has_triton: Whether there is a Triton launcher of the op's name.
        gradient: Its gradient. None: a call that needs a gradient uses the reference.
        fields: Field of the kernel -> function(arguments) that computes it, see `CompiledKernel`. None for an argument that
            is no field.
        check: Function(arguments) that raises for values out of range. It runs before a kernel or the reference.
        limits: Backend -> function(device, dtype, arguments) that returns why it cannot run, or None. It adds to what the
            backend requires of all ops. The arguments are None in a question about the device and dtype alone.
        is_default: Function(arguments) that returns whether native kernels are the default for them. None: always.

    Attributes:
        schema: Arguments as torch.library takes them.
        Arguments: Tuple type of the arguments and the backend by name. What is not given is None.
        Results: Tuple type of all results by name.
        allocate: Functions of the arguments that allocate the results.
        num_results: Number of results without those of `saved`.
        layout: Memory format of the maps. None: that of the first one.
        tensors: Positions of the arguments that are tensors.
        maps: Positions of those that are maps.
        small: Positions of the other tensors.
        main: Position of the tensor whose device and dtype decide on the backend.
        dtype: Position of an argument `dtype`, which is the result's. None: it is that of `main`.
        read: Positions of the arguments that the gradient reads.
        read_results: Positions of the results that the gradient reads.

    Raises:
        ImportError: `gradient` or `fields` name an argument or a result that does not exist.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any] | None = None,
        *,
        schema: str | None = None,
        outputs: Mapping[str, Callable[[Any], Tensor | None]],
        saved: Mapping[str, Callable[[Any], Tensor]] | None = None,
        native: Callable[[Any, Any], None] | None = None,
        has_triton: bool = False,
        gradient: Gradient | None = None,
        fields: Mapping[str, Callable[[Any], Any] | None] | None = None,
        check: Callable[[Any], None] | None = None,
        limits: Mapping[str, Callable[[torch.device, torch.dtype, Any], str | None]] | None = None,
        is_default: Callable[[Any], bool] | None = None,
    ) -> None:
        if schema is None:
            assert reference is not None
            schema = schema_of(reference)
        self.name, self.reference = name, reference
        self.schema = re.sub(r"\b(Map|Image)\b", "Tensor", schema)
        saved = saved or {}
        self.allocate, self.num_results = (*outputs.values(), *saved.values()), len(outputs)
        self.native, self.has_triton, self.gradient = native, has_triton, gradient
        self.fields, self.check, self.limits, self.is_default = fields or {}, check, limits or {}, is_default
        kinds, names = zip(*(part.split() for part in schema.split(", ")), strict=True)
        self.Arguments, self.Results = _named("Arguments", *names, "backend"), _named("Results", *outputs, *saved)
        self.layout = torch.channels_last if "Image" in schema else None
        self.tensors = [i for i, kind in enumerate(kinds) if kind.startswith(("Tensor", *_MAPS))]
        self.maps = [i for i in self.tensors if kinds[i].startswith(_MAPS)]
        self.small = [i for i in self.tensors if i not in self.maps]
        self.main = (self.maps or self.tensors)[0]
        self.dtype = names.index("dtype") if "dtype" in names else None
        reads = None if gradient is None else gradient.reads
        if unknown := {*(reads or ()), *(name for name, derive in self.fields.items() if derive is None)} - {*names, *outputs}:
            raise ImportError(f"ddpm_fast: {name} has no argument or result {', '.join(sorted(unknown))}")
        self.read = [i for i in self.tensors if reads is None or names[i] in reads]
        self.read_results = [i for i, each in enumerate(self.Results._fields) if each in saved or each in (reads or ())]


def schema_of(function: Callable[..., Any]) -> str:
    """Return the arguments of a function in torch.library's syntax, such as "Map x_t, Map? noise, int variance".

    The function's module must have `from __future__ import annotations`, which keeps annotations as text.
    """
    parts = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind, optional, _ = parameter.annotation.partition(" | None")
        parts.append(f"{_KINDS.get(kind, kind)}{'?' if optional else ''} {name}")
    return ", ".join(parts)


def _named(kind: str, *names: str) -> Any:
    """Return a tuple type whose fields have these names. What is not given is None."""
    return namedtuple(kind, names, defaults=[None] * len(names))
