"""Changes to networks: functions of the network, which tables of tests list by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Change = Callable[[Any], Any]


def given(path: str, **attributes: Any) -> Change:
    """Set attributes of the layer at a path, or of the network itself, whose path is ""."""

    def change(network: nn.Module) -> None:
        for name, value in attributes.items():
            setattr(network.get_submodule(path), name, value)

    return change


def replaced(path: str, by: nn.Module) -> Change:
    return lambda network: network.set_submodule(path, by)


def negating(path: str) -> Change:
    """Patch a forward."""
    return given(path, forward=lambda x: -x)


def hooked(path: str, register: str = "register_forward_hook", hook: Callable[..., Any] = lambda *args: None) -> Change:
    return lambda network: getattr(network.get_submodule(path), register)(hook)


def negated(path: str) -> Change:
    return hooked(path, hook=lambda module, args, out: -out)


def negated_before(path: str) -> Change:
    return hooked(path, "register_forward_pre_hook", lambda module, args: (-args[0],))
