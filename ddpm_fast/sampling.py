"""Sampling: Algorithm 2 of Ho et al. 2020, and any other sampler that a `SamplingPlan` describes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor, nn

from . import graph
from .images import evenly_spaced
from .loop import Loop
from .networks import device_and_dtype, evaluation_mode, model_config
from .nn import FrozenUNet, UNet, UNetConfig
from .ops import sample_seeds
from .ops._library import check_number
from .plan import SamplingPlan

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
    cuda_graph: bool | None = ...,
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
    cuda_graph: bool | None = ...,
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
    cuda_graph: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draws images: x_T ~ N(0, I), then one network evaluation and one `reverse_step` for every row of the plan.

    Image i is a function of (seed, i), the model and the plan. Its noise is the same to the last bit whatever num_samples,
    batch_size, the device and the thread count; the image is the same up to the rounding of the network's convolutions.

    A `UNet` runs in its inference form (see `freeze`), which autocast does not change. On a GPU that is in bfloat16 by default,
    and each step is one CUDA graph: from the first step on the host waits for nothing, so the images are ready when the GPU
    is. Inference form and graphs, and the memory they take, are kept for the next call (on the same stream) as long as the
    model lives and its weights do not change.

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
        dtype: of the network. The state x_t stays float32 (float64 for a float64 network). Where device or dtype differ from
            the model's, a copy of the model is made. None: as the model is, except that a float32 `UNet` runs in bfloat16 on
            a GPU (float16 where the GPU has no bfloat16): dtype=torch.float32 keeps it float32.
        shape: (C, H, W) of an image; None: `in_channels` and `sample_size` of the model's config.
        cuda_graph: None: on a GPU, for a `UNet` or its inference form. True: for any model; it must compute the same from the
            same memory whenever it is called, without asking the host. False: for none; then nothing is kept after the call.
            Where a graph cannot be made, a warning is logged and the steps are launched one kernel at a time.

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
    check_images("sample", "num_samples and shape", model, (num_samples, *shape))
    seeds = resolve_seeds("sample", seed, num_samples)
    labels, no_label = resolve_labels("sample", model, class_labels, num_samples)
    check_number("sample", "guidance_scale", 1 if guidance_scale is None else guidance_scale)
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise ValueError(f"sample: expected guidance_scale to be finite or None, got {guidance_scale}")
    guided = guidance_scale is not None and guidance_scale != 1
    if guided and (class_labels is None or no_label is None):
        reason = "class_labels is None" if class_labels is None else "the model's config has no num_class_embeds"
        raise ValueError(f"sample: expected guidance_scale to be None or 1, as {reason}, got {guidance_scale}")

    if isinstance(model, FrozenUNet) and plan.timesteps.max() >= model.num_timesteps:
        raise ValueError(f"sample: expected a plan of timesteps below {model.num_timesteps}, got {int(plan.timesteps.max())}")
    device = _device(model, device)
    if cuda_graph and device.type not in graph.DEVICE_TYPES:
        raise ValueError(f"sample: expected cuda_graph to be None or False on {device.type}, got True")
    if cuda_graph is False:
        graph.forget(model)
    with graph.session(model, device, dtype, plan.schedule.num_timesteps, cuda_graph) as running:
        network = model if running.network is None else running.network
        _, dtype = device_and_dtype(network)
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        images = torch.empty((num_samples, *shape), dtype=state_dtype, device=device)
        trajectory: Tensor | None = None
        frames: dict[int, Tensor] = {}  # states to keep, by number: 0 is x_T, num_steps is x_0
        if return_trajectory:
            kept = evenly_spaced(plan.num_steps + 1, _TRAJECTORY_FRAMES if return_trajectory is True else return_trajectory)
            # A GPU writes to pinned memory by itself, while the host goes on.
            pin = device.type == "cuda"
            trajectory = torch.empty((len(kept), num_samples, *shape), dtype=state_dtype, pin_memory=pin)
            frames = dict(zip(kept, trajectory, strict=True))

        # Everything that the steps need is on the device before the first: none waits for the host.
        seeds = seeds.to(device)
        labels = None if labels is None else labels.to(device)
        make = partial(
            Loop,
            plan,
            state_dtype=state_dtype,
            network_dtype=dtype,
            memory_format=_memory_format(network, shape),
            device=device,
            label=None if labels is None else no_label or 0,
            guidance_scale=guidance_scale if guided else None,
        )
        chunks = [slice(i, i + (batch_size or num_samples)) for i in range(0, num_samples, batch_size or num_samples)]
        from tqdm.auto import tqdm

        # On a GPU the bar counts the steps handed over: to know how many are done, the host would have to wait for them.
        bar = tqdm(total=len(chunks) * plan.num_steps, desc="sampling", unit="step", disable=not progress)
        with bar, evaluation_mode(network), torch.inference_mode():
            for chunk in chunks:
                n = len(images[chunk])
                key = (n, shape, labels is not None, guidance_scale if guided else None, _rows(plan))
                loop = running.loop(key, partial(make, (n, *shape)), network)
                loop.start(seeds[chunk], None if labels is None else labels[chunk])
                for i in range(plan.num_steps):
                    if i in frames:
                        frames[i][chunk].copy_(loop.x_t, non_blocking=True)
                    if loop.replay is None:
                        loop.advance(network)
                    else:
                        loop.replay()
                    bar.update()
                if plan.num_steps in frames:
                    frames[plan.num_steps][chunk].copy_(loop.x_t, non_blocking=True)
                images[chunk] = loop.x_t
    if trajectory is None:
        return images
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # the frames are on their way to the host
    return images, trajectory


def _rows(plan: SamplingPlan) -> Hashable:
    """Equal for plans that do the same at every step."""
    return plan.timesteps.numpy().tobytes(), plan.coefficients.numpy().tobytes(), plan.prediction, plan.variance


def _device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """Where to run, with the device's number; "cuda" is the GPU that the model is on, if it is on one."""
    model_device, _ = device_and_dtype(model)
    if device is None or torch.device(device) == torch.device(model_device.type):
        return model_device
    return torch.empty(0, device=device).device


def _check_positive(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"sample: expected {name} to be a positive integer, got {value!r}")


def _image_shape(model: nn.Module, plan: SamplingPlan, shape: Sequence[int] | None) -> tuple[int, ...]:
    config = model_config(model)
    if shape is None:
        channels, size = config.get("in_channels"), config.get("sample_size")
        if channels is None or size is None:
            raise ValueError(
                "sample: expected shape (C, H, W) to be given, as the model has no config with in_channels and sample_size"
            )
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


def check_images(caller: str, name: str, model: nn.Module, shape: Sequence[int]) -> None:
    """Raises what a `UNet` would raise of images of this shape, [N, C, H, W]; of another model nobody knows."""
    if isinstance(model, UNet | FrozenUNet):
        UNetConfig.from_dict(model.config).check_images(caller, name, shape)


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
    wanted = f"{caller}: expected class_labels to be an int or {num_samples} ints"
    try:
        labels = torch.as_tensor(class_labels)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{wanted}, got {class_labels!r}") from None
    if labels.is_floating_point() or labels.shape not in ((), (num_samples,)):
        raise ValueError(f"{wanted}, got {labels.dtype} {list(labels.shape)}")
    if num_classes is not None and (labels.min() < 0 or labels.max() >= num_classes):
        raise ValueError(f"{caller}: expected class_labels to be in 0..{num_classes - 1}, got {class_labels}")
    return labels.to(torch.int64).expand(num_samples), no_label
