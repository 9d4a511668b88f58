"""Arguments of calls that draw or evaluate images: seeds, classes and shapes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias, cast

import torch
from torch import Tensor, nn

from ..checks import (
    check_callable,
    check_dtype,
    check_int,
    check_ints,
    check_number,
    check_strided,
    check_type,
    checked_seeds,
    computing_device,
)
from ..errors import InvalidType, InvalidValue, expect
from ..inference import FrozenUNet
from ..inference import cuda_graph as graphs
from ..inference.model import Model, device_and_dtype, inference_form, model_config
from ..nn import UNet, UNetConfig
from ..ops import sample_seeds
from ..plan import SamplingPlan
from ..resources import check_free_memory

ClassLabels: TypeAlias = int | str | Sequence[int | str] | Tensor | None
Callback: TypeAlias = Callable[[int, int, Tensor], None]

_ALWAYS_FREE: Final = 64 << 20  # bytes; asking the system for its free memory takes as long as a small network's step


def check_image_shape(caller: str, name: str, model: Model, shape: Sequence[int]) -> None:
    """Raise a ValueError if a `UNet` cannot take images of this shape. Other models are not checked.

    Args:
        caller: Name of the calling function for error messages.
        name: Name of the checked argument for error messages.
        model: The model.
        shape: [N, C, H, W].
    """
    if isinstance(model, UNet | FrozenUNet):
        UNetConfig.from_dict(model.config).check_image_shape(caller, name, shape)


def image_channels(config: Mapping[str, Any], predicts_variance: bool) -> int | None:
    """Return the channels C of the images that a model draws: those that it predicts, without a predicted variance.

    Its other input channels are the condition's. None: the configuration does not say.
    """
    reads: int | None = config.get("in_channels")
    outputs: int | None = config.get("out_channels")
    if outputs is None or (predicts_variance and outputs % 2) or (not predicts_variance and outputs == 2 * (reads or 0)):
        return reads  # the plan's variance is not the model's, which is said elsewhere
    return outputs // 2 if predicts_variance else outputs


def check_model(caller: str, model: Model) -> None:
    """Raise a TypeError unless `model` is a callable object. A class is not one, and a process does not take x_t and t."""
    if not callable(model) or isinstance(model, type):
        got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise InvalidType(caller, "model", "to be an nn.Module or another callable object", got)
    kinds = {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(model).__mro__}
    if ("denoising_diffusion_pytorch", "GaussianDiffusion") in kinds:  # its call takes images and returns a loss
        raise InvalidType(
            caller,
            "model",
            "to be a network, called as model(x_t, t)",
            f"a {type(model).__name__} x: pass x.model, and plan_of(x) as the plan",
        )


def check_takes_labels(caller: str, model: Model, class_labels: ClassLabels) -> None:
    """Raise a ValueError if labels are given and the model's call has no third argument."""
    if class_labels is None:
        return
    try:
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except (TypeError, ValueError):  # a call without a signature
        return
    try:
        signature.bind(None, None, None)
    except TypeError:
        raise InvalidValue(
            caller, "class_labels", "to be None, as the model takes no labels beside x_t and t", repr(class_labels)
        ) from None


def resolve_seeds(caller: str, seed: int | Tensor, num_samples: int) -> Tensor:
    """Return the seeds of the samples, int64 [num_samples].

    Args:
        caller: Name of the calling function for error messages.
        seed: An int, or int64 [num_samples].
        num_samples: Number of samples.

    Raises:
        ValueError: `seed` has another shape or is out of range.
        TypeError: `seed` is neither an int nor an int64 tensor.
    """
    if isinstance(seed, int):
        check_int(caller, "seed", seed, -(1 << 63), (1 << 64) - 1)
        return sample_seeds(seed, num_samples)
    if not isinstance(seed, Tensor):
        raise InvalidType(caller, "seed", f"to be an int or int64 [{num_samples}]", type(seed).__name__)
    return checked_seeds(caller, seed, num_samples, torch.device("cpu") if seed.is_meta else seed.device, name="seed")


