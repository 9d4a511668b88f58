"""Sampling: Algorithm 2 of Ho et al. 2020, and every other sampler that is a `SamplingPlan`."""

from __future__ import annotations

import math
import sys
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
from .ops.checks import check_number
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
    """Draw images from a model.

    x_T is drawn from N(0, I). Each row of the plan then takes one network evaluation and one `reverse_step`
    (derivation eq. 13; Ho et al. 2020, Algorithm 2).

    Image i is a function of (seed, i), the model and the plan. Noise is bit-identical across batch sizes,
    devices and thread counts. Images match up to floating-point rounding in the network.

    A `UNet` runs in its inference form (see `freeze`), which ignores autocast. On a GPU it is bfloat16 by
    default and each step is one CUDA graph. The call does not wait for the GPU, so the images are complete
    only when the GPU is done. Inference form and graphs are kept in memory for the next call on the same
    stream. They are released with the model, or if its weights change.

    Args:
        model: Called as model(x_t, t), or model(x_t, t, class_labels) if it has classes, with x_t
            [N, C, H, W] and t int64 [N]. It returns what the plan's `prediction` says, as a tensor or as
            `.sample` of an object. It runs in eval mode and is not modified. If its weights are
            channels_last, so is x_t.
        plan: From `ddpm_plan`, `ddim_plan`, ...
        num_samples: Number of images.
        seed: An int, or int64 [num_samples] with a seed per image: `sample_seeds(0, 16)[5:6]` draws image 5
            of seed 0 alone.
        class_labels: One class for all images, or one per image. None, for a model with classes: its
            "no label" class, the last of `num_class_embeds` in its config.
        guidance_scale: Scale w of classifier-free guidance, m = m_u + w (m_c - m_u), with m_u the prediction
            for "no label". None or 1: the conditional prediction alone, at half the cost.
        batch_size: Images per network evaluation. None: all.
        return_trajectory: Also return intermediate states. True: 51 of them. An int: that many, evenly
            spaced. False or 0: none.
        progress: Show a progress bar.
        device: Device to run on. None: the model's device.
        dtype: Dtype of the network. x_t stays float32 (float64 for a float64 network). If device or dtype
            differ from the model's, a copy of the model is used. None: the model's dtype, but a float32
            `UNet` runs in bfloat16 on a GPU, or in float16 without bfloat16 support. Pass torch.float32
            to keep float32.
        shape: (C, H, W) of an image. None: `in_channels` and `sample_size` of the model's config.
        cuda_graph: Capture each step as a CUDA graph. None: on a GPU, for a `UNet` or its inference form.
            True: for any model. It must then compute the same from the same memory at each call and
            never wait for the GPU. False: never, and nothing is kept after the call. If capture fails,
            a warning is logged and kernels are launched one by one.

    Returns:
        float32 (float64 for a float64 network) [num_samples, C, H, W] on the device, in [-1, 1] if the plan
        clips. With return_trajectory also [frames, num_samples, C, H, W] on the CPU, from x_T to x_0.

    Raises:
        ValueError: An argument is out of range or does not fit the model. Checked before any computation.
        TypeError: An argument has an unsupported type.
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
        interval = 0.1 if sys.stderr.isatty() else 10  # seconds; a log file needs fewer lines than a terminal
        total = len(chunks) * plan.num_steps
        bar = tqdm(total=total, desc="sampling", unit="step", disable=not progress, mininterval=interval)
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
    """Return a key that is equal for plans with the same steps."""
    return plan.timesteps.numpy().tobytes(), plan.coefficients.numpy().tobytes(), plan.prediction, plan.variance


def _device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """Return the device to run on, with its index. "cuda" is the GPU that holds the model, if any."""
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
    """Return channels_last for images if the model's convolution weights are, else contiguous_format."""
    weights = (p for p in model.parameters() if p.dim() == 4 and not p.is_contiguous())
    if len(shape) == 3 and any(p.is_contiguous(memory_format=torch.channels_last) for p in weights):
        return torch.channels_last
    return torch.contiguous_format


def check_images(caller: str, name: str, model: nn.Module, shape: Sequence[int]) -> None:
    """Raise a ValueError if a `UNet` cannot take images of this shape. Other models are not checked.

    Args:
        caller: Name of the calling function for error messages.
        name: Name of the checked argument for error messages.
        model: The model.
        shape: [N, C, H, W].
    """
    if isinstance(model, UNet | FrozenUNet):
        UNetConfig.from_dict(model.config).check_images(caller, name, shape)


def resolve_seeds(caller: str, seed: int | Tensor, num_samples: int) -> Tensor:
    """Return the seeds of the samples, int64 [num_samples].

    Args:
        caller: Name of the calling function for error messages.
        seed: An int, or int64 [num_samples].
        num_samples: Number of samples.

    Raises:
        ValueError: `seed` has another dtype or shape.
    """
    if not isinstance(seed, Tensor):
        return sample_seeds(seed, num_samples)
    if seed.dtype != torch.int64 or seed.shape != (num_samples,):
        raise ValueError(f"{caller}: expected seed to be an int or int64 [{num_samples}], got {seed.dtype} {list(seed.shape)}")
    return seed


def resolve_labels(
    caller: str, model: nn.Module, class_labels: int | Sequence[int] | Tensor | None, num_samples: int
) -> tuple[Tensor | None, int | None]:
    """Return the class of each sample, int64 [num_samples], and the "no label" class.

    Both are None for a model without classes.

    Args:
        caller: Name of the calling function for error messages.
        model: The model.
        class_labels: One class, one per sample, or None for "no label".
        num_samples: Number of samples.

    Raises:
        ValueError: Labels are out of range, have another shape, or the model has no classes.
        TypeError: Labels are not integers.
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
