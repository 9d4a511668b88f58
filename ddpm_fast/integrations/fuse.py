"""`fuse`: GroupNorm with modulation and SiLU in one pass, in models of other libraries.

`_KINDS` is the table of known modules. `fuse` walks over the model and takes three steps for each module:

1. `_find` looks for its rows in the table.
2. `_why_not` checks the module, and `_why_different` tries the fused forward on a copy.
3. `swap` gives it a class that has the fused forward.

Each call of a fused module checks the same row with `_why_called`. It falls back to the module's own forward.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from operator import attrgetter
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InvalidType
from ..nn.comparison import hooks_of, why_watched
from ..nn.layers import GroupNormSiLU
from ..ops import group_norm_silu

_PLAIN = "GroupNorm, SiLU"
_SHIFTED = "time added, GroupNorm, SiLU"
_MODULATED = "GroupNorm, scale and shift of time, SiLU"


@dataclass(frozen=True)
class FuseReport:
    """Result of `fuse`. Printing it gives a summary.

    Attributes:
        fused: Class and fused operations, by the name of each fused group norm.
        left: Reason, by the name of each other group norm.
    """

    fused: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} of {len(self.fused) + len(self.left)} group norms fused with the SiLU that follows"]
        for names, title in ((self.fused, ""), (self.left, "left: ")):
            for reason in dict.fromkeys(names.values()):
                of_it = [name for name, value in names.items() if value == reason]
                more = f", ... ({len(of_it)})" if len(of_it) > 2 else ""
                lines.append(f"  {title}{reason}: {', '.join(of_it[:2])}{more}")
        return "\n".join(lines)


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

    Modules may be replaced, changed or given hooks later. Each call of a fused module compares what it relies
    on: the classes of norms and activations, their hooks and patched forwards, and torch's global hooks. If
    one does not fit, the module's own forward runs.

    Args:
        model: Any module, on any device. A second call starts again from the unfused model.

    Returns:
        Report of fused and unfused group norms.

    Raises:
        TypeError: `model` is not an `nn.Module`.
    """
    _check_model("fuse", model)
    unfuse(model)
    names = {module: name for name, module in model.named_modules()}
    fused: dict[nn.Module, str] = {}
    reasons: dict[nn.Module, str] = {}
    verdicts: dict[object, str | None] = {}
    for module in names:
        for kind, method, news in _find(module, fused.keys()):
            reason = _why_not(kind, method, module, model) or _why_different(kind, module, verdicts)
            if reason is not None:
                reasons |= dict.fromkeys(news, reason)
            else:
                fused |= news
                for path, mixin in kind.swaps.items():
                    part = swap(module.get_submodule(path), mixin)
                    if path:
                        part._head = (module,)
    left = {
        module: reasons.get(module) or _why_not_found(model, module)
        for module in names
        if module not in fused and (isinstance(module, nn.GroupNorm) or _is_group_norm(module))
    }
    return FuseReport(*({names[module]: text for module, text in texts.items()} for texts in (fused, left)))


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`: restore the class of every module. The model's tensors do not change.

    Args:
        model: The model.

    Raises:
        TypeError: `model` is not an `nn.Module`.
    """
    _check_model("unfuse", model)
    for module in model.modules():
        if isinstance(module, _Fused):
            unswap(module)
            vars(module).pop("_head", None)


def _check_model(caller: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        hint = ", whose network is pipe.unet" if isinstance(getattr(model, "unet", None), nn.Module) else ""
        raise InvalidType(caller, "model", "to be an nn.Module", f"{type(model).__name__}{hint}")


# ------------------------------------------------------------------------------------------------------------ swapped classes


class Swapped:
    """First base of a class made by `swap`. The object's own class is the second base and gives the name.

    A patched method (`block.forward = ...`) is copied to places where it does not belong. Replicas would
    call the original's method, and pickle cannot store it. A class has neither problem and leaves nothing
    in the object. Names stay the same, because libraries depend on them for adapters, offloading and
    configurations.
    """

    swapped_from: type

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and copy the object as its own class does, then swap the copy.

        The swapped class is in no module, so pickle cannot find it.
        """
        make, arguments, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        mixin, own, swapped = type(self).__mro__[1], self.swapped_from, type(self)
        return (_remake, (mixin, make, tuple(own if argument is swapped else argument for argument in arguments)), *state)


def swap(thing: Any, mixin: type[Swapped]) -> Any:
    """Give `mixin`'s methods priority over those of the object's class. Return the object."""
    thing.__class__ = _swapped_class(mixin, type(thing))  # type: ignore[arg-type]  # mypy: a class is not hashable
    return thing


def own_class(thing: Any) -> type:
    """Return the object's class before `fuse`."""
    kind = type(thing)
    return getattr(kind, "swapped_from", kind)


def unswap(thing: Any) -> None:
    """Restore the class of an object that `swap` has changed."""
    thing.__class__ = thing.swapped_from


@cache  # one class of a kind, so that compiled code finds the class it was compiled for
def _swapped_class(mixin: type[Swapped], own: type) -> type:
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__, "swapped_from": own}
    return types.new_class(own.__name__, (mixin, own), exec_body=lambda body: body.update(names))


def _remake(mixin: type[Swapped], make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return swap(make(*arguments), mixin)


# ------------------------------------------------------------------------------------------------------- the fused forwards


class _Fused(Swapped):
    """Base of fused modules."""


class _ResnetBlock2D(_Fused):
    """Block of diffusers, diffusers/models/resnet.py."""

    def forward(self: Any, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        unusual = args or kwargs or (temb is None) != (self.time_emb_proj is None)  # deprecated or wrong: diffusers says so
        if unusual or _why_called(_KINDS["ResnetBlock2D"], self):
            return super().forward(input_tensor, temb, *args, **kwargs)  # type: ignore[no-any-return, misc]
        x, h = input_tensor, _norm_silu(self.norm1, input_tensor)
        if self.upsample is not None and len(x) >= 64:
            # PyTorch's nearest interpolation of large channels_last batches was wrong, so diffusers does this
            x, h = x.contiguous(), h.contiguous()
        resample = self.downsample if self.upsample is None else self.upsample
        if resample is not None:
            x, h = resample(x), resample(h)
        h = self.conv1(h)
        if temb is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else F.silu(temb))
        h = _norm_silu(self.norm2, h, temb, modulates=self.time_embedding_norm == "scale_shift")
        h = self.conv2(self.dropout(h))
        if self.conv_shortcut is not None:
            # contiguous in training, as in diffusers: DistributedDataParallel warns of gradients in another memory format
            x = self.conv_shortcut(x.contiguous() if self.training else x)
        return (x + h) / self.output_scale_factor  # type: ignore[no-any-return]


class _ResBlock(_Fused):
    """Block of openai/guided-diffusion, guided_diffusion/unet.py. improved-diffusion's has no resampling."""

    def _forward(self: Any, x: Tensor, emb: Tensor) -> Tensor:
        if _why_called(_KINDS["ResBlock"], self):
            return super()._forward(x, emb)  # type: ignore[no-any-return, misc]
        norm, _, conv = self.in_layers
        h = _norm_silu(norm, x)
        if getattr(self, "updown", False):
            x, h = self.x_upd(x), self.h_upd(h)
        h = conv(h)
        norm, _, *layers = self.out_layers
        h = _norm_silu(norm, h, self.emb_layers(emb), modulates=self.use_scale_shift_norm)
        for layer in layers:
            h = layer(h)
        return self.skip_connection(x) + h  # type: ignore[no-any-return]


class _UNetBlock(_Fused):
    """Block of NVlabs/edm, training/networks.py."""

    def forward(self: Any, x: Tensor, emb: Tensor) -> Tensor:
        if _why_called(_KINDS["UNetBlock"], self):
            return super().forward(x, emb)  # type: ignore[no-any-return, misc]
        h = self.conv0(_norm_silu(self.norm0, x))
        h = _norm_silu(self.norm1, h, self.affine(emb), modulates=self.adaptive_scale)
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        return self._attend(x) if self.num_heads else x

    def _attend(self: Any, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        qkv = self.qkv(self.norm2(x)).reshape(n * self.num_heads, c // self.num_heads, 3, height * width).transpose(1, 3)
        h = F.scaled_dot_product_attention(*qkv.unbind(2))  # q, k and v are each [N heads, HW, C / heads]
        return (self.proj(h.transpose(1, 2).reshape(n, c, height, width)) + x) * self.skip_scale  # type: ignore[no-any-return]


class _Sequential(_Fused):
    """A `Sequential` that computes a norm and the SiLU after it at once. Its slices do the same."""

    def forward(self: Any, input: Any) -> Any:
        layers = list(self)
        fused = [_is_bypassable_pair(*pair) for pair in zip(layers, [*layers[1:], None], strict=True)]
        for layer, with_next, with_previous in zip(layers, fused, [False, *fused[:-1]], strict=True):
            if not with_previous:
                input = _norm_silu(layer, input) if with_next else layer(input)
        return input


class _HeadPart(_Fused):
    """The norm of a diffusers head, which also computes SiLU, or the activation, which returns its input.

    Attributes:
        _head: The parent, in a tuple, so that it is no submodule.
    """

    _head: tuple[Any]

    def forward(self, input: Tensor) -> Any:
        (head,) = self._head
        as_fused = all(isinstance(part, _HeadPart) and part._head[0] is head for part in (head.conv_norm_out, head.conv_act))
        if not as_fused or "forward" in vars(head) or _why_called(_KINDS["head"], head):
            return super().forward(input)  # type: ignore[misc]
        return _norm_silu(self, input) if self is head.conv_norm_out else input


def _norm_silu(norm: Any, x: Tensor, time: Tensor | None = None, *, modulates: bool = False) -> Tensor:
    """Return SiLU(norm(x)) with the time embedding.

    `time` is [N, C] or [1, C], added before the norm. With `modulates` it is a scale and a shift after the
    norm, [N, 2 C] or [1, 2 C].
    """
    time = None if time is None else _fitting(time, x).expand(len(x), -1)
    return group_norm_silu(
        x,
        norm.num_groups,
        _fitting(norm.weight, x),
        _fitting(norm.bias, x),
        norm.eps,
        shift=None if modulates else time,
        scale_shift=time.chunk(2, dim=1) if modulates and time is not None else None,
    )


def _fitting(value: Any, x: Tensor) -> Any:
    """Return `value` in a dtype that the op accepts beside x."""
    return value if value is None or value.dtype in (x.dtype, torch.float32) else value.to(x.dtype)


# ------------------------------------------------------------------------------------------------------------- known modules


@dataclass(frozen=True)
class _Kind:
    """A row of the table: a kind of module that can be fused.

    A path names a child, such as "in_layers.0". Every function takes the module.

    Attributes:
        norms: Paths of the norms, which the fused forward does not call.
        activations: Paths of the activations that it does not call.
        swaps: New classes, by path. The path of the module itself is "".
        trials: Function for the modules whose outputs must stay the same, each with the shapes of its inputs.
        only_torchs: Whether norms and activations must be torch's own classes, because there is no trial.
        sequentials: Paths of each `Sequential` that it does not call. It calls the layers.
        method: Method that the fused forward replaces.
        defined_in: Prefix of the Python module that defines the method.
        second: Function for the operations that are fused at the second norm.
        fits: Function for whether all other parts are as the fused forward expects.
    """

    norms: tuple[str, ...]
    activations: tuple[str, ...]
    swaps: Mapping[str, type[_Fused]]
    trials: Callable[[Any], list[tuple[nn.Module, list[tuple[int, ...] | None]]]]
    only_torchs: bool = False
    sequentials: tuple[str, ...] = ()
    method: str = "forward"
    defined_in: str = ""
    second: Callable[[Any], str] = lambda module: _PLAIN
    fits: Callable[[Any], bool] = lambda module: True


_KINDS = {  # by the name of the class or of a base class
    "ResnetBlock2D": _Kind(
        norms=("norm1", "norm2"),
        activations=("nonlinearity",),
        swaps={"": _ResnetBlock2D},
        trials=lambda block: [
            (
                block,
                [
                    (2, block.conv1.weight.shape[1], 8, 8),
                    None if block.time_emb_proj is None else (2, block.time_emb_proj.in_features),
                ],
            )
        ],
        second=lambda block: (
            _MODULATED if block.time_embedding_norm == "scale_shift" else _PLAIN if block.time_emb_proj is None else _SHIFTED
        ),
        fits=lambda block: (
            block.time_embedding_norm in ("default", "scale_shift")
            if block.time_emb_proj is not None
            else block.time_embedding_norm != "scale_shift"  # an error, which diffusers raises
        ),
    ),
    "ResBlock": _Kind(
        norms=("in_layers.0", "out_layers.0"),
        activations=("in_layers.1", "out_layers.1"),
        swaps={"": _ResBlock},
        trials=lambda block: [
            (
                block,
                [
                    (2, block.in_layers[-1].weight.shape[1], *(8,) * (block.in_layers[-1].weight.dim() - 2)),
                    (2, block.emb_layers[-1].in_features),
                ],
            )
        ],
        sequentials=("in_layers", "out_layers"),
        method="_forward",  # `forward` wraps it in checkpointing
        second=lambda block: _MODULATED if block.use_scale_shift_norm else _SHIFTED,
        fits=lambda block: (
            type(ins := block.in_layers).forward in (nn.Sequential.forward, _Sequential.forward)
            and type(outs := block.out_layers).forward in (nn.Sequential.forward, _Sequential.forward)
            and [*ins._modules] == ["0", "1", "2"]
            and [*outs._modules][:2] == ["0", "1"]
            and len(outs) > 2
        ),
    ),
    "UNetBlock": _Kind(
        norms=("norm0", "norm1"),
        activations=(),
        swaps={"": _UNetBlock},
        trials=lambda block: [(block, [(2, block.conv0.weight.shape[1], 8, 8), (2, block.affine.in_features)])],
        second=lambda block: _MODULATED if block.adaptive_scale else _SHIFTED,
    ),
    "head": _Kind(  # any class of diffusers may have one: conv_out(conv_act(conv_norm_out(x)))
        norms=("conv_norm_out",),
        activations=("conv_act",),
        swaps={"conv_norm_out": _HeadPart, "conv_act": _HeadPart},
        trials=lambda head: [],
        only_torchs=True,
        defined_in="diffusers.",
    ),
}


def _sequential(module: nn.Module) -> _Kind:
    """Return the row of a `Sequential`, whose norms and activations depend on its layers."""
    pairs = [
        (norm, silu)
        for norm, silu in pairwise(module._modules.items() if isinstance(module, nn.Sequential) else ())
        if _is_group_norm(norm[1]) and _is_silu(silu[1])
    ]
    others: list[Any] = [(a, b) for (_, a), (_, b) in pairs if (type(a), type(b)) != (nn.GroupNorm, nn.SiLU)]
    return _Kind(
        norms=tuple(name for (name, _), _ in pairs),
        activations=tuple(name for _, (name, _) in pairs),
        swaps={"": _Sequential},
        trials=lambda _: [
            (nn.Sequential(norm, silu), [(2, norm.num_groups if norm.weight is None else len(norm.weight), 8, 8)])
            for norm, silu in others
        ],
        fits=lambda layers: type(layers).forward is nn.Sequential.forward,
    )


def _find(module: nn.Module, done: Set[nn.Module]) -> Iterator[tuple[_Kind, Any, dict[nn.Module, str]]]:
    """Yield each row for a module, the known class's method, and what to fuse at each norm that is not yet done."""
    for name, kind in (_KINDS | {"Sequential": _sequential(module)}).items():
        # A head may have any class. Another row names the class, or a base.
        known = next((cls for cls in type(module).__mro__ if name in (cls.__name__, "head")), None)
        try:
            method = getattr(known, kind.method)
            parts = {path: module.get_submodule(path) for path in (*kind.norms, *kind.activations, *kind.sequentials)}
            news = {
                parts[path]: f"{type(module).__name__}: {kind.second(module) if path in kind.norms[1:] else _PLAIN}"
                for path in kind.norms
                if parts[path] not in done
            }
            kind.trials(module)  # fails now rather than later
        except AttributeError:
            continue  # another class of that name
        if news and method.__module__.startswith(kind.defined_in):
            yield kind, method, news


# --------------------------------------------------------------------------------------------------------------- the checks


def _why_not(kind: _Kind, method: Any, module: nn.Module, model: nn.Module) -> str | None:
    """Return why a module of the model cannot be fused, or None if a trial can decide. `method` is the known class's."""
    if getattr(type(module), kind.method) is not method:
        return f"{type(module).__name__} overrides {kind.method}"
    if kind.method in vars(module):
        return f"a {type(module).__name__} whose {kind.method} is patched"
    for path in filter(None, kind.swaps):
        if sum(child is module.get_submodule(path) for parent in model.modules() for child in parent.children()) > 1:
            return f"{type(module).__name__}.{path} is used elsewhere, too"
    return _why_called(kind, module)


def _why_called(kind: _Kind, module: Any) -> str | None:
    """Return why a module's own forward must run, or None if the parts that the fused forward skips are as expected.

    `fuse` checks this, and each call of a fused module checks it again.
    """
    name = type(module).__name__
    if not kind.fits(module) or nn.modules.module._has_any_global_hook():
        return f"a {name} with other parts than the known class, or torch has global hooks"
    paths = (*kind.norms, *kind.activations, *kind.sequentials)
    for path, part in zip(paths, attrgetter(*paths)(module), strict=True):
        if path in kind.norms and not (own_class(part) is nn.GroupNorm if kind.only_torchs else _is_group_norm(part)):
            return f"{name}.{path} is a {type(part).__name__}"
        if path in kind.activations and not (own_class(part) is nn.SiLU if kind.only_torchs else _is_silu(part)):
            return f"{name}.{path} is {type(part).__name__}, not SiLU"
        if watched := why_watched(part):
            return (
                f"the {type(part).__name__} in a {name} {watched}"
                if isinstance(module, nn.Sequential)
                else f"{name}.{path} {watched}"
            )
    return None


def _is_group_norm(module: Any) -> bool:
    """Return whether a module is nn.GroupNorm, guided-diffusion's GroupNorm32 or EDM's GroupNorm."""
    return type(module).__name__ in ("GroupNorm", "GroupNorm32") and (
        isinstance(module, nn.GroupNorm)
        or (hasattr(module, "num_groups") and hasattr(module, "eps") and hasattr(module, "weight") and hasattr(module, "bias"))
    )


def _is_silu(module: Any) -> bool:
    """Return whether a module is nn.SiLU or improved-diffusion's."""
    return type(module).__name__ == "SiLU"


def _is_bypassable_pair(norm: Any, silu: Any) -> bool:
    """Return whether a fused `Sequential` need not call two layers in a row."""
    return (
        _is_group_norm(norm)
        and _is_silu(silu)
        and not (why_watched(norm) or why_watched(silu) or nn.modules.module._has_any_global_hook())
    )


def _why_different(kind: _Kind, module: nn.Module, verdicts: dict[object, str | None]) -> str | None:
    """Return why the fused forward differs from the module's own, or None. One trial serves all modules of a structure."""
    trials = {_structure(trial): (trial, shapes) for trial, shapes in kind.trials(module)}
    verdicts |= {key: _try(kind, *trial) for key, trial in trials.items() if key not in verdicts}
    return next((verdicts[key] for key in trials if verdicts[key]), None)


def _structure(module: nn.Module) -> object:
    """Return a key that is equal for modules with the same function of their sizes and weights."""
    return tuple(
        (
            name,
            type(child),
            *((key, value) for key, value in vars(child).items() if value is None or type(value) in (bool, str)),
        )
        for name, child in module.named_modules()
    )


def _try(kind: _Kind, module: nn.Module, shapes: list[tuple[int, ...] | None]) -> str | None:
    """Return why the two ways differ on a copy with random weights, or None.

    The model's own weights may contain a last layer of zeros, which would hide the layers before it.
    """
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...] | torch.Size) -> Tensor:
        return torch.rand(shape, generator=generator) * 2 - 1

    instead: dict[int, Any] = {
        **{id(parameter): nn.Parameter(random(parameter.shape)) for parameter in module.parameters()},
        **{id(buffer): random(buffer.shape) for buffer in module.buffers()},
        **{id(hooks): type(hooks)() for child in module.modules() for hooks in hooks_of(child)},  # no hooks
    }
    try:
        twin = copy.deepcopy(module, instead).eval()
        inputs = [None if shape is None else random(shape) for shape in shapes]
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            expected = twin(*(x if x is None else x.clone() for x in inputs))
            swap(twin, kind.swaps[""])
            error = float((twin(*inputs) - expected).norm() / expected.norm())
    except Exception as failure:  # foreign code may raise anything
        return f"{type(module).__name__} could not be tried: {type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
    return None if error < 1e-4 else f"{type(module).__name__} computes something else than the known class of that name"


def _why_not_found(model: nn.Module, norm: nn.Module) -> str:
    """Return why no kind has this norm."""
    if isinstance(norm, GroupNormSiLU):
        return "it is one of this package's, which are fused"
    parent = next((module for module in model.modules() if any(child is norm for child in module.children())), None)
    if parent is None:
        return "the norm is the whole model"
    if isinstance(parent, nn.Sequential):
        following = list(parent)[list(parent).index(norm) + 1 :]
        return f"{type(following[0]).__name__} follows it" if following else f"it is the last of a {type(parent).__name__}"
    return f"nothing is known of a SiLU after it in {type(parent).__name__}"
