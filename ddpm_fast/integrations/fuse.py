"""`fuse`: GroupNorm with modulation and SiLU in one pass, in models of other libraries.

`_KINDS` is the table of known modules. `fuse` checks each module of the model against its row: by the names of its parts, and
by a trial that compares both forwards on a copy with random weights. Then `swap` gives it a class with the fused forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from ..errors import InvalidType, public
from ..nn.comparison import why_watched
from ..nn.layers import GroupNormSiLU
from .foreign import random_copy
from .fused_blocks import (
    FusedSequential,
    HeadPart,
    ResBlock,
    ResnetBlock2D,
    Swapped,
    UNetBlock,
    is_group_norm,
    is_silu,
    own_class,
    swap,
)


@dataclass(frozen=True)
class FuseReport:
    """Result of `fuse`. Printing it gives a summary.

    Attributes:
        fused: Class of the module that computes it, by the name of each fused group norm.
        left: Reason, by the name of each other group norm. Those of this package are left out.
    """

    fused: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} of {len(self.fused) + len(self.left)} group norms fused with the SiLU that follows"]
        lines += [f"  {count} fused: {text}" for text, count in Counter(self.fused.values()).items()]
        lines += [f"  {count} left: {reason}" for reason, count in Counter(self.left.values()).items()]
        return "\n".join(lines)


@public()
def fuse(model: nn.Module) -> FuseReport:
    """Replace every GroupNorm followed by SiLU with `ddpm_fast.group_norm_silu`, in place.

    Supported modules:

    - diffusers: `ResnetBlock2D` and the heads `conv_norm_out`, `conv_act`, and so `UNet2DModel`,
      `UNet2DConditionModel`, `AutoencoderKL`, ...
    - `ResBlock` of guided-diffusion, improved-diffusion and their descendants.
    - `UNetBlock` of EDM.
    - Any `nn.Sequential` with the two layers in a row.

    Blocks fuse the time embedding too, as a shift before the norm or as a scale and a shift after it.

    Outputs and gradients are equal up to rounding. In half precision, statistics, modulation and SiLU are
    float32 and rounded once. Parameters, buffers, names and modules do not change. State dicts, optimizers,
    training, autocast, checkpointing, `torch.compile`, `deepcopy` and pickle work as before.

    A fused block or `Sequential` becomes an instance of a subclass with the same name and another
    `forward`. In a diffusers head the norm itself computes SiLU, and the activation returns its input.
    Blocks are recognized by class name and contents. Many projects contain changed copies of these
    classes. A block is therefore fused only if a copy with random weights gives the same outputs both ways.
    Modules are left alone if fusing would skip their hooks.

    A fused module does not call its norms and activations as before. If these are replaced, patched or given hooks later, its
    results may be wrong: call `fuse` again. It starts from the unfused model.

    Args:
        model: Any module, on any device.

    Returns:
        Report of fused and unfused group norms.

    Raises:
        TypeError: `model` is not an `nn.Module`.
    """
    _check_model(model)
    unfuse(model)
    fused: dict[str, str] = {}
    left: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        for known, kind in _kinds(module):
            norms = [f"{name}.{path}".lstrip(".") for path in kind.norms]
            if not fused.keys().isdisjoint(norms):
                continue  # a `Sequential` in a fused block
            reason = _why_not(known, kind, module, model)
            if reason is not None:
                reasons |= dict.fromkeys(norms, reason)
                continue
            fused |= dict.fromkeys(norms, type(module).__name__)
            for path, mixin in kind.swaps.items():
                swap(module.get_submodule(path), mixin)
    for name, module in model.named_modules():
        norm = is_group_norm(module) or (isinstance(module, nn.GroupNorm) and not isinstance(module, GroupNormSiLU))
        if norm and name not in fused:
            parent = type(model.get_submodule(name.rpartition(".")[0])).__name__
            left[name] = reasons.get(name) or f"no known SiLU follows it in {parent}"
    return FuseReport(fused, left)


@public()
def unfuse(model: nn.Module) -> None:
    """Undo `fuse`: restore the class of every module. The model's tensors do not change.

    Args:
        model: The model.

    Raises:
        TypeError: `model` is not an `nn.Module`.
    """
    _check_model(model)
    for module in model.modules():
        if isinstance(module, Swapped):
            module.__class__ = own_class(module)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        hint = ", whose network is pipe.unet" if isinstance(getattr(model, "unet", None), nn.Module) else ""
        raise InvalidType("model", "to be an nn.Module", f"{type(model).__name__}{hint}")


# ------------------------------------------------------------------------------------------------------------- known modules


@dataclass(frozen=True)
class _Kind:
    """A row of the table: a kind of module that can be fused.

    Attributes:
        norms: Paths of the norms, such as "in_layers.0", which the fused forward does not call.
        skipped: Paths of the activations and of each `Sequential` that it does not call.
        swaps: New classes, by path. The path of the module itself is "".
        trials: Function of the module for the modules whose outputs must stay the same, each with the shapes of its inputs.
        method: Method that the fused forward replaces.
    """

    norms: tuple[str, ...]
    skipped: tuple[str, ...]
    swaps: Mapping[str, type[Swapped]]
    trials: Callable[[Any], list[tuple[Any, ...]]]
    method: str = "forward"


_KINDS = {  # by the name of the class or of a base class
    "ResnetBlock2D": _Kind(
        norms=("norm1", "norm2"),
        skipped=("nonlinearity",),
        swaps={"": ResnetBlock2D},
        trials=lambda block: [
            (
                block,
                (2, block.conv1.weight.shape[1], 8, 8),
                None if block.time_emb_proj is None else (2, block.time_emb_proj.in_features),
            )
        ],
    ),
    "ResBlock": _Kind(
        norms=("in_layers.0", "out_layers.0"),
        skipped=("in_layers.1", "out_layers.1", "in_layers", "out_layers"),
        swaps={"": ResBlock},
        trials=lambda block: [
            (
                block,
                (2, block.in_layers[-1].weight.shape[1], *(8,) * (block.in_layers[-1].weight.dim() - 2)),
                (2, block.emb_layers[-1].in_features),
            )
        ],
        method="_forward",  # `forward` wraps it in checkpointing
    ),
    "UNetBlock": _Kind(
        norms=("norm0", "norm1"),
        skipped=(),
        swaps={"": UNetBlock},
        trials=lambda block: [(block, (2, block.conv0.weight.shape[1], 8, 8), (2, block.affine.in_features))],
    ),
}
_HEAD = _Kind(  # any class of diffusers may have one: conv_out(conv_act(conv_norm_out(x)))
    norms=("conv_norm_out",),
    skipped=("conv_act",),
    swaps={"conv_norm_out": HeadPart, "conv_act": HeadPart},
    trials=lambda head: [_pair(head.conv_norm_out, head.conv_act)],
)


def _pair(norm: Any, silu: Any) -> tuple[Any, ...]:
    """Return the trial of a norm and an activation."""
    return nn.Sequential(norm, silu), (2, norm.num_groups if norm.weight is None else len(norm.weight), 8, 8)


def _kinds(module: nn.Module) -> Iterator[tuple[type, _Kind]]:
    """Yield the rows for a module, each with the class that it knows."""
    yield from ((known, _KINDS[known.__name__]) for known in type(module).__mro__ if known.__name__ in _KINDS)
    # A class of TorchScript has no forward.
    is_diffusers = getattr(getattr(type(module), "forward", None), "__module__", "").startswith("diffusers.")
    if is_diffusers and hasattr(module, "conv_norm_out") and hasattr(module, "conv_act"):
        yield type(module), _HEAD
    layers = module._modules.items() if isinstance(module, nn.Sequential) else ()
    pairs = [(norm, silu) for norm, silu in pairwise(layers) if is_group_norm(norm[1]) and is_silu(silu[1])]
    if pairs:
        norms, skipped = (tuple(name for name, _ in parts) for parts in zip(*pairs, strict=True))
        yield nn.Sequential, _Kind(norms, skipped, {"": FusedSequential}, lambda _: [_pair(a, b) for (_, a), (_, b) in pairs])


# --------------------------------------------------------------------------------------------------------------- the checks


def _why_not(known: type, kind: _Kind, module: nn.Module, model: nn.Module) -> str | None:
    """Return why a module of the model is left alone, or None if the fused forward computes the same on a trial."""
    name, generator = type(module).__name__, torch.Generator().manual_seed(0)
    if kind.method in vars(module) or getattr(type(module), kind.method) is not getattr(known, kind.method):
        return f"{name} has another {kind.method} than the known class"
    try:
        for path in (*kind.norms, *kind.skipped):
            part = attrgetter(path)(module)
            fits = is_group_norm(part) if path in kind.norms else is_silu(part) or isinstance(part, nn.Sequential)
            why = why_watched(part) if fits else f"is a {type(part).__name__}"
            if path in kind.swaps and sum(child is part for each in model.modules() for child in each.children()) > 1:
                why = "is used elsewhere, too"
            if why is not None:
                return f"{name}.{path} {why}"
        for trial, *shapes in kind.trials(module):
            twin = random_copy(trial)
            inputs = [shape and torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") for shape in shapes]
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                expected = twin(*inputs)
                error = (swap(twin, kind.swaps.get("", FusedSequential))(*inputs) - expected).norm() / expected.norm()
            if not error < 1e-4:
                return f"{name} computes something else than the known class of that name"
    except Exception as failure:  # foreign code may raise anything
        return f"{name} could not be tried: {type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
    return None
