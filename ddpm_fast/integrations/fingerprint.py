"""Fingerprints: values that tell whether a network may give other outputs than before."""

from __future__ import annotations

import types
from typing import Any, Final

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn

from . import needs_extra
from .class_swap import own_class

# Attributes of a UNet2DModel's layers that may differ from what its configuration gives, by class and name, with the reason.
INERT: Final[dict[tuple[str, str], str]] = {
    ("*", "training"): "only dropout reads it",
    ("*", "gradient_checkpointing"): "the outputs are recomputed, and are the same",
    ("*", "_gradient_checkpointing_func"): "the outputs are recomputed, and are the same",
    ("*", "_is_hf_initialized"): "a mark of loading",
    ("Dropout", "p"): "dropout acts in training mode alone, where it is compared",
    ("GroupNorm", "_head"): "a mark of `fuse`",
    ("SiLU", "_head"): "a mark of `fuse`",
    ("Attention", "processor"): "compared with PROCESSORS",
    ("Attention", "sliceable_head_dim"): "the default of `set_attention_slice`",
    ("Attention", "upcast_attention"): "rounding in half precision",
    ("Attention", "upcast_softmax"): "rounding in half precision",
    ("Attention", "dropout"): "nothing reads it",
    ("Attention", "_from_deprecated_attn_block"): "the names of weights in old files",
}
# Attention processors of diffusers that compute the same, with their attributes.
PROCESSORS: Final[dict[str, tuple[str, ...]]] = {
    "AttnProcessor": (),
    "AttnProcessor2_0": (),
    "SlicedAttnProcessor": ("slice_size",),  # a part of the heads at a time
    "XFormersAttnProcessor": ("attention_op",),  # the kernel
}

_MODULE: Final = frozenset(vars(nn.Module()))  # attributes of every module
_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SCALARS: Final = frozenset({int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device})
_METHODS: Final = ("__init__", "__call__", "_call_impl", "forward", "_conv_forward")


def weights_hash(module: nn.Module) -> int:
    """Return a 64-bit hash of all parameters and buffers.

    It covers names, shapes, dtypes, strides and every byte, so that it sees any write. The device does not
    count. Tensors on a GPU are copied to the host.

    Raises:
        TypeError: A tensor is of another class, is sparse or quantized, or has no memory.
    """
    with needs_extra("diffusers"):
        import xxhash
    hasher = xxhash.xxh3_64()
    first: dict[int, str] = {}  # a tensor's first name
    for prefix, layer in _layers(module):
        for leaf, tensor in (*layer._parameters.items(), *layer._buffers.items()):
            if tensor is None:
                continue
            name = f"{prefix}.{leaf}"
            same_as = first.setdefault(id(tensor), name)
            hasher.update(f"{name} {same_as} {tensor.dtype} {tuple(tensor.shape)}".encode())
            if same_as is name:
                hasher.update(f"{_strides(name, tensor)}\n".encode())
                hasher.update(_as_bytes(tensor))
    digest: int = hasher.intdigest()
    return digest


def attributes_digest(module: nn.Module) -> tuple[Any, ...]:
    """Return a value that compares equal if nothing but the values of weights has changed.

    It covers the class of every layer with the class's methods, all attributes, hooks, torch's global hooks,
    the configuration, and the names and shapes of weights. It keeps functions and objects that it has seen.
    """
    seen: list[Any] = [_hooks(hooks) for hooks in _global_hooks()]
    first: dict[int, int] = {}  # a layer's first place
    classes: dict[type, dict[str, Any]] = {}
    for name, layer in _layers(module):
        kind = type(layer)
        if kind not in classes:
            classes.update((base, dict(vars(base))) for base in kind.__mro__)
        seen += (name, first.setdefault(id(layer), len(first)), kind)
        for key, value in vars(layer).items():
            if value.__class__ in _SCALARS:
                seen += (key, value)
            elif key not in _MODULE:
                seen += (key, _plain(value))
            elif not value:
                continue
            elif key in _HOOKS:
                seen += (key, _hooks(value))
            elif key in ("_parameters", "_buffers"):
                seen += (key, *((name, tensor if tensor is None else tensor.shape) for name, tensor in value.items()))
            elif key == "_modules" and None in value.values():
                seen += (key, tuple(name for name, child in value.items() if child is None))
    return (*seen, classes)


