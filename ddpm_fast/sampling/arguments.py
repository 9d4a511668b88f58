"""Checked arguments of calls that draw or evaluate images."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from ..checks import check_callable, check_int, check_values, checked_seeds, computing_device
from ..distributed import own_device
from ..dtypes import FLOATS
from ..errors import InvalidType, InvalidValue, expect, renaming
from ..inference.interface import Interface
from ..inference.model import Model, device_and_dtype
from ..ops import sample_seeds
from ..options import checked_options
from .options import ClassLabels, DrawOptions

_UNKNOWN: Final = (
    "nothing says which label is no class: pass no_label to the Sampler, or add "
    '"_ddpm_fast": {"no_label": NUMBER} to the config.json of the model, exported if it is a run'
)
_INTEGERS: Final = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_DRAWING: Final = {  # objects that hold a network, by the library and the class
    ("denoising_diffusion_pytorch", "GaussianDiffusion"): "pass x.model, and plan_of(x) as the plan",
    ("diffusers", "DiffusionPipeline"): "pass x.unet, and plan_of(x.scheduler) as the plan",
    ("ddpm_fast", "Pretrained"): "pass x.model, or call x.sampler()",
    ("ddpm_fast", "Sampler"): "pass x.network, or call x itself",
}


def check_model(caller: str, model: Model) -> None:
    """Raise a TypeError unless `model` may be called as model(x_t, t). Classes and pipelines take other arguments."""
    for kind in type(model).__mro__:
        if advice := _DRAWING.get((kind.__module__.partition(".")[0], kind.__name__)):
            got = f"a {type(model).__name__} x: {advice}"
            raise InvalidType(caller, "model", "to be a network, called as model(x_t, t)", got)
    if not callable(model) or isinstance(model, type):
        got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise InvalidType(caller, "model", "to be an nn.Module or another callable object", got)


def sampling_device(caller: str, model: Model, device: torch.device | str | None) -> torch.device:
    """Return the device to run on, with its index.

    None and "cuda" are the GPU that holds the model, if any, but a module on the first GPU goes to that of the local rank.
    """
    model_device, _ = device_and_dtype(model)
    unnumbered = torch.device(model_device.type)
    expect(model_device.type != "meta", caller, "model", "to have weights", "some on the meta device")
    asked = unnumbered if device is None else computing_device(caller, device)
    on_first = model_device.type == "cuda" and not model_device.index and isinstance(model, nn.Module)
    if asked == unnumbered and not on_first:
        return model_device
    own = own_device(asked)
    if own == unnumbered:
        return model_device
    return torch.empty(0, device=own).device if own.index is None else own


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
        with renaming(caller):
            return sample_seeds(seed, num_samples)
    if not isinstance(seed, Tensor):
        raise InvalidType(caller, "seed", f"to be an int or int64 [{num_samples}]", type(seed).__name__)
    return checked_seeds(caller, seed, num_samples, torch.device("cpu") if seed.is_meta else seed.device, name="seed")


def resolve_labels(
    caller: str, model: Model, interface: Interface, class_labels: ClassLabels, num_samples: int, *, in_turn: bool = False
) -> Tensor | None:
    """Return the class of each sample, int64 [num_samples], or None for a model without classes.

    Args:
        caller: Name of the calling function for error messages.
        model: The model.
        interface: Its interface.
        class_labels: See `BatchOptions`.
        num_samples: Number of samples.
        in_turn: Without labels take the classes in turn, if there are any, and not "none".

    Raises:
        ValueError: Labels are out of range, have another shape, a name is unknown, or the model has no classes. None are given,
            and no label is known to stand for no class.
        TypeError: Labels are not integers.
    """
    no_label, count = interface.no_label, interface.num_labels
    if class_labels is not None:
        check_takes_labels(caller, model, "class_labels", class_labels)
    unnamed = "none" not in [name.lower() for name in interface.class_names]  # a class may be called none
    if class_labels is None and in_turn and interface.classes:
        return torch.tensor(interface.classes, device="cpu").repeat(-(-num_samples // len(interface.classes)))[:num_samples]
    if class_labels is None or (isinstance(class_labels, str) and class_labels.lower() == "none" and unnamed):
        wanted = f"to be labels of classes, as {_UNKNOWN}"
        expect(not count or no_label is not None, caller, "class_labels", wanted, class_labels)
        return None if no_label is None else torch.full((num_samples,), no_label, device="cpu")
    expect(count != 0 or no_label is not None, caller, "class_labels", "to be None, as the model has no classes", class_labels)
    class_labels = labels_of(caller, interface.class_names, class_labels)
    wanted = f"to be an int or {num_samples} ints"
    try:
        labels = torch.as_tensor(class_labels)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidType(caller, "class_labels", wanted, repr(class_labels)) from None
    check_values(caller, "class_labels", labels)
    fits = labels.dtype in _INTEGERS and labels.shape in ((), (num_samples,))
    expect(fits, caller, "class_labels", wanted, f"{labels.dtype} of shape {tuple(labels.shape)}")
    if labels.min() < 0 or (count is not None and labels.max() >= count):
        allowed = "at least 0" if count is None else f"in 0..{count - 1}"
        raise InvalidValue(caller, "class_labels", f"to be {allowed}", class_labels)
    return labels.to(torch.int64).expand(num_samples)


def check_takes_labels(caller: str, model: Model, name: str, value: object) -> None:
    """Raise a ValueError if the model's call has no third argument. `value` is an argument that needs one."""
    try:
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except (TypeError, ValueError):  # a call without a signature
        return
    try:
        signature.bind(None, None, None)
    except TypeError:
        wanted = "to be None, as the model takes x_t and t alone"
        raise InvalidValue(caller, name, wanted, repr(value)) from None


