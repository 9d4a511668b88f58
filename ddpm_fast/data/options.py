"""The options of a data set. Nothing here needs PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from ..forms import Bytes, Pairs, Ranges, Size
from ..options import Option, Options, PathLike, documented

_data = partial(Option, "Data")


@documented
@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """Images to read, for training and evaluation."""

    data: Annotated[
        PathLike,
        _data(
            "Train on digits, fashion-mnist, cifar10, a folder (its sub-folders are classes), a .zip, .npy or .npz.",
            changeable=True,  # the images themselves are compared
            local=True,
        ),
    ] = "digits"
    data_dir: Annotated[
        PathLike | None,
        _data(
            "Read the data set from this folder, or download it there. Default: a folder in the user's cache.",
            changeable=True,
            local=True,
        ),
    ] = None
    image_size: Annotated[
        int | tuple[int, int] | None,
        _data(
            "Crop and resize images to this width x height, such as 64 or 48x32. Required unless all have one size.",
            low=1,
            high=1 << 16,
            form=Size,
        ),
    ] = None
    colors: Annotated[
        Literal["grey", "rgb", "rgba"] | None,
        _data("Train on images in these colours. Default: grey if all files are, else rgb."),
    ] = None
    data_range: Annotated[
        Pairs | None,
        _data(
            "Map these values of .npy and .npz files to -1 and 1: one pair, or one per channel. Default: each channel's range.",
            form=Ranges,
        ),
    ] = None
    condition: Annotated[
        PathLike | None,
        _data(
            "Give the network low-resolution:4, grey or mask images to restore, or those of a folder with the same file names.",
            changeable=True,  # the images themselves are compared, and the network's configuration names a degradation
            local=True,
        ),
    ] = None
    condition_range: Annotated[
        Pairs | None,
        _data("Map these values of .npy and .npz conditions to -1 and 1, as --data-range does.", form=Ranges),
    ] = None
    data_memory: Annotated[
        int | str,
        _data(
            "Decode images batch by batch if all take more than this many bytes, such as 200MiB or 2GiB.",
            changeable=True,
            form=Bytes,
        ),
    ] = "2GiB"
    skip_broken: Annotated[
        bool, _data("Leave out images of a folder that cannot be read, and say how many and which.", changeable=True)
    ] = False
