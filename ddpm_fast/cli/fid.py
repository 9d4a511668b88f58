"""`ddpm-fast evaluate fid`."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ..errors import ArgumentError, expect, renaming
from .console import Command
from .options import PathOption, drawing, dtype_of, json_option, load_model, model_options
from .outputs import check_output, write
from .sample import write_each

if TYPE_CHECKING:
    from ..data.items import ItemDataset
    from ..evaluation import Moments
    from ..pretrained import Pretrained

_LEAST: Final = 2  # images, as one has no covariance
_USUAL: Final = 50_000  # images of a published FID
_APART: Final = timedelta(hours=24)  # between the ends of the first process and the last
_MEMORY: Final = 1 << 30  # bytes of decoded images


@click.command("fid", cls=Command)
@click.argument("reference", type=PathOption(exists=True))
@click.argument("images", type=PathOption())
@click.option(
    *("--num", "--num-samples", "num"),  # torchrun parses --num as one of its own options
    type=click.IntRange(1),
    help="Compare this many images, from the first.  [default: all, or 50000 that --model draws]",
)
@click.option(
    "--features",
    type=PathOption(file_okay=False, path_type=Path),
    default="features",
    show_default=True,
    help="Keep the features in this folder, so that the same command goes on if it was stopped.",
)
@click.option(
    "--inception",
    type=PathOption(exists=True, dir_okay=False),
    help="Read Inception's weights from this file.  [default: those of torch-fidelity, downloaded]",
)
@json_option
@click.option(
    "--model",
    type=PathOption(path_type=Path),
    help="Draw IMAGES first, from this model: its folder, a training run, or a name on the Hugging Face hub.  [default: none]",
)
@model_options(dtype="float32", named=False)
def fid_command(
    reference: str,
    images: str,
    num: int | None,
    features: Path,
    inception: str | None,
    json: Path | None,
    **options: Any,
) -> None:
    """Compute FID, KID and the Inception Score of images.

    REFERENCE is a folder or an .npz of images, or an .npz with mu and sigma. IMAGES is a folder or an .npz of images. With
    --model, they are drawn there first. torchrun can start several processes, and needs --num-samples for --num.
    """
    from ..checks import computing_device
    from ..data.items import read_batch
    from ..distributed import joined, own_device
    from ..evaluation.inception import FEATURES, load_inception, scores, write_features
    from ..files.writing import write_json

    shown = not options["quiet"]
    if json is not None:
        check_output("fid", "json", json)
    moments = _moments(reference)
    known = _pictures("reference", reference) if moments is None else None
    given = _pictures("images", images, num) if options["model"] is None else None
    check_output("fid", "features", features / "1.safetensors")
    device, drawn_by = own_device(computing_device("fid", options["device"])), None
    with joined("fid", _APART) as processes:
        network = processes.machine_by_machine(lambda: load_inception("fid", inception, device))
        if options["model"] is not None:
            drawn_by = _draw(load_model("fid", options), images, num, known, options)
        sets = [given or _pictures("images", images, num), *filter(None, [known])]
        sizes = [each.info.shape[1:] for each in sets]
        expect(sizes[0] == sizes[-1], "fid", "images", f"to have {list(sizes[-1])} pixels as REFERENCE", list(sizes[0]))
        features.mkdir(parents=True, exist_ok=True)
        files = [
            write_features(
                network,
                features,
                len(each),
                partial(lambda images, part: read_batch(images, part).images, each),
                processes,
                progress=shown,
            )
            for each in sets
        ]
        if not processes.is_first:
            return
    found = scores(files[0], files[1] if moments is None else moments)
    height, width = sizes[0]
    record = {
        "images": images,
        "num": len(sets[0]),
        "reference": reference,
        "reference_num": None if known is None else len(known),
        "size": [height, width],
        "resizing": "299x299 by torch-fidelity",
        "inception": network.digest,
        "dtype": None if drawn_by is None else options["dtype"],
        "drawn_by": drawn_by,
    }
    if shown:
        enough = min(map(len, sets)) > FEATURES  # then the covariance can have full rank
        kinds = {
            "FID" if network.is_standard and enough else "Frechet distance": ("frechet_distance", ".4f"),
            "KID": ("kernel_inception_distance_mean", ".6f"),
            "Inception Score": ("inception_score_mean", ".3f"),
        }
        numbers = ", ".join(f"{name} {found[key]:{digits}}" for name, (key, digits) in kinds.items() if key in found)
        against = f"the moments in {reference}" if known is None else f"{len(known)} of {reference}"
        about = f"{width}x{height} resized to {record['resizing']}, weights {network.digest[:8]}"
        said = "" if drawn_by is None else f"; {drawn_by}"
        click.echo(f"{numbers}: {len(sets[0])} images of {images} and {against}; {about}{said}")
        if not enough:
            click.echo(
                f"FID needs {FEATURES + 1} images in each set, because the covariance of {FEATURES} features needs as many. "
                "Compare this Frechet distance with those of as many images only, or compare KID."
            )
        if known is None:
            click.echo(
                "Do not compare with distances to the statistics of EDM or guided-diffusion: they are of another extractor."
            )
    if json is not None:
        write(json, lambda path: write_json(path, record | found))


def _draw(loaded: Pretrained, place: str, num: int | None, reference: ItemDataset | None, options: dict[str, Any]) -> str:
    """Draw a model's images, and return how. Raise before, unless they can be compared."""
    interface, num = loaded.interface, _USUAL if num is None else num
    shape, ranges = interface.shape, loaded.model.config.get("data_range")
    pictures = shape is not None and shape[0] in (1, 3) and not interface.condition.channels and ranges is None
    wanted, got = "to draw pictures of a size, grey or in RGB, without a condition", f"shape {shape}, range {ranges}"
    expect(pictures, "fid", "model", wanted, got)
    size = None if reference is None else reference.info.shape[1:]
    expect(shape and size in (None, shape[1:]), "fid", "model", f"to draw {size} pixels as REFERENCE has", shape)
    plan, sampler = loaded.build_plan()
    with renaming("fid", {"out": "images"}):
        arguments = drawing(options) | {"share_gpu": options["device"] is not None}
        write_each(loaded.sampler(plan, dtype=dtype_of(options)), num, place, arguments)
    return f"{options['model']}, {plan.num_steps} steps ({sampler}), seed {options['seed']}"