def labels_of(
    caller: str, names: Sequence[str], class_labels: int | str | Sequence[int | str] | Tensor | None
) -> int | Sequence[int] | Tensor | None:
    """Return class labels with each text replaced by its number.

    A text is a name, in upper or lower case, or a number if no name is one. Numbers and tensors are returned unchanged, and are
    not checked.

    Args:
        caller: Name of the calling function for error messages.
        names: The names of the classes in the order of their labels, empty if they are unknown.
        class_labels: A number or a text, several of them, a tensor, or None.

    Raises:
        ValueError: A text is neither a name nor a number, or there are names that are numbers, and it is none of them.
    """
    if isinstance(class_labels, str):
        return _label_of(caller, names, class_labels)
    if isinstance(class_labels, Sequence) and any(isinstance(label, str) for label in class_labels):
        return [_label_of(caller, names, label) if isinstance(label, str) else label for label in class_labels]
    return cast("int | Sequence[int] | Tensor | None", class_labels)


def _label_of(caller: str, names: Sequence[str], name: str) -> int:
    if name in names:  # exactly: other names may differ from it in case alone
        return names.index(name)
    lower = [known.lower() for known in names]
    if name.lower() in lower:
        return lower.index(name.lower())
    if name.isdecimal() and len(name) < 19 and not any(known.isdecimal() for known in names):
        return int(name)
    wanted = f"integers or names among {', '.join(names)}" if names else "integers, as the model has no class names"
    raise InvalidValue(caller, "class_labels", f"to be {wanted}", repr(name))


@dataclass(frozen=True)
class Request:
    """Checked arguments of a call that draws images.

    Attributes:
        num_samples: Number of images.
        seeds: int64 [num_samples].
        labels: int64 [num_samples], or None for a network without classes.
        no_label: Label of the half of guidance without classes. None: the network gets no labels.
        given: The other options, see `DrawOptions`. `batch_size` is a number, and `guidance_scale` None without a second
            prediction.
    """

    num_samples: int
    seeds: Tensor
    labels: Tensor | None
    no_label: int | None
    given: Mapping[str, Any]

    @property
    def condition_channels(self) -> int:
        """K, or 0 without a condition."""
        return 0 if self.given["condition"] is None else self.given["condition"].shape[1]

    def changed(self, **given: Any) -> Request:
        """Return the request with other options."""
        return replace(self, given={**self.given, **given})

    def part(self, images: slice, **given: Any) -> Request:
        """Return a request for one batch: some of the images. `given` replaces options."""

        def cut(value: Any) -> Any:
            return value[images] if isinstance(value, Tensor) else value

        seeds, kept = self.seeds[images], {name: cut(value) for name, value in self.given.items()}
        return Request(len(seeds), seeds, cut(self.labels), self.no_label, {**kept, "batch_size": len(seeds), **given})


