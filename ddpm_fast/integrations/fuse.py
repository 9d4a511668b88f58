"""`fuse`: GroupNorm with modulation and SiLU in one pass, in models of other libraries."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import torch.nn.modules.module as torch_module
from torch import Tensor, nn

from ..errors import InvalidType
from ..nn.layers import GroupNormSiLU
from ..ops import group_norm_silu
from .class_swap import Swapped, swap, unswap

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
    training, autocast, checkpointing, `torch.compile`, `deepcopy` and pickle work as before. Fused modules
    are differentiable once. Call `unfuse` before using a gradient penalty.

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
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    fused: dict[int, str] = {}
    reasons: dict[int, str] = {}
    verdicts: dict[object, str | None] = {}
    for module in modules.values():
        for site in (*_block_sites(module), *_head_sites(model, module), *_sequential_sites(module)):
            news = {id(norm): f"{type(module).__name__}: {what}" for norm, what in site.norms.items() if id(norm) not in fused}
            if not news:
                continue
            reason = site.why_not or _why_not_same(site, verdicts)
            if reason is None:
                for target, mixin in site.swaps:
                    swap(target, mixin)
                    if mixin in (_NormSiLU, _Passed):
                        target._head = (module,)  # type: ignore[assignment]
                fused |= news
            else:
                reasons |= dict.fromkeys(news, reason)
    left = {
        id(module): reasons.get(id(module)) or _why_not_found(model, module)
        for module in modules.values()
        if id(module) not in fused and (isinstance(module, nn.GroupNorm) or _is_group_norm(module))
    }
    return FuseReport(*({names[key]: value for key, value in of.items()} for of in (fused, left)))


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


# --------------------------------------------------------------------------------------------------------- what is computed


class _Fused(Swapped):
    """Base of fused modules."""


class _NormSiLU(_Fused):
    """A norm that also computes the activation after it, in a diffusers head.

    Attributes:
        _head: The parent, in a tuple, so that it is no submodule.
    """

    _head: tuple[nn.Module]

    def forward(self, input: Tensor) -> Tensor:
        return _norm_silu(self, input) if _is_fused_head(*self._head) else super().forward(input)  # type: ignore[misc]


class _Passed(_Fused):
    """An activation that the norm before it has computed.

    Attributes:
        _head: The parent, in a tuple, so that it is no submodule.
    """

    _head: tuple[nn.Module]

    def forward(self, input: Tensor) -> Tensor:
        return input if _is_fused_head(*self._head) else super().forward(input)  # type: ignore[misc]


def _is_fused_head(parent: Any) -> bool:
    """Return whether a head's norm and activation are those that were fused, and nobody watches them."""
    norm, activation = parent.conv_norm_out, parent.conv_act
    return (
        isinstance(norm, _NormSiLU)
        and isinstance(activation, _Passed)
        and norm._head[0] is parent
        and activation._head[0] is parent
        and not (_is_watched(norm) or _is_watched(activation) or "forward" in vars(parent))
    )


class _Sequential(_Fused):
    """A `Sequential` that computes a norm and the SiLU after it at once. Its slices do the same."""

    def forward(self: Any, input: Any) -> Any:
        layers = list(self)
        done = False
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            if done:  # with the norm
                done = False
                continue
            done = _is_bypassable_norm(layer) and _is_bypassable_silu(following)
            input = _norm_silu(layer, input) if done else layer(input)
        return input


class _Block(_Fused):
    """A residual block: norm, SiLU, convolution, norm with the time embedding, SiLU, convolution.

    Attributes:
        known_as: Name of the class.
        method: Method that computes the block.
        bypassed: Children that are no longer called. The norms are the first two.
        activations: Children that must be SiLU.
    """

    known_as: ClassVar[str]
    method: ClassVar[str] = "forward"
    bypassed: ClassVar[tuple[str, ...]]
    activations: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def modulates(block: Any) -> bool:
        """Return whether time is a scale and a shift after the norm. Otherwise it is added before the norm."""
        raise NotImplementedError

    @staticmethod
    def input_shapes(block: Any) -> list[tuple[int, ...] | None]:
        """Return shapes of inputs for trying the block."""
        raise NotImplementedError

    def _is_as_fused(self) -> bool:
        """Return whether the parts that are no longer called are still the expected ones."""
        raise NotImplementedError