def _moments(path: str) -> Moments | None:
    """Return the moments in an .npz with mu and sigma. None for anything else, such as an .npz with images, too."""
    import numpy as np
    import torch

    from ..data.arrays import loaded_arrays
    from ..evaluation import Moments
    from ..evaluation.inception import FEATURES

    names: set[str] = set()
    with suppress(Exception), np.load(path) as opened:  # what is damaged is refused as images
        names = set(opened.files)
    if "arr_0" in names or not {"mu", "sigma"} <= names:
        return None
    arrays = loaded_arrays(path)
    mean, cov = arrays["mu"], arrays["sigma"]
    fits = mean.shape == (FEATURES,) and cov.shape == (FEATURES, FEATURES) and mean.dtype.kind == cov.dtype.kind == "f"
    fits = fits and bool(np.isfinite(mean).all() and np.isfinite(cov).all())
    wanted = f"to have finite floats mu [{FEATURES}] and sigma [{FEATURES}, {FEATURES}]"
    expect(fits, "fid", "reference", wanted, f"{mean.dtype} {list(mean.shape)} and {cov.dtype} {list(cov.shape)}")
    return Moments(*(torch.from_numpy(each.astype(np.float64)) for each in (mean, cov)))


def _pictures(name: str, path: str, num: int | None = None) -> ItemDataset:
    """Return pictures as a data set. Raise unless they are enough, of one size, grey or in RGB."""
    from ..data.load import load_dataset
    from ..data.options import DataOptions

    expect(os.path.exists(path), "fid", name, "to be a folder or an .npz of images", f"{path!r}, which does not exist")
    try:
        dataset = load_dataset(DataOptions(data=path, data_memory=_MEMORY), first=num)
    except ArgumentError as error:
        wanted = "to have images of one size" if error.name == "image_size" else error.expected
        raise error.renamed(caller="fid", name=name, expected=wanted, got=error.got.partition(";")[0]) from None
    least = max(_LEAST, num or 0)
    expect(len(dataset) >= least, "fid", name, f"to have {least} images or more", len(dataset))
    info = dataset.info
    pictures, got = info.data_range is None and info.shape[0] in (1, 3), f"{info.shape[0]} channels of {info.dtype}"
    expect(pictures, "fid", name, "to be pictures of 256 levels, grey or in RGB", got)
    return dataset
