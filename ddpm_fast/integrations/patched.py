"""Objects of other libraries that were changed after they were made."""

from __future__ import annotations

from typing import Any

from ..errors import expect


def unwrapped(name: str, network: Any) -> Any:
    """Return the network that torch.compile has wrapped, or any other object as it is. `name` names it in errors."""
    if not hasattr(network, "_orig_mod"):
        return network
    hooks = network._forward_hooks or network._forward_pre_hooks
    expect(not hooks, "freeze", name, "to have no hooks", "some on the wrapper of torch.compile")
    return network._orig_mod


def check_unpatched(caller: str, name: str, thing: object) -> None:
    """Raise if a method of a class was replaced in the object."""
    patched = [
        key
        for key, value in vars(thing).items()
        if callable(value) and hasattr(type(thing), key) and key != "_compiled_call_impl"  # nn.Module.compile sets it
    ]
    expect(not patched, caller, name, "to have the methods of its class", f"another {', '.join(patched)}")