class _ResnetBlock2D(_Block):
    """Block of diffusers, diffusers/models/resnet.py."""

    known_as = "ResnetBlock2D"
    bypassed = ("norm1", "norm2", "nonlinearity")
    activations = ("nonlinearity",)

    @staticmethod
    def modulates(block: Any) -> bool:
        return bool(block.time_embedding_norm == "scale_shift")

    @staticmethod
    def input_shapes(block: Any) -> list[tuple[int, ...] | None]:
        emb = None if block.time_emb_proj is None else (2, block.time_emb_proj.in_features)
        return [(2, _channels(block.norm1), 8, 8), emb]

    def _is_as_fused(self: Any) -> bool:
        return (
            _is_bypassable_norm(self.norm1)
            and _is_bypassable_norm(self.norm2)
            and _is_bypassable_silu(self.nonlinearity)
            and (
                self.time_embedding_norm in ("default", "scale_shift")
                if self.time_emb_proj is not None
                else self.time_embedding_norm != "scale_shift"  # an error, which diffusers raises
            )
        )

    def forward(self: Any, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        unusual = args or kwargs or (temb is None) != (self.time_emb_proj is None)  # deprecated or wrong: diffusers says so
        if unusual or not self._is_as_fused():
            return super().forward(input_tensor, temb, *args, **kwargs)  # type: ignore[no-any-return, misc]
        x, h = input_tensor, _norm_silu(self.norm1, input_tensor)
        if self.upsample is not None:
            if len(x) >= 64:  # PyTorch's nearest interpolation of large channels_last batches was wrong, so diffusers does this
                x, h = x.contiguous(), h.contiguous()
            x, h = self.upsample(x), self.upsample(h)
        elif self.downsample is not None:
            x, h = self.downsample(x), self.downsample(h)
        h = self.conv1(h)
        if temb is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else F.silu(temb))
        h = _norm_silu(self.norm2, h, temb, modulates=self.time_embedding_norm == "scale_shift")
        h = self.conv2(self.dropout(h))
        if self.conv_shortcut is not None:
            # contiguous in training, as in diffusers: DistributedDataParallel warns of gradients in another memory format
            x = self.conv_shortcut(x.contiguous() if self.training else x)
        return (x + h) / self.output_scale_factor  # type: ignore[no-any-return]


class _ResBlock(_Block):
    """Block of openai/guided-diffusion, guided_diffusion/unet.py. improved-diffusion's has no resampling."""

    known_as = "ResBlock"
    method = "_forward"  # `forward` wraps it in checkpointing
    bypassed = ("in_layers.0", "out_layers.0", "in_layers.1", "out_layers.1", "in_layers", "out_layers")
    activations = ("in_layers.1", "out_layers.1")

    @staticmethod
    def modulates(block: Any) -> bool:
        return bool(block.use_scale_shift_norm)

    @staticmethod
    def input_shapes(block: Any) -> list[tuple[int, ...] | None]:
        space = (8,) * (block.in_layers[-1].weight.dim() - 2)
        return [(2, _channels(block.in_layers[0]), *space), (2, block.emb_layers[-1].in_features)]

    def _is_as_fused(self: Any) -> bool:
        return (
            len(self.in_layers) == 3
            and len(self.out_layers) > 2
            and all(
                type(layers).forward in (nn.Sequential.forward, _Sequential.forward)
                and not _is_watched(layers)
                and _is_bypassable_norm(layers[0])
                and _is_bypassable_silu(layers[1])
                for layers in (self.in_layers, self.out_layers)
            )
        )

    def _forward(self: Any, x: Tensor, emb: Tensor) -> Tensor:
        if not self._is_as_fused():
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


