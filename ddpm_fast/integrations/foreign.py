"""The rule by which `freeze` takes networks of other libraries, and checks of objects that were changed later."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidValue, expect
from ..inference import FrozenUNet, frozen_unet, interface_of, unpacked_output
from ..inference.model import predict
from ..nn import UNet
from ..nn.comparison import hooks_of, patched_methods, why_opaque


def unwrapped(name: str, network: Any) -> Any:
    """Return the network that torch.compile has wrapped, or any other object unchanged. `name` names it in errors."""
    if not hasattr(network, "_orig_mod"):
        return network
    hooks = network._forward_hooks or network._forward_pre_hooks
    expect(not hooks, name, "to have no hooks", "some on the wrapper of torch.compile")
    return network._orig_mod


def check_unpatched(name: str, thing: object) -> None:
    """Raise if a method of a class was replaced in the object."""
    patched = patched_methods(thing)
    expect(not patched, name, "to have the methods of its class", f"another {', '.join(patched)}")


def check_described(name: str, why: str | None) -> None:
    """Raise if there is a reason why a network is not what its class and configuration describe."""
    expect(why is None, name, "to be what its class and configuration describe", f"one where {why}")


def frozen_foreign(
    name: str,
    network: nn.Module,
    read: Callable[[Mapping[str, Tensor]], UNet],
    dtype: torch.dtype | None,
    device: Any,
    num_timesteps: int | None,
    instead: Mapping[int, Any] | None = None,
) -> FrozenUNet:
    """Freeze a network of another library, if class, configuration and weights describe what it computes.

    If the network has parts that these do not show, such as hooks, the error names them. To find any other difference,
    the outputs are compared once, at the smallest size: those of a copy of the network with random weights, and those of a
    `UNet` with the same weights.

    Args:
        name: Name of the network for error messages.
        network: The network.
        read: Function that returns the network as a `UNet` on weights by name. It raises if they do not fit.
        dtype: As in `freeze`.
        device: As in `freeze`.
        num_timesteps: As in `freeze`.
        instead: Objects that the copy has in place of others, by their id. None: no others.

    Raises:
        ValueError: The network is another. The message has the reason.
    """
    check_described(name, why_opaque(network))
    model = read(_weights(network))
    # Outputs of random weights show other eps in their last digits only, so these are compared as numbers.
    eps, wanted = ({layer.eps for layer in each.modules() if isinstance(layer, nn.GroupNorm)} for each in (network, model))
    check_described(name, None if eps == wanted else f"eps of the norms is {sorted(eps)}, not {sorted(wanted)}")
    try:
        twin = random_copy(network, instead)
    except Exception as failed:  # an attribute may refuse, such as a lock
        raise InvalidValue(name, "to be a network that copy.deepcopy can copy, to compare outputs", failed) from failed
    error = _error(twin, read)
    # float32's rounding gives 2e-6, and another layer more than 1e-3.
    check_described(name, None if error < 1e-4 else f"outputs differ by {error:.2g} of their norm, as those of other layers do")
    return frozen_unet(model, dtype, device=device, num_timesteps=num_timesteps)


def random_copy(module: nn.Module, instead: Mapping[int, Any] | None = None) -> nn.Module:
    """Return a copy in eval mode with random float32 weights on the CPU, and without hooks.

    A new network has layers of zeros, which hide what is before them. Weights and hooks themselves are not copied. Global
    generators are not used.

    Args:
        module: The module. It may be on any device.
        instead: Further objects that the copy has in place of others, by their id.
    """
    generator = torch.Generator().manual_seed(0)

    def random(name: str, tensor: Tensor) -> Tensor:
        values = torch.empty(tensor.shape, dtype=torch.float32, device="cpu").uniform_(-1, 1, generator=generator)
        if values.dim() > 1:
            return values.mul_(math.sqrt(3 * len(values) / max(values.numel(), 1)))  # outputs are as large as inputs
        return values.mul_(0.5).add_(1) if name == "weight" else values  # a norm's, or a bias

    memo: dict[int, Any] = dict(instead or {})
    for layer in module.modules():
        memo |= {id(hooks): type(hooks)() for hooks in hooks_of(layer)}
        memo |= {id(each): random(name, each) for name, each in layer._buffers.items() if each is not None}
        for name, each in layer._parameters.items():
            if each is not None and id(each) not in memo:
                memo[id(each)] = nn.Parameter(random(name, each), requires_grad=False)
    return copy.deepcopy(module, memo).eval()


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights by name. It is not state_dict(), which hooks may change."""
    return {name: weight.detach() for name, weight in network.named_parameters(remove_duplicate=False)}


def _error(twin: Any, read: Callable[[Mapping[str, Tensor]], UNet]) -> float:
    """Return the relative difference between the outputs of a network in float32 on the CPU and of what `freeze` reads."""
    model = read(_weights(twin))
    side = 2 ** len(model.config["block_out_channels"])
    if "dtype" in vars(twin):
        twin.dtype = torch.float32  # guided-diffusion's casts activations to it
    with torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
        # 2x2 pixels at the lowest level: on one, attention would be the same for any queries and keys.
        shape, generator = (2, model.config["in_channels"], side, side), torch.Generator().manual_seed(0)
        x, t = torch.empty(shape, dtype=torch.float32).uniform_(-1, 1, generator=generator), torch.tensor([3, 700])
        labels = interface_of(model).labels.ends()
        ours = unpacked_output(model, x, t, labels)  # first, because an embedding with max_norm writes to the weights of both
        theirs = predict(twin, x, t, labels)
        return float((ours - theirs).norm() / theirs.norm())