def resolve_labels(
    caller: str, config: Mapping[str, Any], class_labels: ClassLabels, num_samples: int
) -> tuple[Tensor | None, int | None]:
    """Return the class of each sample, int64 [num_samples], and the "no label" class.

    Both are None for a model without classes.

    Args:
        caller: Name of the calling function for error messages.
        config: The model's configuration, empty if it has none.
        class_labels: One class, one per sample, or None for "no label". A class is a number or a name.
        num_samples: Number of samples.

    Raises:
        ValueError: Labels are out of range, have another shape, a name is unknown, or the model has no classes.
        TypeError: Labels are not integers.
    """
    num_classes = config.get("num_class_embeds")  # "no label" included
    no_label = None if num_classes is None else num_classes - 1
    if class_labels is None:
        return (None if no_label is None else torch.full((num_samples,), no_label, device="cpu")), no_label
    expect(
        not config or num_classes is not None, caller, "class_labels", "to be None, as the model has no classes", class_labels
    )
    class_labels = labels_of(caller, config, class_labels)
    wanted = f"to be an int or {num_samples} ints"
    try:
        labels = torch.as_tensor(class_labels)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidType(caller, "class_labels", wanted, repr(class_labels)) from None
    integers = not labels.is_floating_point() and not labels.is_complex() and labels.dtype != torch.bool
    expect(
        integers and labels.shape in ((), (num_samples,)),
        caller,
        "class_labels",
        wanted,
        f"{labels.dtype} {list(labels.shape)}",
    )
    if labels.min() < 0 or (num_classes is not None and labels.max() >= num_classes):
        allowed = "at least 0" if num_classes is None else f"in 0..{num_classes - 1}"
        raise InvalidValue(caller, "class_labels", f"to be {allowed}", class_labels)
    return labels.to(torch.int64).expand(num_samples), no_label


def labels_of(
    caller: str, config: Mapping[str, Any], class_labels: int | str | Sequence[int | str] | Tensor | None
) -> int | Sequence[int] | Tensor | None:
    """Return class labels with each name of a class replaced by its number.

    Upper and lower case are the same. Numbers and tensors are returned unchanged, and are not checked.

    Args:
        caller: Name of the calling function for error messages.
        config: The model's configuration. `class_names` has the names.
        class_labels: A number or a name, several of them, a tensor, or None.

    Raises:
        ValueError: A name is unknown, or the model has no class names.
    """
    if isinstance(class_labels, str):
        return _label_of(caller, config, class_labels)
    if isinstance(class_labels, Sequence) and any(isinstance(label, str) for label in class_labels):
        return [_label_of(caller, config, label) if isinstance(label, str) else label for label in class_labels]
    return cast("int | Sequence[int] | Tensor | None", class_labels)


def _label_of(caller: str, config: Mapping[str, Any], name: str) -> int:
    names: Sequence[str] = config.get("class_names") or ()
    expect(names, caller, "class_labels", "to be integers, as the model has no class names", repr(name))
    if name in names:  # exactly: other names may differ from it in case alone
        return names.index(name)
    lower = [known.lower() for known in names]
    if name.lower() not in lower:
        known_names = ", ".join(names)
        raise InvalidValue(caller, "class_labels", f"to be integers or names among {known_names}", repr(name))
    return lower.index(name.lower())


