"""Checked arguments of calls that draw or evaluate images."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..checks import check_callable, check_finite_maps, check_int, checked_seeds, computing_device
from ..distributed import own_device
from ..errors import InvalidType, InvalidValue, expect
from ..inference.model import Model, device_and_dtype
from ..interface import Interface
from ..ops import sample_seeds
from ..options import checked_options
from .options import ClassLabels, DrawOptions

_DRAWING: Final = {  # objects that hold a network, by the library and the class
    ("denoising_diffusion_pytorch", "GaussianDiffusion"): "pass x.model, and plan_of(x) as the plan",
    ("diffusers", "DiffusionPipeline"): "pass x.unet, and plan_of(x.scheduler) as the plan",
    ("ddpm_fast", "Pretrained"): "pass x.model, or call x.sampler()",
    ("ddpm_fast", "Sampler"): "pass x.network, or call x itself",
}


def check_model(model: Model) -> None:
    """Raise a TypeError unless `model` may be called as model(x_t, t). Classes and pipelines take other arguments."""
    for kind in type(model).__mro__:
        if advice := _DRAWING.get((kind.__module__.partition(".")[0], kind.__name__)):
            raise InvalidType("model", "to be a network, called as model(x_t, t)", f"a {type(model).__name__} x: {advice}")
    if not callable(model) or isinstance(model, type):
        got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise InvalidType("model", "to be an nn.Module or another callable object", got)


def sampling_device(model: Model, device: torch.device | str | None) -> torch.device:
    """Return the device to run on, with its index.

    None and "cuda" are the GPU that holds the model, if any, but a module on the first GPU goes to that of the local rank.
    """
    model_device, _ = device_and_dtype(model)
    unnumbered = torch.device(model_device.type)
    expect(model_device.type != "meta", "model", "to have weights", "some on the meta device")
    asked = unnumbered if device is None else computing_device(device)
    on_first = model_device.type == "cuda" and not model_device.index and isinstance(model, nn.Module)
    if asked == unnumbered and not on_first:
        return model_device
    own = own_device(asked)
    if own == unnumbered:
        return model_device
    return torch.empty(0, device=own).device if own.index is None else own


def resolve_seeds(seed: int | Tensor, num_samples: int) -> Tensor:
    """Return the seeds of the samples, int64 [num_samples].

    Args:
        seed: An int, or int64 [num_samples].
        num_samples: Number of samples.

    Raises:
        ValueError: `seed` has another shape or is out of range.
        TypeError: `seed` is neither an int nor an int64 tensor.
    """
    if isinstance(seed, int):
        return sample_seeds(seed, num_samples)
    if not isinstance(seed, Tensor):
        raise InvalidType("seed", f"to be an int or int64 [{num_samples}]", type(seed).__name__)
    return checked_seeds(seed, num_samples, torch.device("cpu") if seed.is_meta else seed.device, name="seed")


def resolve_labels(
    model: Model, interface: Interface, class_labels: ClassLabels, num_samples: int, *, in_turn: bool = False
) -> Tensor | None:
    """Return the label of each sample, or None for a model without labels. See `Labels.parse`."""
    if class_labels is not None:
        check_takes_labels(model, "class_labels", class_labels)
    return interface.labels.parse(class_labels, num_samples, in_turn=in_turn)


def check_takes_labels(model: Model, name: str, value: object) -> None:
    """Raise a ValueError if the model's call has no third argument. `value` is an argument that needs one."""
    try:
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except (TypeError, ValueError):  # a call without a signature
        return
    try:
        signature.bind(None, None, None)
    except TypeError:
        raise InvalidValue(name, "to be None, as the model takes x_t and t alone", repr(value)) from None


@dataclass(frozen=True)
class Request:
    """Checked arguments of a call that draws images.

    Attributes:
        num_samples: Number of images.
        seeds: int64 [num_samples].
        labels: Labels [num_samples, ...], or None for a network without.
        no_label: Label of the half of guidance without classes, [1, ...]. None: the network gets no labels.
        given: The other options, see `DrawOptions`. `batch_size` is a number, and `guidance_scale` None without a second
            prediction.
    """

    num_samples: int
    seeds: Tensor
    labels: Tensor | None
    no_label: Tensor | None
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
        model: The model.
        interface: Its interface.
        shape: (C, H, W) of an image.
        num_samples: Number of images.
        options: Options of `struct`.
        struct: The options that the function has.
        in_turn: Without labels and a condition, draw the classes in turn.
    """
    check_int("num_samples", num_samples, 1, 1 << 32)
    given = checked_options(DrawOptions, {}) | checked_options(struct, options)
    seeds, class_labels = resolve_seeds(given.pop("seed"), num_samples), given.pop("class_labels")
    in_turn = in_turn and given["condition"] is None
    labels = resolve_labels(model, interface, class_labels, num_samples, in_turn=in_turn)
    if given["x_T"] is not None:
        check_finite_maps("x_T", given["x_T"], [num_samples, *shape])
    interface.condition.check(given["condition"], num_samples, shape)
    check_callable("callback", given["callback"])
    given["batch_size"] = given["batch_size"] or num_samples
    if not interface.labels.guides(given["guidance_scale"], labels):
        given["guidance_scale"] = None
    return Request(num_samples, seeds, labels, None if labels is None else interface.labels.blank(1), given)
