"""Checks of arguments: errors name the caller, the argument, the expected value and the given one.

A wrong type is a TypeError. A wrong value is a ValueError.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from .dtypes import FLOATS
from .errors import InvalidType, InvalidValue, expect

MAX_TIMESTEPS: Final = 100_000
"""Largest number of timesteps T. The largest in the literature is 4000."""

_NUMBERS = (float, int, torch.SymFloat, torch.SymInt)


# ------------------------------------------------------------------------------------------------------------ plain values


def check_type(name: str, value: Any, kind: type, *, optional: bool = False) -> None:
    """Raise a TypeError unless `value` is a `kind`, or None with `optional`."""
    if not isinstance(value, kind) and not (optional and value is None):
        or_none = " or None" if optional else ""
        article = "an" if kind.__name__.startswith("O") else "a"  # an Objective
        raise InvalidType(name, f"to be {article} {kind.__name__}{or_none}", type(value).__name__)


def check_callable(name: str, value: Any) -> None:
    """Raise a TypeError unless `value` is callable or None."""
    if value is not None and not callable(value):
        raise InvalidType(name, "to be callable or None", type(value).__name__)


def check_path(name: str, value: Any) -> None:
    """Raise a TypeError unless `value` is a str or an os.PathLike, and a ValueError for an empty text.

    An unset variable gives one, which would mean the current folder.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise InvalidType(name, "to be a path (str or os.PathLike)", type(value).__name__)
    expect(value != "", name, "to be a path", "an empty text")


def check_dtype(name: str, value: Any, *, optional: bool = False) -> None:
    """Raise a TypeError unless `value` is a dtype that the package computes in."""
    if value not in FLOATS if isinstance(value, torch.dtype) else not (optional and value is None):
        wanted = "float32, float64, float16, bfloat16 or None" if optional else "float32, float64, float16 or bfloat16"
        raise InvalidType(name, f"to be {wanted}", repr(value))


def dtype_names(dtypes: Sequence[torch.dtype]) -> list[str]:
    """Return the names of dtypes as messages write them."""
    return [str(dtype).removeprefix("torch.") for dtype in dtypes]


