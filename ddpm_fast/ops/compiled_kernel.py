"""The compiled kernel of an op: the values of its fields, and its launch on a CPU or a GPU.

csrc/common/args.h lists the fields of each kernel. The compiled module has their names, so values are found by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, Final

import torch
from torch import Tensor

from ..dtypes import FLOATS
from ..errors import InvalidValue
from .backend import KERNELS
from .op_spec import OpSpec

_DTYPE_CODES: Final = {dtype: code for code, dtype in enumerate((*FLOATS, torch.uint8))}
_SHAPE: Final = ("dtype", "n", "c", "hw", "channels_last")  # fields that the main tensor fills
_LAUNCH: Final = ("workspace", "stream_or_threads")
_BUILD_AGAIN: Final = "build it again (pip install -e . or make build)"


class CompiledKernel:
    """The kernel of an op's name in the compiled module.

    A field takes the argument or the result of its name. `<name>_dtype`, the sizes and the threads are filled too.

    Args:
        spec: The op. Its main tensor sets dtype and sizes if it is a map, or else its first result does.

    Raises:
        ImportError: A field has no value, or an argument or a result has no field.
    """

    def __init__(self, spec: OpSpec) -> None:
        self.name, name, arguments, results = spec.name, spec.name, spec.Arguments._fields[:-1], spec.Results._fields
        self._main = spec.main if spec.maps else None
        derived = {field: derive for field, derive in spec.fields.items() if derive is not None}
        self._derived = tuple(derived.values())
        modules = [getattr(module, "fields", {}) for module in KERNELS.values()]
        self.fields: tuple[str, ...] = next((fields[name] for fields in modules if name in fields), ())
        self._typed = [i for i in spec.tensors if f"{arguments[i]}_dtype" in self.fields]
        typed = (f"{arguments[i]}_dtype" for i in self._typed)
        given = (*results, *arguments, "backend", *_SHAPE, *_LAUNCH, *typed, *derived)
        if not modules:
            return  # there is no compiled module
        if not self.fields:
            raise ImportError(f"ddpm_fast: the compiled module is older than this source and lacks {name}: {_BUILD_AGAIN}")
        without_value = [field for field in self.fields if field not in given]
        needed = {*results, *arguments, *derived, "stream_or_threads"} - (spec.fields.keys() - derived.keys())
        without_field = [each for each in given if each in needed and each not in self.fields]
        if without_value or without_field:
            raise ImportError(
                f"ddpm_fast: the compiled module does not fit this source: {name} has fields without a value: "
                f"{without_value or 'none'}, and values without a field: {without_field or 'none'}: {_BUILD_AGAIN}"
            )
        # If a name occurs twice, the last value is taken: a derived one replaces the argument.
        self._pick = itemgetter(*(len(given) - 1 - given[::-1].index(field) for field in self.fields))
        self._workspace = f"{name}_workspace" if "workspace" in self.fields else None

    def values(
        self, results: Any, arguments: Any, layout: torch.memory_format | None = None
    ) -> tuple[tuple[Any, ...], torch.device]:
        """Return the values of the fields for a CPU, without a scratch buffer, and the device of the tensors.

        `layout` is the format to assume if the main tensor has both, as a tensor with one channel has.
        """
        a, main = arguments, results[0] if self._main is None else arguments[self._main]
        given = [*results, *a, dtype_code(main.dtype), *sizes(main, layout), None, torch.get_num_threads()]
        given += [0 if a[i] is None else dtype_code(a[i].dtype) for i in self._typed]
        given += [derive(a) for derive in self._derived]
        return self._pick(given), main.device

    def replaced(self, values: tuple[Any, ...], field: str, value: Any) -> tuple[Any, ...]:
        """Return the values with another one for a field."""
        return tuple(value if name == field else each for name, each in zip(self.fields, values, strict=True))

    def workspace_size(self, kernels: Any, values: tuple[Any, ...]) -> int:
        """Return the bytes of the scratch buffer that a device's kernel asks for."""
        size_of = getattr(kernels, self._workspace or "", None)
        return int(size_of(*values)) if size_of is not None else 0

    def launch(self, results: Any, arguments: Any) -> None:
        """Run the kernel on a CPU, or launch it on the current stream of a GPU."""
        values, device = self.values(results, arguments)
        if device.type != "cpu":
            self._launch_on_gpu(values, device)
            return
        self._call(KERNELS["cpu"], values, device)

    def _launch_on_gpu(self, values: tuple[Any, ...], device: torch.device) -> None:
        stream, kernels = torch._C._cuda_getCurrentRawStream(device.index), KERNELS["cuda"]
        values = self.replaced(values, "stream_or_threads", stream)
        with torch.cuda.device(device):  # kernels ask the current device for its properties
            self._call(kernels, values, device)

    def _call(self, kernels: Any, values: tuple[Any, ...], device: torch.device) -> None:
        kernel = getattr(kernels, self.name)
        if self._workspace is None:
            kernel(*values)
            return
        try:
            kernel(*self._with_workspace(kernels, values, device))
        except RuntimeWarning as refused:  # by the card, for which it is planned in another way now
            kernel(*self._with_workspace(kernels, values, device))
            warnings.warn(refused, stacklevel=2)

    def _with_workspace(self, kernels: Any, values: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
        size = self.workspace_size(kernels, values)
        return self.replaced(values, "workspace", torch.empty(size, dtype=torch.uint8, device=device)) if size else values


# ---------------------------------------------------------------------------------------------------------------- memory


def dtype_code(dtype: torch.dtype) -> int | None:
    """Return the native module's code of a dtype, or None if it has none. Kernels refuse None."""
    return _DTYPE_CODES.get(dtype)


def is_dense(x: Tensor) -> bool:
    """Return whether x is contiguous or channels_last."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory format of a dense tensor."""
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def shared_format(tensors: Sequence[Tensor]) -> torch.memory_format:
    """Return the memory format that all tensors have. A tensor of one channel has both.

    Raises:
        ValueError: Tensors have different memory formats.
    """
    for layout in (torch.contiguous_format, torch.channels_last):
        if all(each.is_contiguous(memory_format=layout) for each in tensors):
            return layout
    raise InvalidValue("", "tensors of one memory format", f"strides {[each.stride() for each in tensors]}")


def sizes(x: Tensor, layout: torch.memory_format | None = None) -> tuple[int, int, int, int]:
    """Return n, c, hw and channels_last (0 or 1) of a dense tensor. `layout` is assumed if it has both formats."""
    n = x.shape[0]
    if x.is_contiguous() and layout is not torch.channels_last:
        c = x.shape[1] if x.dim() > 1 else 1
        return n, c, x.numel() // max(1, n * c), 0
    return n, x.shape[1], x.shape[2] * x.shape[3], 1