@dataclass(frozen=True)
class Request:
    """Checked arguments of a call that draws images.

    Attributes:
        num_samples: Number of images.
        batch_size: Images per network evaluation.
        seeds: int64 [num_samples].
        labels: int64 [num_samples], or None for a network without classes.
        label: Label of samples without labels of their own. None: the network gets no labels.
        guidance_scale: None: no second prediction.
        x_T: Initial states, or None.
        condition: [num_samples, K, H, W], or None.
        progress: Show a progress bar.
        callback: See `sample`.
    """

    num_samples: int
    batch_size: int
    seeds: Tensor
    labels: Tensor | None
    label: int | None
    guidance_scale: float | None
    x_T: Tensor | None
    condition: Tensor | None
    progress: bool
    callback: Callback | None

    @property
    def condition_channels(self) -> int:
        """K, or 0 without a condition."""
        return 0 if self.condition is None else self.condition.shape[1]

    def part(self, images: slice, callback: Callback) -> Request:
        """Return the request for some of the images, as one batch."""
        parts: dict[str, Any] = {}
        for name in ("seeds", "labels", "x_T", "condition"):
            values = getattr(self, name)
            parts[name] = None if values is None else values[images]
        count = len(parts["seeds"])
        return replace(self, num_samples=count, batch_size=count, callback=callback, **parts)


def checked_request(
    caller: str,
    model: Model,
    device: torch.device,
    shape: tuple[int, ...],
    num_samples: int,
    *,
    seed: int | Tensor,
    batch_size: int | None,
    class_labels: ClassLabels,
    guidance_scale: float | None,
    x_T: Tensor | None = None,
    condition: Tensor | None = None,
    progress: bool,
    callback: Callback | None = None,
    num_frames: int = 0,
    num_kept: int | None = None,
) -> Request:
    """Check what `sample` documents, and resolve seeds and labels.

    `caller` is the function that error messages name, `shape` is (C, H, W). Images on the host and `num_frames` states of each
    are not begun if they do not fit into its memory. `num_kept` images are in memory at once. None: all.
    """
    check_int(caller, "num_samples", num_samples, 1, 1 << 32)
    num_kept = num_samples if num_kept is None else min(num_kept, num_samples)
    state = 4 * num_kept * math.prod(shape)  # bytes, or twice as many for a float64 network
    for name, value, needed in (
        ("num_samples", num_samples, 8 * num_samples + (state if device.type == "cpu" else 0)),
        ("num_frames", num_frames, num_frames * state),
    ):
        if needed > _ALWAYS_FREE:
            check_free_memory(caller, name, value, needed)
    check_int(caller, "batch_size", batch_size, 1, optional=True)
    seeds = resolve_seeds(caller, seed, num_samples)
    labels, no_label = resolve_labels(caller, model_config(model), class_labels, num_samples)
    check_takes_labels(caller, model, class_labels)
    guided = _is_guided(caller, guidance_scale, class_labels, no_label)
    if x_T is not None:
        _check_maps(caller, "x_T", x_T, [num_samples, *shape])
    check_condition(caller, model, shape, num_samples, condition)
    check_type(caller, "progress", progress, bool)
    check_callable(caller, "callback", callback)
    return Request(
        num_samples,
        batch_size or num_samples,
        seeds,
        labels,
        None if labels is None else no_label or 0,
        guidance_scale if guided else None,
        x_T,
        condition,
        progress,
        callback,
    )


def _check_maps(caller: str, name: str, x: Any, wanted: list[int]) -> None:
    """Raise unless x is a floating tensor of the wanted shape, finite if it is on a CPU."""
    if not isinstance(x, Tensor):
        raise InvalidType(caller, name, "to be a tensor or None", type(x).__name__)
    check_strided(caller, name, x)
    fits = x.is_floating_point() and list(x.shape) == wanted
    expect(fits, caller, name, f"to be floating {wanted}", f"{x.dtype} {list(x.shape)}")
    expect(not x.is_meta, caller, name, "to have values", "a tensor on the meta device")
    if x.device.type == "cpu" and not x.isfinite().all():  # a GPU would have to be waited for
        raise InvalidValue(caller, name, "to be finite", "NaN or infinity")


