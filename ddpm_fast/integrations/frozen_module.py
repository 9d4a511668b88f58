"""`FrozenModule`: the module that `freeze` returns for another library's network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NoReturn

import torch
from torch import Tensor, nn

from ..checks import check_type
from ..errors import InvalidValue, public
from ..inference import FrozenUNet
from ..inference.model import device_and_dtype

# Methods that would change the network, or write one without weights.
_REFUSED: Final = (
    *("save_pretrained", "push_to_hub", "state_dict", "load_state_dict", "_load_from_state_dict", "register_to_config"),
    *("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook"),
    *("register_backward_hook", "register_buffer", "register_parameter", "register_module", "add_module", "set_submodule"),
    *("convert_to_fp16", "convert_to_fp32"),
)


class FrozenModule(nn.Module):
    """A network that a `FrozenUNet` computes. It has no parameters and is immutable.

    It is called as guided-diffusion and denoising-diffusion-pytorch call their networks.

    Args:
        original: The network that it stands for. Nothing of it is kept.
        frozen_unet: The inference form of the same network.

    Attributes:
        frozen_unet: As given. `Sampler` and `sample` use it.
    """

    frozen_unet: FrozenUNet
    _dtype: torch.dtype
    _original: str

    def __init__(self, original: nn.Module, frozen_unet: FrozenUNet) -> None:
        nn.Module.__init__(self)  # a class between would build a network
        _, dtype = device_and_dtype(original)
        vars(self).update(frozen_unet=frozen_unet, _dtype=dtype, _original=type(original).__name__, training=False)

    @property
    def config(self) -> Any:
        """Configuration of the network, which cannot be changed."""
        return self.frozen_unet.config

    @property
    def device(self) -> torch.device:
        """Device of the inputs and outputs."""
        return self.frozen_unet.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the original, in which libraries draw noise. Outputs have that of the inputs."""
        return self._dtype

    @public("FrozenModule", traced=True)
    def forward(self, x: Tensor, timesteps: Tensor | float, y: Tensor | None = None) -> Tensor:
        """Evaluate the network, see `FrozenUNet`. The output has the dtype and memory format of x.

        Timesteps may be one for all images, and labels of any integer dtype, as in the libraries.

        Raises:
            TypeError: x is no tensor.
            ValueError: x records gradients, or what `FrozenUNet` raises.
        """
        check_type("x", x, Tensor)
        if torch.is_grad_enabled() and x.requires_grad:
            self.refuse("input that records gradients")
        # A loop whose next x is the output draws noise in the order of its memory.
        memory_format = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        if isinstance(timesteps, Tensor) and timesteps.numel() == 1:
            timesteps = timesteps.reshape(())
        if isinstance(y, Tensor) and not (y.is_floating_point() or y.dtype == torch.bool):
            y = y.to(torch.int64).expand(len(x) if y.shape == (1,) else y.shape)
        return self.frozen_unet(x, timesteps, y).to(x.dtype, memory_format=memory_format)

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        """Yield one empty tensor: libraries ask the first parameter for the device and the dtype."""
        yield torch.empty(0, device=self.device, dtype=self.dtype)

    def train(self, mode: bool = True) -> FrozenModule:
        """Return the network if `mode` is False."""
        return self.refuse("training mode") if mode else self

    def requires_grad_(self, requires_grad: bool = True) -> FrozenModule:
        """Return the network if `requires_grad` is False."""
        return self.refuse("gradients of weights") if requires_grad else self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenModule:
        """Return the network if `fn`, which moves or casts tensors, keeps its device and dtype."""
        before = next(self.parameters())
        after = fn(before)
        if (after.device, after.dtype) != (before.device, before.dtype):
            self.refuse(f"move to {after.device} and {after.dtype}")
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_is_torch_compile":  # a mark of torch.compile, which assigns `training` as it is, too
            vars(self)[name] = value
        elif vars(self).get(name, self) is not value:
            self.refuse(f"assignment of {name}")

    def __delattr__(self, name: str) -> None:
        self.refuse(f"deletion of {name}")

    def refuse(self, what: str, *arguments: Any) -> NoReturn:
        """Raise a RuntimeError that says what a frozen network cannot do, and what to do instead."""
        remedy = f"change, move, save or train the {self._original} from which it was made, then freeze it again"
        error = InvalidValue("", "evaluation only, because the network is frozen", f"{what}: {remedy}")
        error.caller = type(self).__name__
        raise error


def _refusing(method: str) -> Callable[..., NoReturn]:
    return lambda self, *args, **kwargs: self.refuse(f"call of {method}")


for _method in _REFUSED:
    setattr(FrozenModule, _method, _refusing(_method))