class _UNetBlock(_Block):
    """Block of NVlabs/edm, training/networks.py."""

    known_as = "UNetBlock"
    bypassed = ("norm0", "norm1")

    @staticmethod
    def modulates(block: Any) -> bool:
        return bool(block.adaptive_scale)

    @staticmethod
    def input_shapes(block: Any) -> list[tuple[int, ...] | None]:
        return [(2, _channels(block.norm0), 8, 8), (2, block.affine.in_features)]

    def _is_as_fused(self: Any) -> bool:
        return _is_bypassable_norm(self.norm0) and _is_bypassable_norm(self.norm1)

    def forward(self: Any, x: Tensor, emb: Tensor) -> Tensor:
        if not self._is_as_fused():
            return super().forward(x, emb)  # type: ignore[no-any-return, misc]
        h = self.conv0(_norm_silu(self.norm0, x))
        h = _norm_silu(self.norm1, h, self.affine(emb), modulates=self.adaptive_scale)
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        return self._attend(x) if self.num_heads else x

    def _attend(self: Any, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        qkv = self.qkv(self.norm2(x)).reshape(n * self.num_heads, c // self.num_heads, 3, height * width)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each [N heads, HW, C / heads]
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, c, height, width)
        return (self.proj(h) + x) * self.skip_scale  # type: ignore[no-any-return]


_BLOCKS = (_ResnetBlock2D, _ResBlock, _UNetBlock)


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


# -------------------------------------------------------------------------------------------------------- what is recognised


@dataclass(frozen=True)
class _Site:
    """A place where something can be fused.

    Attributes:
        norms: Fused operations, by norm.
        swaps: Modules and their new classes.
        proofs: Modules whose outputs must not change, and the shapes of their inputs.
        why_not: Reason against fusing that needs no trial, or None.
    """

    norms: dict[nn.Module, str]
    swaps: list[tuple[nn.Module, type[_Fused]]]
    proofs: list[tuple[nn.Module, type[_Fused], list[tuple[int, ...] | None]]]
    why_not: str | None


def _block_sites(block: nn.Module) -> Iterator[_Site]:
    for mixin in _BLOCKS:
        known = next((cls for cls in type(block).__mro__ if cls.__name__ == mixin.known_as), None)
        if known is None:
            continue
        try:
            children = {name: block.get_submodule(name) for name in mixin.bypassed}
            shapes = mixin.input_shapes(block)
            second = _MODULATED if mixin.modulates(block) else _SHIFTED if shapes[1] is not None else _PLAIN
        except AttributeError:
            continue  # another class of that name
        yield _Site(
            norms=dict(zip(list(children.values())[:2], (_PLAIN, second), strict=True)),
            swaps=[(block, mixin)],
            proofs=[(block, mixin, shapes)],
            why_not=_why_not_block(block, mixin, known, children),
        )


def _why_not_block(block: nn.Module, mixin: type[_Block], known: type, children: dict[str, nn.Module]) -> str | None:
    kind = type(block).__name__
    if getattr(type(block), mixin.method) is not getattr(known, mixin.method):
        return f"{kind} overrides {mixin.method}"
    if mixin.method in vars(block):
        return f"a {kind} whose {mixin.method} is patched"
    for name in mixin.bypassed[:2]:
        if not _is_group_norm(children[name]):
            return f"{kind}.{name} is a {type(children[name]).__name__}"
    for name in mixin.activations:
        if not _is_silu(children[name]):
            return f"{kind}.{name} is {type(children[name]).__name__}, not SiLU"
    reasons = (_why_called(f"{kind}.{name}", child) for name, child in children.items())
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is None and not mixin._is_as_fused(block):  # type: ignore[arg-type]
        return f"a {kind} with other parts than the known class, or torch has global hooks"
    return reason


def _head_sites(model: nn.Module, module: nn.Module) -> Iterator[_Site]:
    """Yield sites of diffusers heads: conv_out(conv_act(conv_norm_out(x)))."""
    norm, activation = getattr(module, "conv_norm_out", None), getattr(module, "conv_act", None)
    if not (isinstance(norm, nn.Module) and isinstance(activation, nn.Module)):
        return
    forward = type(module).forward
    if not forward.__module__.startswith("diffusers."):
        return
    kind = type(module).__name__
    uses = sum(child is activation for parent in model.modules() for child in parent.children())
    if type(norm) is not nn.GroupNorm:
        why_not: str | None = f"{kind}.conv_norm_out is a {type(norm).__name__}"
    elif type(activation) is not nn.SiLU:
        why_not = f"{kind}.conv_act is {type(activation).__name__}, not SiLU"
    elif uses > 1:
        why_not = f"{kind}.conv_act is used elsewhere, too"
    else:
        why_not = _why_called(f"{kind}.conv_norm_out", norm) or _why_called(f"{kind}.conv_act", activation)
    yield _Site({norm: _PLAIN}, [(norm, _NormSiLU), (activation, _Passed)], [], why_not)


def _sequential_sites(module: nn.Module) -> Iterator[_Site]:
    if not isinstance(module, nn.Sequential):
        return
    pairs = [(norm, silu) for norm, silu in pairwise(module) if _is_group_norm(norm) and _is_silu(silu)]
    if not pairs:
        return
    kind = type(module).__name__
    if type(module).forward is not nn.Sequential.forward:
        why_not: str | None = f"{kind} overrides forward"
    elif "forward" in vars(module):
        why_not = f"a {kind} whose forward is patched"
    else:
        reasons = (_why_called(f"the {type(layer).__name__} in a {kind}", layer) for pair in pairs for layer in pair)
        why_not = next((reason for reason in reasons if reason is not None), None)
    others = [(norm, silu) for norm, silu in pairs if (type(norm), type(silu)) != (nn.GroupNorm, nn.SiLU)]
    yield _Site(
        norms={norm: _PLAIN for norm, _ in pairs},
        swaps=[(module, _Sequential)],
        proofs=[(nn.Sequential(norm, silu), _Sequential, [(2, _channels(norm), 8, 8)]) for norm, silu in others],
        why_not=why_not,
    )


def _is_group_norm(module: Any) -> bool:
    """Return whether a module is nn.GroupNorm, guided-diffusion's GroupNorm32 or EDM's GroupNorm."""
    named = type(module).__name__ in ("GroupNorm", "GroupNorm32")
    return named and all(hasattr(module, name) for name in ("num_groups", "eps", "weight", "bias"))


def _is_silu(module: Any) -> bool:
    """Return whether a module is nn.SiLU or improved-diffusion's."""
    return type(module).__name__ == "SiLU"


def _channels(norm: Any) -> int:
    return int(norm.num_channels) if isinstance(norm, nn.GroupNorm) else len(norm.weight)


def _is_bypassable_norm(module: Any) -> bool:
    return _is_group_norm(module) and not _is_watched(module)


def _is_bypassable_silu(module: Any) -> bool:
    return _is_silu(module) and not _is_watched(module)


def _is_watched(module: Any) -> bool:
    """Return whether a call of the module does more than its class's forward."""
    return any(_hooks(module)) or "forward" in vars(module) or torch_module._has_any_global_hook()


def _why_called(name: str, module: nn.Module) -> str | None:
    """Return why the parent must call this module, or None."""
    if any(_hooks(module)):
        return f"{name} has hooks"
    return f"{name} has a patched forward" if "forward" in vars(module) else None


def _hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def _why_not_same(site: _Site, verdicts: dict[object, str | None]) -> str | None:
    for module, mixin, shapes in site.proofs:
        kind = _structure(module)
        if kind not in verdicts:
            verdicts[kind] = _why_not_equal(module, mixin, shapes)
        if verdicts[kind] is not None:
            return verdicts[kind]
    return None


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


def _why_not_equal(module: nn.Module, mixin: type[_Fused], shapes: list[tuple[int, ...] | None]) -> str | None:
    """Return why the two ways differ on a copy with random weights, or None.

    The model's own weights may contain a last layer of zeros, which would hide the layers before it.
    """
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...] | torch.Size) -> Tensor:
        return torch.rand(shape, generator=generator) * 2 - 1

    instead: dict[int, Any] = {id(p): nn.Parameter(random(p.shape)) for p in module.parameters()}
    instead |= {id(b): random(b.shape) for b in module.buffers()}
    instead |= {id(hooks): OrderedDict() for child in module.modules() for hooks in _hooks(child)}  # no hooks
    kind = type(module).__name__
    try:
        twin = copy.deepcopy(module, instead).eval()
        inputs = [None if shape is None else random(shape) for shape in shapes]
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            expected = twin(*(x if x is None else x.clone() for x in inputs))
            swap(twin, mixin)
            error = float((twin(*inputs) - expected).norm() / expected.norm())
    except Exception as failure:  # foreign code may raise anything
        return f"{kind} could not be tried: {type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
    return None if error < 1e-4 else f"{kind} computes something else than the known class of that name"


def _why_not_found(model: nn.Module, norm: nn.Module) -> str:
    """Return why a norm is in none of the sites."""
    if isinstance(norm, GroupNormSiLU):
        return "it is one of this package's, which are fused"
    parent = next((module for module in model.modules() if any(child is norm for child in module.children())), None)
    if parent is None:
        return "the norm is the whole model"
    if isinstance(parent, nn.Sequential):
        layers = list(parent)
        following = layers[layers.index(norm) + 1 :]
        return f"{type(following[0]).__name__} follows it" if following else f"it is the last of a {type(parent).__name__}"
    return f"nothing is known of a SiLU after it in {type(parent).__name__}"