def check_condition(caller: str, model: Model, shape: tuple[int, ...], num_samples: int, condition: Any) -> None:
    """Raise unless the condition is as the model reads it. A model without a configuration reads any number of channels."""
    channels = model_config(model).get("in_channels")
    free = None if channels is None else channels - shape[0]
    size = ", ".join(map(str, shape[1:]))
    if condition is None:
        wanted = f"to be [{num_samples}, {free}, {size}], as the model reads {channels} channels and x_t has {shape[0]}"
        expect(not free, caller, "condition", wanted, "None")
        return
    expect(free != 0, caller, "condition", "to be None, as the model reads x_t alone", "a condition")
    found = condition.shape[1] if isinstance(condition, Tensor) and condition.dim() == len(shape) + 1 else 0
    _check_maps(caller, "condition", condition, [num_samples, max(found, 1) if free is None else free, *shape[1:]])


def _is_guided(caller: str, guidance_scale: float | None, class_labels: Any, no_label: int | None) -> bool:
    """Return whether guidance takes a second prediction."""
    check_number(caller, "guidance_scale", guidance_scale, finite=True, optional=True)
    if guidance_scale is None or guidance_scale == 1:
        return False
    if class_labels is None or no_label is None:
        reason = "class_labels is None" if class_labels is None else "the model's config has no num_class_embeds"
        raise InvalidValue(caller, "guidance_scale", f"to be None or 1, as {reason}", guidance_scale)
    return True


def _device(caller: str, model: Model, device: torch.device | str | None) -> torch.device:
    """Return the device to run on, with its index. "cuda" is the GPU that holds the model, if any."""
    model_device, _ = device_and_dtype(model)
    device = model_device if device is None else computing_device(caller, device)
    if device == torch.device(model_device.type):
        return model_device
    return torch.empty(0, device=device).device


def checked_setup(
    caller: str,
    model: Model,
    plan: SamplingPlan,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    shape: Sequence[int] | None,
    cuda_graph: bool | None,
) -> tuple[tuple[int, ...], torch.device]:
    """Check the arguments of a Sampler. Return the shape of an image, and the device."""
    check_model(caller, model)
    model = inference_form(model)
    check_dtype(caller, "dtype", dtype, optional=True)
    check_type(caller, "cuda_graph", cuda_graph, bool, optional=True)
    shape = _image_shape(caller, model, plan, shape)
    if isinstance(model, FrozenUNet):
        last, total = int(plan.timesteps.max()), model.num_timesteps
        expect(last < total, caller, "plan", f"to have timesteps below {total}", last)
    device = _device(caller, model, device)
    expect(
        not cuda_graph or device.type in graphs.DEVICE_TYPES,
        caller,
        "cuda_graph",
        f"to be None or False on {device.type}",
        "True",
    )
    return shape, device


def _image_shape(caller: str, model: Model, plan: SamplingPlan, shape: Sequence[int] | None) -> tuple[int, ...]:
    check_type(caller, "plan", plan, SamplingPlan)
    config = model_config(model)
    reads, size = config.get("in_channels"), config.get("sample_size")
    if shape is None:
        channels = image_channels(config, plan.variance != "fixed")
        if channels is None or size is None:
            expected = "to be (C, H, W), as the model has no config with in_channels and sample_size"
            raise InvalidValue(caller, "shape", expected, "None")
        shape = (channels, size, size) if isinstance(size, int) else (channels, *size)
    check_ints(caller, "shape", shape, 1, "integers (C, H, W)")
    wanted = shape[0] * (1 if plan.variance == "fixed" else 2)
    given = config.get("out_channels", wanted)
    as_images = f"as images have {shape[0]} and the plan's variance is {plan.variance}"
    expect(given == wanted, caller, "", f"a model with {wanted} output channels, {as_images}", f"out_channels {given}")
    if reads is not None:
        wanted_shape = f"to be (C, H, W) with C at most {reads}, the model's in_channels"
        expect(shape[0] <= reads, caller, "shape", wanted_shape, tuple(shape))
        check_image_shape(caller, "shape", model, (1, reads, *shape[1:]))
    return tuple(shape)