def why_layers_differ(unet: Any) -> str | None:
    """Return how a layer of a `UNet2DModel` differs from what the network's configuration describes, or None.

    A layer differs by its class, an attribute, a hook, a parameter, a patched method, or by its place.
    Attributes of INERT and attention processors of PROCESSORS may differ. A network that `fuse` has modified
    is compared as it was before. Hooks and attributes of the network itself are not compared.
    """
    from diffusers import UNet2DModel

    kind = own_class(unet)
    if kind is not UNet2DModel:
        return f"it is a {kind.__name__}"
    if any(_global_hooks()):
        return "torch's global hooks are called for every layer (torch.nn.modules.module)"
    layers = _layers(unet)
    for patched in {own_class(layer): None for _, layer in layers}:
        if (why := _why_patched(patched)) is not None:
            return why
    build: Any = UNet2DModel  # from_config would ignore keys of which it has noted that they had the default value
    try:
        with torch.device("meta"):
            described = build(**{key: value for key, value in unet.config.items() if not key.startswith("_")})
    except Exception as error:  # any value may be in a configuration
        return f"diffusers cannot build its configuration: {error}"
    expected = dict(_layers(described))
    first: dict[int, str] = {}
    first_expected = _first_names(expected)
    for name, layer in layers:
        if name not in expected:
            return f"its configuration has no {name}, which is a {own_class(layer).__name__}"
        if (why := _why_layer_differs(name, layer, expected[name])) is not None:
            return why
        same_as = first.setdefault(id(layer), name)
        if same_as != first_expected[name]:
            other, one = (same_as, "one layer") if same_as != name else (first_expected[name], "two layers")
            return f"{other} and {name} are {one}, unlike in its configuration"
    missing = next((name for name in expected if name not in dict(layers)), None)
    return None if missing is None else f"{missing} is missing"


def _layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return every module with its name. A module with several names comes several times."""
    found = []

    def visit(name: str, module: nn.Module) -> None:
        found.append((name, module))
        for key, child in module._modules.items():
            if child is not None:
                visit(f"{name}.{key}" if name else key, child)

    visit("", module)
    return found


# ----------------------------------------------------------------------------------------------------------------- weights


def _strides(name: str, tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of a tensor whose bytes can be read. Raise a TypeError for any other."""
    name = name.removeprefix(".")
    if type(tensor) not in (Tensor, nn.Parameter):
        raise TypeError(f"{name} is a {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise TypeError(f"{name} is {'quantized' if tensor.is_quantized else 'sparse'}")
    if tensor.is_meta or (tensor.numel() and tensor.data_ptr() == 0):
        raise TypeError(f"{name} has no memory")
    return tensor.stride()


def _as_bytes(tensor: Tensor) -> Any:
    """Return the values as a NumPy array of bytes in the order of memory, without a copy if they are dense."""
    tensor = tensor.detach()
    if not tensor.is_contiguous():  # channels_last, say
        tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    return tensor.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


# -------------------------------------------------------------------------------------------------------------- attributes


class _Same:
    """Reference that equals references to the same object only."""

    __slots__ = ("thing",)

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)


