"""Networks for sampling and evaluation: any model(x_t, t) or model(x_t, t, class_labels)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import InvalidValue

Model: TypeAlias = Callable[..., Any]
"""An nn.Module, or a `FrozenUNet`. Other objects need attributes `device` and `dtype`."""


def inference_form(model: Model) -> Model:
    """Return the `FrozenUNet` that a frozen network of another library holds, or any other model unchanged."""
    return getattr(model, "frozen_unet", model)


def predict(model: Model, x_t: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
    """Return the model's output as a tensor.

    Models of diffusers return an object whose field `sample` is the tensor.

    Args:
        model: The model.
        x_t: [N, C, H, W].
        t: int64 [N].
        class_labels: Labels [N, ...], or None for a model without.
    """
    output: Any = model(x_t, t) if class_labels is None else model(x_t, t, class_labels)
    tensor: Tensor = getattr(output, "sample", output)
    return tensor


def placed(model: Model, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Model:
    """Return the model if it has this device and dtype, else a copy that does.

    Args:
        model: The model.
        device: None: the model's device.
        dtype: None: the model's dtype.

    Raises:
        ValueError: The model is no nn.Module and has another device or dtype.
    """
    model_device, model_dtype = device_and_dtype(model)
    device, dtype = torch.device(device or model_device), dtype or model_dtype
    same_device = device.type == model_device.type and device.index in (None, model_device.index)
    if same_device and dtype == model_dtype:
        return model
    if not isinstance(model, nn.Module):
        raise InvalidValue(
            "device and dtype",
            f"to be those of the {type(model).__name__}, {model_device} and {model_dtype}",
            f"{device} and {dtype}: freeze the model again",
        )
    return copy.deepcopy(model).to(device=device, dtype=dtype)


def device_and_dtype(model: Model) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype of the model's first floating parameter.

    An attribute `dtype` of the model has priority. Without parameters the result is the CPU and float32.
    """
    if not isinstance(model, nn.Module):
        device: torch.device = getattr(model, "device", torch.device("cpu"))
        return device, getattr(model, "dtype", torch.float32)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    dtype = getattr(model, "dtype", None)
    return parameter.device, dtype if isinstance(dtype, torch.dtype) else parameter.dtype


@contextmanager
def evaluation_mode(model: Model) -> Iterator[None]:
    """Put every module in eval mode. On exit, restore the modules that were training."""
    if not isinstance(model, nn.Module):
        yield
        return
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def model_config(model: Model) -> Mapping[str, Any]:
    """Return the model's configuration in diffusers' keys, empty if it has none."""
    config = getattr(model, "config", None)
    return config if isinstance(config, Mapping) else {}
