"""The arguments of functions that draw images, each declared once. Nothing here needs PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, NewType, TypedDict

from ..options import Option, document

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = NewType("Tensor", object)

ClassLabels = int | str | Sequence[int | str] | Tensor | None
Callback = Callable[[int, int, Tensor], None]

_draw = partial(Option, "Drawing")


class BatchOptions(TypedDict, total=False):
    """The arguments of every function that runs a network on many images."""

    batch_size: Annotated[int | None, _draw("Run this many images at a time.", more="Default: all, or 64 to files.", low=1)]
    class_labels: Annotated[
        ClassLabels,
        _draw(
            "Give the network one class for all images, or one per image.",
            more="Numbers, or names in the model's `class_names`, or the text none for no class. Default: the classes in turn, "
            "and none for images or a condition that is given.",
        ),
    ]
    condition: Annotated[
        Tensor | None,
        _draw(
            "Give the network these images to read after x_t, such as images to enlarge or to colour.",
            more="Floating [num_samples, K, H, W], for a model of C + K input channels. Both halves of guidance read them.",
        ),
    ]
    progress: Annotated[bool, _draw("Show a progress bar.", default=True)]


class SeededOptions(BatchOptions, total=False):
    """The arguments of every function that draws noise for many images."""

    seed: Annotated[
        int | Tensor,
        _draw(
            "Seed all noise.",
            more="An int, or int64 [num_samples] with a seed per image: `sample_seeds(0, 16)[5:6]` is that of image 5.",
            default=0,
        ),
    ]


class EditOptions(SeededOptions, total=False):
    """The arguments of functions that draw from given images, or to files."""

    guidance_scale: Annotated[
        float | None,
        _draw(
            "Set the scale of classifier-free guidance; any but 1 doubles the cost. Default: 1.",
            low=-1e4,  # beyond, differences of predictions leave the range of float32 within a few steps
            high=1e4,
            more="The prediction is m = m_u + w (m_c - m_u) with scale w, and m_u is that for no class.",
        ),
    ]


class DrawOptions(EditOptions, total=False):
    """The arguments of `sample`, of a `Sampler` and of `Sampler.trajectory`."""

    x_T: Annotated[
        Tensor | None,
        _draw("Start from these states.", more="Floating [num_samples, C, H, W]. Default: drawn from N(0, I) by the seed."),
    ]
    callback: Annotated[
        Callback | None,
        _draw(
            "Call callback(step, timestep, x_t) after each step of each batch.",
            more="They are the number of the step from 0, its timestep, and the state [n, C, H, W] after it, which may be "
            "channels_last. The call is in inference mode. Clone the state to keep it. A change of its values in place takes "
            "effect. Another shape, dtype, strides or memory is an error. An exception ends the sampling.",
        ),
    ]


for _struct in (BatchOptions, SeededOptions, EditOptions, DrawOptions):
    document(_struct)