def check_one_of(a_name: str, a: Any, b_name: str, b: Any) -> None:
    """Raise a ValueError unless exactly one of two arguments is given. None means not given."""
    if (a is None) == (b is None):
        raise InvalidValue("", f"exactly one of {a_name} and {b_name}", "neither" if a is None else "both")


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raise a TypeError unless `value` has the type of a choice, and a ValueError unless it is one of the choices."""
    if type(value) is str and value in choices:
        return
    kinds = tuple({type(choice) for choice in choices})
    if not isinstance(value, kinds) or value not in choices or (type(value) is bool and bool not in kinds):
        kind = InvalidValue if isinstance(value, kinds) else InvalidType
        named = ", ".join(str(choice) for choice in choices if choice is not None)
        some = [f"one of {named}" if ", " in named else named] if named else []
        wanted = " or ".join([*some, *(["None"] if None in choices else [])])
        raise kind(name, f"to be {wanted}", repr(value))


def check_ints(name: str, value: Any, low: int, form: str) -> None:
    """Raise a TypeError unless `value` is a sequence of ints, and a ValueError unless it has one and none is below `low`.

    Args:
        name: Name of the argument.
        value: The argument. A bool is not an int, and neither str nor bytes is a sequence.
        low: The least value.
        form: Description of such a sequence.
    """
    is_sequence = isinstance(value, (tuple, list, Sequence)) and not isinstance(value, (str, bytes))
    if not is_sequence or [each for each in value if not isinstance(each, (int, torch.SymInt)) or isinstance(each, bool)]:
        raise InvalidType(name, f"to be {form}", repr(value))
    if len(value) == 0 or [each for each in value if each < low]:
        raise InvalidValue(name, f"to be {form}, each at least {low}", list(value))


def check_int(name: str, value: Any, low: int | None = None, high: int | None = None, *, optional: bool = False) -> None:
    """Raise a TypeError unless `value` is an int, and a ValueError unless it is in low..high.

    Args:
        name: Name of the argument.
        value: The argument. A bool is not an int.
        low: The least value. None: any.
        high: The largest value. None: any.
        optional: Accept None.
    """
    if optional and value is None:
        return
    is_int = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
    if is_int and (low is None or value >= low) and (high is None or value <= high):
        return
    if high is not None:
        wanted = f"an integer in {low}..{high}"
    elif low is None:
        wanted = "an integer"
    else:
        wanted = "a positive integer" if low == 1 else f"an integer of at least {low}"
    kind = InvalidValue if is_int else InvalidType
    raise kind(name, f"to be {wanted}{' or None' if optional else ''}", repr(value))


def check_number(
    name: str,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    finite: bool = False,
    optional: bool = False,
) -> None:
    """Raise a TypeError unless `value` is a number, and a ValueError unless it is within the bounds.

    NaN is within no bounds.

    Args:
        name: Name of the argument.
        value: The argument. A bool is not a number.
        low: The least value. None: any.
        high: The largest value. None: any.
        above: An excluded lower bound, instead of `low`.
        below: An excluded upper bound, instead of `high`.
        finite: Exclude both infinities.
        optional: Accept None.
    """
    if optional and value is None:
        return
    or_none = " or None" if optional else ""
    if type(value) is not float:
        if not isinstance(value, _NUMBERS) or isinstance(value, bool):
            raise InvalidType(name, f"to be a number{or_none}", type(value).__name__)
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            raise InvalidValue(name, f"to be a number that fits in 64 bits{or_none}", repr(value))
    high_enough = (low is None or value >= low) and (above is None or value > above)
    low_enough = (high is None or value <= high) and (below is None or value < below)
    if not (high_enough and low_enough and (not finite or -math.inf < value < math.inf)):
        words = {"at least": low, "above": above, "at most": high, "below": below}
        bounds = [f"{word} {bound}" for word, bound in words.items() if bound is not None]
        bounds += ["finite"] * (finite and len(bounds) < 2)
        wanted = " and ".join("positive" if bound == "above 0" else bound for bound in bounds)
        raise InvalidValue(name, f"to be {wanted}{or_none}", repr(value))


def check_same(got: Mapping[str, Any], wanted: Mapping[str, Any], source: str, hint: str = "") -> None:
    """Raise a ValueError for the first value that differs from that of the same name elsewhere.

    Args:
        got: The values.
        wanted: The others. A name that is not there stands for None.
        source: Where the others are from.
        hint: How to go on with other values, or empty.
    """
    for name, value in got.items():
        if wanted.get(name) != value:
            raise InvalidValue(name, f"to be {wanted.get(name)!r:.200}, as in {source}", f"{value!r:.200}{hint}")


def as_json(value: Any) -> Any:
    """Return a value with lists in place of tuples, as JSON gives it back."""
    return [as_json(each) for each in value] if isinstance(value, (list, tuple)) else value


def first_few(values: Collection[Any]) -> str:
    """Return the first values as text, sorted, and the number of the others."""
    texts = sorted(map(str, values))
    return ", ".join(texts[:5]) + (f" and {len(texts) - 5} more" if len(texts) > 5 else "")


# ----------------------------------------------------------------------------------------------------------------- tensors


def check_storage(name: str, x: Tensor) -> None:
    """Raise a ValueError for a tensor without memory. Tensors of tracers and transforms are not checked."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta:
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(x) or x.layout is not torch.strided:
        return
    if x.data_ptr() == 0 and x.numel():
        raise InvalidValue(
            name,
            "to have memory",
            f"a tensor of {x.numel()} elements without (its storage was freed, or it is a zero tensor)",
        )


def check_strided(name: str, x: Tensor) -> None:
    """Raise a TypeError unless `x` is a tensor, and neither sparse nor nested nor of mkldnn."""
    if not isinstance(x, Tensor):
        raise InvalidType(name, "to be a tensor", type(x).__name__)
    if x.layout != torch.strided or x.is_nested:
        raise InvalidType(name, "to be a dense tensor", "a nested tensor" if x.is_nested else f"a tensor of layout {x.layout}")


