"""Sampling: Algorithm 2 of Ho et al. 2020, and any other sampler that a `SamplingPlan` describes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .images import evenly_spaced
from .ops import noise, reverse_step, sample_seeds
from .plan import SamplingPlan
from .reference import STREAM_X_T

_TRAJECTORY_FRAMES = 51


@overload
def sample(  # type: ignore[overload-overlap]  # False is an int too: the first that fits is meant
    model: nn.Module,
    plan: SamplingPlan,
    num_samples: int,
    *,
    seed: int | Tensor = ...,
    class_labels: int | Sequence[int] | Tensor | None = ...,
    guidance_scale: float | None = ...,
    batch_size: int | None = ...,
    return_trajectory: Literal[False, 0] = ...,
    progress: bool = ...,
    device: torch.device | str | None = ...,
    dtype: torch.dtype | None = ...,
    shape: Sequence[int] | None = ...,
) -> Tensor: ...
@overload
def sample(
    model: nn.Module,
    plan: SamplingPlan,
    num_samples: int,
    *,
    seed: int | Tensor = ...,
    class_labels: int | Sequence[int] | Tensor | None = ...,
    guidance_scale: float | None = ...,
    batch_size: int | None = ...,
    return_trajectory: bool | int,
    progress: bool = ...,
    device: torch.device | str | None = ...,
    dtype: torch.dtype | None = ...,
    shape: Sequence[int] | None = ...,
) -> tuple[Tensor, Tensor]: ...
def sample(
    model: nn.Module,
    plan: SamplingPlan,
    num_samples: int,
    *,
    seed: int | Tensor = 0,
    class_labels: int | Sequence[int] | Tensor | None = None,
    guidance_scale: float | None = None,
    batch_size: int | None = None,
    return_trajectory: bool | int = False,
    progress: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    shape: Sequence[int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draws images: x_T ~ N(0, I), then one network evaluation and one `reverse_step` for every row of the plan.

    Image i is a function of (seed, i), the model and the plan. Its noise is the same to the last bit whatever num_samples,
    batch_size, the device and the thread count; the image is the same up to the rounding of the network's convolutions.

    Args:
        model: called as model(x_t, t), or model(x_t, t, class_labels) if it has classes, with x_t [N, C, H, W] and t int64
            [N]; gives what the plan's `prediction` says (or an object with that as `.sample`). Used in eval mode and left
            as it was. If its weights are channels_last, so is x_t.
        plan: from `ddpm_plan`, `ddim_plan`, ...
        num_samples: images to draw.
        seed: an int; or int64 [num_samples], a seed an image: `sample_seeds(0, 16)[5:6]` draws image 5 of seed 0 alone.
        class_labels: one class for all, or one an image. None, for a model that has classes: its "no label" class
            (the last of the `num_class_embeds` in its config).
        guidance_scale: classifier-free guidance: m = m_u + guidance_scale (m_c - m_u), where m_u is for "no label". None or
            1 is the conditional model alone, at half the cost.
        batch_size: images at a time; None: all.
        return_trajectory: give the states on the way too: True for 51 of them, an int for that many, evenly spaced, 0 for none.
        progress: show a progress bar.
        device: where to run; None: where the model is.
        dtype: of the network; None: as it is. The state x_t stays float32 (float64 for a float64 network). Where device or
            dtype differ from the model's, a copy of the model is made for this call.
        shape: (C, H, W) of an image; None: `in_channels` and `sample_size` of the model's config.

    Returns:
        float32 (float64) [num_samples, C, H, W] on the device, in [-1, 1] if the plan clips. With return_trajectory also
        [frames, num_samples, C, H, W] on the CPU, x_T first and x_0 last.

    Raises:
        ValueError, TypeError: before any work, for an argument that is out of range or does not fit the model.
    """
    _check_positive("num_samples", num_samples)
    _check_positive("batch_size", num_samples if batch_size is None else batch_size)
    _check_positive("return_trajectory", int(return_trajectory) or 1)
    if not isinstance(plan, SamplingPlan):
        raise TypeError(f"sample: expected plan to be a SamplingPlan, got {type(plan).__name__}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"sample: expected dtype to be a floating dtype, got {dtype}")
    shape = _image_shape(model, plan, shape)
    seeds = resolve_seeds("sample", seed, num_samples)
    labels, no_label = resolve_labels("sample", model, class_labels, num_samples)
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise ValueError(f"sample: expected guidance_scale to be finite or None, got {guidance_scale}")
    guided = guidance_scale is not None and guidance_scale != 1
    if guided and (class_labels is None or no_label is None):
        reason = "class_labels is None" if class_labels is None else "the model's config has no num_class_embeds"
        raise ValueError(f"sample: expected guidance_scale to be None or 1, as {reason}, got {guidance_scale}")

    model = placed(model, device, dtype)
    model_device, model_dtype = device_and_dtype(model)
    device, dtype = torch.device(device or model_device), dtype or model_dtype
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    # Allocated outside of inference mode, so that the caller gets ordinary tensors.
    images = torch.empty((num_samples, *shape), dtype=state_dtype, device=device, memory_format=_memory_format(model, shape))
    trajectory: Tensor | None = None
    frames: dict[int, Tensor] = {}  # states to keep, by number: 0 is x_T, num_steps is x_0
    if return_trajectory:
        count = _TRAJECTORY_FRAMES if return_trajectory is True else return_trajectory
        kept = evenly_spaced(plan.num_steps + 1, count)
        trajectory = torch.empty((len(kept), num_samples, *shape), dtype=state_dtype)
        frames = dict(zip(kept, trajectory, strict=True))

    # Everything that the steps need is on the device before the first: none waits for the host.
    seeds = seeds.to(device)
    steps = plan.steps(device).unbind()
    timesteps = plan.timesteps.to(device)

    chunks = [slice(i, i + (batch_size or num_samples)) for i in range(0, num_samples, batch_size or num_samples)]
    bar = tqdm(total=len(chunks) * plan.num_steps, desc="sampling", unit="step", disable=not progress)
    with bar, evaluation_mode(model), torch.inference_mode():
        for chunk in chunks:
            x_t = images[chunk]  # stepped in place: what is left in it is x_0
            x_t.copy_(noise(x_t.shape, seeds[chunk], stream=STREAM_X_T, dtype=state_dtype, device=device))
            x_0 = torch.zeros_like(x_t) if plan.needs_x_0_prev else None
            labels_in = None if labels is None else labels[chunk].to(device)
            if guided and labels_in is not None and no_label is not None:
                labels_in = torch.cat([labels_in, torch.full_like(labels_in, no_label)])
            t = timesteps[:, None].expand(-1, len(x_t) * (2 if guided else 1))  # [S, N] or [S, 2 N]
            for i, step in enumerate(steps):
                if i in frames:
                    frames[i][chunk].copy_(x_t)
                x_in = x_t.to(dtype)
                stepped = reverse_step(
                    x_t,
                    predict(model, torch.cat([x_in, x_in]) if guided else x_in, t[i], labels_in),
                    step,
                    plan,
                    seeds=seeds[chunk] if plan.is_random else None,
                    x_0_prev=x_0,
                    guidance_scale=guidance_scale if guided else None,
                    return_x_0=plan.needs_x_0_prev,
                    out=x_t,
                )
                x_0 = stepped[1] if isinstance(stepped, tuple) else None
                bar.update()
            if plan.num_steps in frames:
                frames[plan.num_steps][chunk].copy_(x_t)
    images = images.contiguous()
    return images if trajectory is None else (images, trajectory)


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
    """Those of the model's first floating parameter; the CPU and float32 if it has none."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return parameter.device, parameter.dtype


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


def _check_positive(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"sample: expected {name} to be a positive integer, got {value!r}")


def _image_shape(model: nn.Module, plan: SamplingPlan, shape: Sequence[int] | None) -> tuple[int, ...]:
    config = model_config(model)
    if shape is None:
        channels, size = config.get("in_channels"), config.get("sample_size")
        if channels is None or size is None:
            raise ValueError("sample: expected shape to be given, as the model has no config with in_channels and sample_size")
        shape = (channels, size, size) if isinstance(size, int) else (channels, *size)
    if len(shape) == 0 or min(shape) < 1:
        raise ValueError(f"sample: expected shape to be positive integers (C, H, W), got {tuple(shape)}")
    wanted = shape[0] * (1 if plan.variance == "fixed" else 2)
    if config.get("out_channels", wanted) != wanted:
        raise ValueError(
            f"sample: expected a model with {wanted} output channels, as images have {shape[0]} and the plan's variance is "
            f"{plan.variance}, got out_channels {config['out_channels']}"
        )
    return tuple(shape)


def _memory_format(model: nn.Module, shape: Sequence[int]) -> torch.memory_format:
    """channels_last for images and a model whose convolutions have their weights so, else contiguous."""
    weights = (p for p in model.parameters() if p.dim() == 4 and not p.is_contiguous())
    if len(shape) == 3 and any(p.is_contiguous(memory_format=torch.channels_last) for p in weights):
        return torch.channels_last
    return torch.contiguous_format


def resolve_seeds(caller: str, seed: int | Tensor, num_samples: int) -> Tensor:
    """int64 [num_samples]: the given seeds, or those that an int stands for."""
    if not isinstance(seed, Tensor):
        return sample_seeds(seed, num_samples)
    if seed.dtype != torch.int64 or seed.shape != (num_samples,):
        raise ValueError(f"{caller}: expected seed to be an int or int64 [{num_samples}], got {seed.dtype} {list(seed.shape)}")
    return seed


def resolve_labels(
    caller: str, model: nn.Module, class_labels: int | Sequence[int] | Tensor | None, num_samples: int
) -> tuple[Tensor | None, int | None]:
    """A class for each sample, int64 [num_samples], and the "no label" class; None for what the model does not have.

    Args:
        caller: name of the function that the errors speak for.
        class_labels: one class, one a sample, or None: "no label".
    """
    config = model_config(model)
    num_classes = config.get("num_class_embeds")  # "no label" included
    no_label = None if num_classes is None else num_classes - 1
    if class_labels is None:
        return (None if no_label is None else torch.full((num_samples,), no_label)), no_label
    if config and num_classes is None:
        raise ValueError(f"{caller}: expected class_labels to be None, as the model has no classes, got {class_labels}")
    labels = torch.as_tensor(class_labels)
    if labels.is_floating_point() or labels.shape not in ((), (num_samples,)):
        raise ValueError(
            f"{caller}: expected class_labels to be an int or {num_samples} ints, got {labels.dtype} {list(labels.shape)}"
        )
    if num_classes is not None and (labels.min() < 0 or labels.max() >= num_classes):
        raise ValueError(f"{caller}: expected class_labels to be in 0..{num_classes - 1}, got {class_labels}")
    return labels.to(torch.int64).expand(num_samples), no_label
