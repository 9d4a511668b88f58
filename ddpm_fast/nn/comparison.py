"""Parts of a network that its class, configuration and weights do not show."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn

_METHODS: Final = ("__init__", "__call__", "forward", "_conv_forward")


def why_watched(module: nn.Module) -> str | None:
    """Return why a call of the module does more than its class's forward, or None."""
    return "has hooks" if any(hooks_of(module)) else "has a patched forward" if "forward" in vars(module) else None


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Return the hooks of a module's calls."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def patched_methods(thing: object) -> list[str]:
    """Return the methods of a class that were replaced in the object."""
    return [
        key
        for key, value in vars(thing).items()
        if callable(value) and hasattr(type(thing), key) and key != "_compiled_call_impl"  # nn.Module.compile sets it
    ]


def why_opaque(network: nn.Module) -> str | None:
    """Return by name what keeps a network's class, configuration and weights from describing it, or None.

    Such are hooks, patched methods of layers and of their classes in torch, and weights without dense floating values.
    """
    if torch_module._has_any_global_hook():
        return "torch's global hooks are called for every layer (torch.nn.modules.module)"
    for kind in {
        type(layer): None for layer in network.modules() if type(layer).__module__.startswith(("torch.", "ddpm_fast."))
    }:
        for method in _METHODS:  # a patch of a class changes new networks, too, so no comparison with one shows it
            origin = getattr(getattr(kind, method, None), "__globals__", {}).get("__name__", "torch")
            if origin.partition(".")[0] not in ("torch", "ddpm_fast"):
                return f"{kind.__name__}.{method} is patched by {origin}"
    for name, layer in network.named_modules():
        if (why := why_watched(layer)) is not None:
            return f"{name or 'it'} {why}"
        if patched := patched_methods(layer):
            return f"{name or 'it'} has another {', '.join(patched)}"
    for name, weight in network.named_parameters(remove_duplicate=False):
        if type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point() or weight.layout != torch.strided:
            return f"{name} is a {type(weight).__name__} of {weight.dtype} and {weight.layout}"
        if weight.is_meta:
            return f"{name} is on the meta device, without values"
    return None