def _plain(value: Any, depth: int = 4) -> Any:
    """Return a value that later changes of `value` do not reach."""
    if value.__class__ in _SCALARS:
        return value
    if depth and isinstance(value, dict):
        return (type(value), *((_plain(key, 0), _plain(item, depth - 1)) for key, item in value.items()))
    if depth and isinstance(value, (list, tuple)):
        return (type(value), *(_plain(item, depth - 1) for item in value))
    if depth == 0 or isinstance(value, (nn.Module, Tensor, type)) or not hasattr(value, "__dict__"):
        return _Same(value)
    return (_Same(value), type(value), *((key, _plain(item, depth - 1)) for key, item in vars(value).items()))


def _hooks(hooks: dict[int, Any]) -> tuple[Any, ...]:
    return tuple((key, _Same(hook)) for key, hook in hooks.items())


def _global_hooks() -> tuple[dict[int, Any], ...]:
    return tuple(getattr(torch_module, f"_global{kind}") for kind in _HOOKS)


# ------------------------------------------------------------------------------------------------------------- differences


def _first_names(layers: dict[str, nn.Module]) -> dict[str, str]:
    first: dict[int, str] = {}
    return {name: first.setdefault(id(layer), name) for name, layer in layers.items()}


def _why_patched(kind: type) -> str | None:
    """Return which method of a layer's class is neither torch's nor diffusers', or None."""
    methods = {name: getattr(kind, name) for name in _METHODS if hasattr(kind, name)} | vars(kind)
    for name, method in methods.items():
        if isinstance(method, types.FunctionType):
            origin = method.__globals__.get("__name__", "")  # a wrapper may claim to be what it wraps
            if origin.partition(".")[0] not in ("torch", "diffusers"):
                return f"{kind.__name__}.{name} is patched by {origin}"
    return None


def _why_layer_differs(name: str, layer: nn.Module, expected: nn.Module) -> str | None:
    where, kind = name or "it", own_class(layer)
    if kind is not type(expected):
        return f"{where} is a {kind.__name__}, its configuration says {type(expected).__name__}"
    if "forward" in vars(layer):
        return f"{where} has a patched forward (offloading does that)"
    if name:
        if any(getattr(layer, hooks) for hooks in _HOOKS):
            return f"{where} has hooks"
        if (why := _why_attributes_differ(where, layer, expected)) is not None:
            return why
    for ours, theirs in ((layer._parameters, expected._parameters), (layer._buffers, expected._buffers)):
        shapes, wanted = ({key: None if t is None else tuple(t.shape) for key, t in of.items()} for of in (ours, theirs))
        for key in (*wanted, *shapes):
            if shapes.get(key) != wanted.get(key):
                return f"{where}.{key} {_shape(shapes.get(key))}, its configuration says it {_shape(wanted.get(key))}"
    return None


def _shape(shape: tuple[int, ...] | None) -> str:
    return "is absent" if shape is None else f"has the shape {shape}"


def _why_attributes_differ(where: str, layer: nn.Module, expected: nn.Module) -> str | None:
    kind = type(expected).__name__
    if kind == "Attention" and (why := _why_processor_differs(where, layer)) is not None:
        return why
    ours, theirs = ({key: value for key, value in vars(of).items() if key not in _MODULE} for of in (layer, expected))
    for key in (*theirs, *ours):
        inert = ("*", key) in INERT or (kind, key) in INERT
        if inert and not (kind == "Dropout" and layer.training):
            continue
        if key not in ours:
            return f"{where} has no attribute {key}"
        if key not in theirs:
            return f"{where} has an attribute {key}, unlike its configuration"
        if _plain(ours[key]) != _plain(theirs[key]):
            return f"{where}.{key} is {ours[key]!r}, its configuration says {theirs[key]!r}"
    return None


def _why_processor_differs(where: str, attention: Any) -> str | None:
    processor = getattr(attention, "processor", None)
    kind = type(processor)
    known = kind.__name__ in PROCESSORS and kind.__module__.startswith("diffusers.")
    if not known or any(key not in PROCESSORS[kind.__name__] for key in vars(processor)):
        return f"{where} has a {kind.__name__} as its processor"
    return _why_patched(kind)
