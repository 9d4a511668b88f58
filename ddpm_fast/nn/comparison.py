"""Comparison of a network with a new one: are its layers as its class makes them?"""

from __future__ import annotations

import types
from typing import Any, Final

import torch.nn.modules.module as torch_module
from torch import nn

# Attributes that may differ from those of a new network, by class and name, with the reason.
INERT: Final[dict[tuple[str, str], str]] = {
    ("*", "training"): "only dropout reads it",
    ("*", "_compiled_call_impl"): "torch.compile computes the same",
    ("*", "gradient_checkpointing"): "the outputs are recomputed, and are the same",
    ("*", "_gradient_checkpointing_func"): "the outputs are recomputed, and are the same",
    ("*", "use_checkpoint"): "the outputs are recomputed, and are the same",
    ("*", "_is_hf_initialized"): "a mark of loading",
    ("*", "dropout"): "dropout acts in training alone",
    ("*", "dropout_stream"): "dropout acts in training alone",
    ("Dropout", "p"): "dropout acts in training alone",
    ("GroupNorm", "_head"): "a mark of `fuse`",
    ("SiLU", "_head"): "a mark of `fuse`",
    ("Attention", "processor"): "compared by `ddpm_fast.integrations.diffusers`",
    ("Attention", "sliceable_head_dim"): "the default of `set_attention_slice`",
    ("Attention", "upcast_attention"): "rounding in half precision",
    ("Attention", "upcast_softmax"): "rounding in half precision",
    ("Attention", "_from_deprecated_attn_block"): "the names of weights in old files",
}
_MODULE: Final = frozenset(vars(nn.Module()))  # attributes of every module
_METHODS: Final = ("__init__", "__call__", "_call_impl", "forward", "_forward", "_conv_forward")


def own_class(thing: Any) -> type:
    """Return the object's class before `fuse`."""
    kind = type(thing)
    return getattr(kind, "swapped_from", kind)


def why_watched(module: nn.Module) -> str | None:
    """Return why a call of the module does more than its class's forward, or None."""
    return "has hooks" if any(hooks_of(module)) else "has a patched forward" if "forward" in vars(module) else None


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Return the hooks of a module's calls."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def why_layers_differ(network: nn.Module, described: nn.Module) -> str | None:
    """Return how a layer of `network` differs from that of `described`, or None.

    A layer differs by its class, an attribute, a hook, a parameter, a patched method, or by its place. Attributes of
    INERT may differ. A network that `fuse` has modified is compared as it was before. Attributes of the network itself
    are not compared.

    Args:
        network: A network.
        described: A new network of the same class and arguments. It may be on the meta device.
    """
    if torch_module._has_any_global_hook():
        return "torch's global hooks are called for every layer (torch.nn.modules.module)"
    layers, expected = (dict(each.named_modules(remove_duplicate=False)) for each in (network, described))
    libraries = ("torch", own_class(network).__module__.partition(".")[0])
    places: dict[int, str] = {}
    places_expected: dict[int, str] = {}
    for name in {**expected, **layers}:
        if name not in expected:
            return f"its configuration has no {name}, which is of class {own_class(layers[name]).__name__}"
        if name not in layers:
            return f"{name} is missing"
        why = _why_layer_differs(name, layers[name], expected[name], libraries)
        if why is not None:
            return why
        same_as = places.setdefault(id(layers[name]), name)
        if same_as != (wanted := places_expected.setdefault(id(expected[name]), name)):
            return f"{name} is the layer {same_as}, its configuration says {wanted}"
    return None


def _why_layer_differs(name: str, layer: nn.Module, expected: nn.Module, libraries: tuple[str, ...]) -> str | None:
    where, kind = name or "it", own_class(layer)
    if kind is not type(expected):
        return f"{where} is of class {kind.__name__}, its configuration says {type(expected).__name__}"
    if (why := why_patched(kind, libraries)) is not None:
        return why
    if (why := why_watched(layer)) is not None:
        return f"{where} {why}"
    if name and (why := _why_attributes_differ(where, layer, expected)) is not None:
        return why
    for kept in ("_parameters", "_buffers"):
        shapes, wanted = (
            {key: f"has the shape {tuple(each.shape)}" for key, each in getattr(of, kept).items() if each is not None}
            for of in (layer, expected)
        )
        for key in {**wanted, **shapes}:
            own, said = shapes.get(key, "is absent"), wanted.get(key, "is absent")
            if own != said:
                return f"{where}.{key} {own}, its configuration says it {said}"
    return None


def why_patched(kind: type, libraries: tuple[str, ...]) -> str | None:
    """Return which method of a layer's class is of none of these libraries, or None."""
    for name, method in ({name: getattr(kind, name, None) for name in _METHODS} | dict(vars(kind))).items():
        if isinstance(method, types.FunctionType):
            origin = method.__globals__.get("__name__", "")  # a wrapper may claim to be what it wraps
            if origin.partition(".")[0] not in libraries:
                return f"{kind.__name__}.{name} is patched by {origin}"
    return None


def _why_attributes_differ(where: str, layer: nn.Module, expected: nn.Module) -> str | None:
    kind = type(expected).__name__
    ours, theirs = ({key: value for key, value in vars(of).items() if key not in _MODULE} for of in (layer, expected))
    for key in {**theirs, **ours}:
        if ("*", key) in INERT or (kind, key) in INERT:
            continue
        if key not in ours:
            return f"{where} has no attribute {key}"
        if key not in theirs:
            return f"{where} has an attribute {key}, unlike its configuration"
        if type(ours[key]) is not type(theirs[key]) or ours[key] != theirs[key]:
            return f"{where}.{key} is {ours[key]!r}, its configuration says {theirs[key]!r}"
    return None