def checked_device(device: Any) -> torch.device:
    """Return the device, or raise if it is unknown or this PyTorch cannot use it."""
    if not isinstance(device, (str, torch.device)):
        raise InvalidType("device", "to be a torch.device or its name", type(device).__name__)
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InvalidValue("device", "to be a torch.device or its name", repr(device)) from error
    if found.type == "cuda" and (found.index or 0) >= (count := torch.cuda.device_count()):
        raise InvalidValue("device", "to be available", f"{found}: PyTorch sees {count or 'no'} GPU")
    if found.type not in ("cpu", "meta") and not torch.compiler.is_compiling():
        try:
            torch.empty(0, device=found)
        except (AssertionError, RuntimeError) as error:
            reason = str(error).splitlines()[0].partition(". ")[0]
            raise InvalidValue("device", "to be available", f"{found}: PyTorch cannot use it: {reason}") from error
    return found


def computing_device(device: Any) -> torch.device:
    """Return the device. None means the GPU if there is one, or the CPU. Raise if nothing can run there."""
    found = checked_device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    if found.type == "meta":
        raise InvalidValue("device", "to be one that computes", "meta")
    return found


def check_float(name: str, x: Tensor, min_dim: int = 1, also: tuple[torch.dtype, ...] = ()) -> None:
    """Raise a TypeError or ValueError unless x is a floating tensor of at least min_dim dimensions.

    `also` are other dtypes that the caller takes.
    """
    if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_nested:
        check_strided(name, x)
    if x.dtype not in FLOATS and x.dtype not in also:
        *names, last = ("float32", "float64", "float16", "bfloat16", *dtype_names(also))
        raise InvalidType(name, f"to be {', '.join(names)} or {last}", x.dtype)
    if x.dim() < min_dim:
        raise InvalidValue(name, f"to have at least {min_dim} dimensions [N, ...]", f"shape {list(x.shape)}")


def check_map(name: str, x: Tensor) -> None:
    """Raise a TypeError or ValueError unless x is a floating tensor [N, C, H, W]."""
    check_float(name, x)
    if x.dim() != 4:
        raise InvalidValue(name, "to be [N, C, H, W]", f"shape {list(x.shape)}")


def check_finite_maps(name: str, x: Any, wanted: list[int]) -> None:
    """Raise a TypeError or ValueError unless x is a floating tensor of the shape `wanted`, finite if it is on a CPU."""
    if not isinstance(x, Tensor):
        raise InvalidType(name, "to be a tensor or None", type(x).__name__)
    check_values(name, x)
    expect(x.dtype in FLOATS and list(x.shape) == wanted, name, f"to be floating {wanted}", f"{x.dtype} {list(x.shape)}")
    if x.device.type == "cpu" and not x.isfinite().all():  # a GPU would have to be waited for
        raise InvalidValue(name, "to be finite", "NaN or infinity")


def check_device(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Raise a ValueError unless x is on the device of `like`."""
    if x.device != like.device:
        raise InvalidValue(name, f"on the device of {like_name}, {like.device}", x.device)


def checked_seeds(seeds: Tensor, n: int, device: torch.device, name: str = "seeds") -> Tensor:
    """Return int64 seeds [n] on the device, or raise."""
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64:
        got = seeds.dtype if isinstance(seeds, Tensor) else type(seeds).__name__
        raise InvalidType(name, "to be an int64 tensor (see sample_seeds)", got)
    if seeds.layout is not torch.strided:
        check_strided(name, seeds)
    try:
        if seeds.shape == (n,):
            return seeds.to(device).contiguous()
    except RuntimeError:
        check_values(name, seeds)
        raise
    raise InvalidValue(name, f"to have shape [{n}], one per sample", list(seeds.shape))


def check_values(name: str, x: Tensor) -> None:
    """Raise if `x` cannot be read or moved because it has no shape, no values or no memory."""
    check_strided(name, x)
    if x.is_meta:
        raise InvalidValue(name, "to have values", "a tensor on the meta device")
    check_storage(name, x)


def check_range(name: str, index: Tensor, bound: int) -> None:
    """Raise a ValueError if a CPU tensor has a value outside 0..bound-1.

    Kernels read tables at these indices. Inside torch.func transforms values are not available, and
    nothing is checked. Compiled code checks when a kernel runs, and not for the reference.
    """
    if torch.compiler.is_compiling():
        return
    if index.device.type == "cpu" and index.numel() and not torch._C._functorch.is_functorch_wrapped_tensor(index):
        if index.data_ptr() == 0:
            check_storage(name, index)
        low, high = torch.aminmax(index)
        if low < 0 or high >= bound:
            raise InvalidValue(name, f"in 0..{bound - 1}", f"values from {int(low)} to {int(high)}")