def checked_request(
    caller: str,
    model: Model,
    interface: Interface,
    shape: tuple[int, ...],
    num_samples: int,
    options: Mapping[str, Any],
    *,
    struct: type = DrawOptions,
    in_turn: bool = False,
) -> Request:
    """Check the arguments of a call that draws images, and resolve seeds and labels.

    Args:
        caller: Name of the calling function for error messages.
        model: The model.
        interface: Its interface.
        shape: (C, H, W) of an image.
        num_samples: Number of images.
        options: Options of `struct`.
        struct: The options that the function has.
        in_turn: Without labels and a condition, draw the classes in turn.
    """
    check_int(caller, "num_samples", num_samples, 1, 1 << 32)
    given = checked_options("", DrawOptions, {}) | checked_options(caller, struct, options)
    seeds, class_labels = resolve_seeds(caller, given.pop("seed"), num_samples), given.pop("class_labels")
    in_turn = in_turn and given["condition"] is None
    labels = resolve_labels(caller, model, interface, class_labels, num_samples, in_turn=in_turn)
    if given["x_T"] is not None:
        _check_maps(caller, "x_T", given["x_T"], [num_samples, *shape])
    check_condition(caller, interface, shape, num_samples, given["condition"])
    check_callable(caller, "callback", given["callback"])
    given["batch_size"] = given["batch_size"] or num_samples
    if not _is_guided(caller, given["guidance_scale"], labels, interface):
        given["guidance_scale"] = None
    return Request(num_samples, seeds, labels, None if labels is None else interface.no_label or 0, given)


def _check_maps(caller: str, name: str, x: Any, wanted: list[int]) -> None:
    """Raise unless x is a floating tensor of the wanted shape, finite if it is on a CPU."""
    if not isinstance(x, Tensor):
        raise InvalidType(caller, name, "to be a tensor or None", type(x).__name__)
    check_values(caller, name, x)
    fits = x.dtype in FLOATS and list(x.shape) == wanted
    expect(fits, caller, name, f"to be floating {wanted}", f"{x.dtype} {list(x.shape)}")
    if x.device.type == "cpu" and not x.isfinite().all():  # a GPU would have to be waited for
        raise InvalidValue(caller, name, "to be finite", "NaN or infinity")


def check_condition(caller: str, interface: Interface, shape: tuple[int, ...], num_samples: int, condition: Any) -> None:
    """Raise unless the condition is as the model reads it. A model without a configuration reads any number of channels."""
    free = interface.condition_channels
    size = ", ".join(map(str, shape[1:]))
    if condition is None:
        wanted = f"to be [{num_samples}, {free}, {size}], as the model reads {free} channels after x_t"
        expect(not free, caller, "condition", wanted, "None")
        return
    expect(free != 0, caller, "condition", "to be None, as the model reads x_t alone", "a condition")
    readable = isinstance(condition, Tensor) and not condition.is_nested and condition.dim() == len(shape) + 1
    found = condition.shape[1] if readable else 0
    _check_maps(caller, "condition", condition, [num_samples, max(found, 1) if free is None else free, *shape[1:]])


def _is_guided(caller: str, guidance_scale: float | None, labels: Tensor | None, interface: Interface) -> bool:
    """Return whether guidance takes a second prediction."""
    if guidance_scale is None or guidance_scale == 1:
        return False
    unlabelled = labels is None or bool(labels.eq(-1 if interface.no_label is None else interface.no_label).all())
    if unlabelled or interface.no_label is None:
        reason = "there are no class_labels" if unlabelled else _UNKNOWN
        raise InvalidValue(caller, "guidance_scale", f"to be None or 1, as {reason}", guidance_scale)
    return True
