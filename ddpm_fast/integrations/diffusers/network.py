"""diffusers' networks and pipelines, frozen."""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import Any, Final

import diffusers
import torch
from diffusers.models import attention_processor
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from ...errors import InvalidType, InvalidValue
from ...inference import FrozenUNet
from ...interface import OWN
from ...nn import UNetConfig
from ...nn.unet import unet_on_weights
from ..foreign import check_described, frozen_foreign, unwrapped
from ..frozen_module import FrozenModule
from ..fused_blocks import own_class

# Attention processors of diffusers that compute the same: a part of the heads at a time, or by another kernel.
_PROCESSORS: Final[tuple[Any, ...]] = (
    attention_processor.AttnProcessor2_0,
    attention_processor.AttnProcessor,
    attention_processor.SlicedAttnProcessor,
    attention_processor.XFormersAttnProcessor,
)


class FrozenUNet2DModel(FrozenModule, diffusers.UNet2DModel):
    """A `UNet2DModel` that a `FrozenUNet` computes. See `FrozenModule`."""

    def __init__(self, original: Any, frozen_unet: FrozenUNet) -> None:
        super().__init__(original, frozen_unet)
        vars(self)["_internal_dict"] = original.config

    @property
    def config(self) -> Any:
        """Configuration of the original, which cannot be changed."""
        return self._internal_dict

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> Any:
        """Evaluate the network as `UNet2DModel.forward` does. See `FrozenModule.forward`."""
        # diffusers cuts a Python float
        out = super().forward(sample, int(timestep) if isinstance(timestep, float) else timestep, class_labels)
        return UNet2DOutput(sample=out) if return_dict else (out,)


def frozen_network(
    unet: Any, dtype: torch.dtype | None, device: Any, num_timesteps: int | None, name: str = "x"
) -> FrozenUNet2DModel:
    """Freeze a network. Arguments and errors are those of `ddpm_fast.freeze`. `name` names the network in them."""
    unet = unwrapped(name, unet)
    if own_class(unet) is not diffusers.UNet2DModel:
        advice = "is frozen already" if isinstance(unet, FrozenModule) else "ddpm_fast.fuse may make faster"
        raise InvalidType(name, "to be a UNet2DModel", f"a {type(unet).__name__}, which {advice}")
    # A configuration may have keys that diffusers does not read. from_config leaves out those that it has noted as defaults.
    known = inspect.signature(diffusers.UNet2DModel).parameters
    try:
        own = unet.config.get(OWN) or {}
        config = UNetConfig.from_dict({key: unet.config[key] for key in known if key in unet.config} | own)
    except Exception as error:  # any value may be in a configuration
        raise InvalidValue(name, "to have a configuration that ddpm_fast.UNet supports", error) from error
    check_described(name, _why_of_another_library(unet))
    read = partial(unet_on_weights, name, "its configuration", config.to_dict(), trainable=False)
    # On the CPU, where not every processor runs.
    processors = {id(layer.processor): _PROCESSORS[0]() for layer in unet.modules() if hasattr(layer, "processor")}
    frozen = frozen_foreign(name, unet, read, dtype or unet.dtype, device, num_timesteps, processors)
    return FrozenUNet2DModel(unet, frozen)


def _why_of_another_library(unet: Any) -> str | None:
    """Return which layer or attention processor of a network is neither torch's nor diffusers', such as an adapter, or None."""
    for place, layer in unet.named_modules():
        kind = own_class(layer)
        if kind.__module__.partition(".")[0] not in ("torch", "diffusers"):
            return f"{place} is of class {kind.__module__}.{kind.__name__}"
        if hasattr(layer, "processor") and type(layer.processor) not in _PROCESSORS:
            return f"{place} has the processor {type(layer.processor).__name__}"
    return None


def frozen_pipeline(pipe: Any, dtype: torch.dtype | None, device: Any, num_timesteps: int | None) -> Any:
    """Freeze a pipeline's network. Arguments and errors are those of `ddpm_fast.freeze`."""
    trained = getattr(getattr(pipe, "scheduler", None), "config", {}).get("num_train_timesteps")
    frozen = copy.copy(pipe)
    frozen.unet = frozen_network(getattr(pipe, "unet", None), dtype, device, num_timesteps or trained, "x.unet")
    return frozen
