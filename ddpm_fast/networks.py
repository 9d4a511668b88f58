"""Networks as sampling and evaluation take them: anything that is called as model(x_t, t) or model(x_t, t, class_labels)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def predict(model: nn.Module, x_t: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
    """The model's output, also where it comes inside an object with the field `sample`, as diffusers' models give it."""
    output = model(x_t, t) if class_labels is None else model(x_t, t, class_labels)
    tensor: Tensor = getattr(output, "sample", output)
    return tensor


def placed(model: nn.Module, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """The model if it is on this device in this dtype (None: wherever it is, as it is), else a copy of it that is."""
    model_device, model_dtype = device_and_dtype(model)
    device, dtype = torch.device(device or model_device), dtype or model_dtype
    same_device = device.type == model_device.type and device.index in (None, model_device.index)
    if same_device and dtype == model_dtype:
        return model
    return copy.deepcopy(model).to(device=device, dtype=dtype)


def device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Those of the model's first floating parameter, unless it names a dtype itself; the CPU and float32 if it has neither."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    dtype = getattr(model, "dtype", None)
    return parameter.device, dtype if isinstance(dtype, torch.dtype) else parameter.dtype


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts every module in eval mode; on leaving, those that were training train again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def model_config(model: nn.Module) -> Mapping[str, Any]:
    """The model's configuration in diffusers' keys; empty if it has none."""
    config = getattr(model, "config", None)
    return config if isinstance(config, Mapping) else {}
