"""`ddpm-fast evaluate fid`."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ..errors import ArgumentError, expect, renaming
from .console import Command
from .options import PathOption, Running, json_option, model_options
from .outputs import check_output, write
from .sample import write_each

if TYPE_CHECKING:
    from ..data.items import ItemDataset

_LEAST: Final = 2  # images, as one has no covariance
_USUAL: Final = 50_000  # images of a published FID
_APART: Final = timedelta(hours=24)  # between the ends of the first process and the last
_MEMORY: Final = 1 << 30  # bytes of decoded images


@click.command("fid", cls=Command)
@click.argument("reference", type=PathOption(exists=True))
@click.argument("images", type=PathOption())
@click.option(
    *("--num", "--num-samples", "num_samples"),  # torchrun parses --num as one of its own options
    type=click.IntRange(1),
    help="Compare this many images, from the first.  [default: all, or 50000 that --model draws]",
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
    *,
    reference: str,
    images: str,
    num_samples: int | None,
    inception: str | None,
    json: Path | None,
    running: Running,
) -> None:
    """Compute FID, KID and the Inception Score of images.

    REFERENCE and IMAGES are folders or .npz files of images. With --model, IMAGES are drawn first. torchrun can start several
    processes, and needs --num-samples for --num.
    """
    from ..checks import computing_device
    from ..data.items import read_batch
    from ..distributed import joined, own_device
    from ..evaluation.inception import FEATURES, STANDARD, inception_scores, load_inception
    from ..files.writing import write_json

    num = num_samples
    if json is not None:
        check_output("json", json)
    known = _pictures("reference", reference)
    given = _pictures("images", images, num) if running.model is None else None
    device, drawn = own_device(computing_device(running.device)), dict[str, Any]()
    with joined(_APART) as processes:
        network, digest = processes.machine_by_machine(lambda: load_inception(inception, device))
        if running.model is not None:
            drawn = _draw(running, images, num, known)
        compared = given or _pictures("images", images, num)
        size, wanted = compared.info.shape[1:], known.info.shape[1:]
        expect(size == wanted, "images", f"to have {list(wanted)} pixels as REFERENCE", list(size))
        found = inception_scores(
            network,
            lambda part: read_batch(compared, part).images,
            lambda part: read_batch(known, part).images,
            (len(compared), len(known)),
            processes,
            batch_size=running.batch_size,
            device=device,
            progress=not running.quiet,
        )
        if not processes.is_first:
            return
    record = {
        "images": images,
        "num": len(compared),
        "reference": reference,
        "reference_num": len(known),
        "size": [*size],
        "resizing": "299x299 by torch-fidelity",
        "inception": digest,
        **drawn,
    }
    if not running.quiet:
        enough = min(len(compared), len(known)) > FEATURES  # then the covariance can have full rank
        kinds = {
            "FID" if digest.startswith(STANDARD) and enough else "Frechet distance": ("frechet_distance", ".4f"),
            "KID": ("kernel_inception_distance_mean", ".6f"),
            "Inception Score": ("inception_score_mean", ".3f"),
        }
        numbers = ", ".join(f"{name} {found[key]:{digits}}" for name, (key, digits) in kinds.items() if key in found)
        about = f"{size[1]}x{size[0]} resized to {record['resizing']}, weights {digest[:8]}"
        said = f"; {drawn['drawn_by']}" if drawn else ""
        click.echo(f"{numbers}: {len(compared)} images of {images} and {len(known)} of {reference}; {about}{said}")
        if not enough:
            click.echo(
                f"FID needs {FEATURES + 1} images in each set, because the covariance of {FEATURES} features needs as many. "
                "Compare this Frechet distance with those of as many images only, or compare KID."
            )
    if json is not None:
        write(json, lambda path: write_json(path, record | found))


def _draw(running: Running, place: str, num: int | None, reference: ItemDataset) -> dict[str, Any]:
    """Draw a model's images, and return what drew them, for the JSON file. Raise first if they could not be compared."""
    loaded, num = running.load(), _USUAL if num is None else num
    interface = loaded.interface
    shape, ranges = interface.shape, loaded.model.config.get("data_range")
    pictures = shape is not None and shape[0] in (1, 3) and not interface.condition.channels and ranges is None
    wanted, got = "to draw pictures of a size, grey or in RGB, without a condition", f"shape {shape}, range {ranges}"
    expect(pictures, "model", wanted, got)
    size = reference.info.shape[1:]
    expect(shape and size == shape[1:], "model", f"to draw {size} pixels as REFERENCE has", shape)
    plan, name = loaded.build_plan()
    sampler = loaded.sampler(plan, dtype=running.torch_dtype)
    with renaming({"out": "images"}):
        write_each(sampler, num, place, running.drawing(), share_gpu=running.device is not None)
    by = f"{running.model}, {plan.num_steps} steps ({name}), seed {running.seed}"
    return {**running.record(loaded), "drawn_by": by}


def _pictures(name: str, path: str, num: int | None = None) -> ItemDataset:
    """Return pictures as a data set. Raise unless they are enough, of one size, grey or in RGB."""
    from ..data.load import load_dataset
    from ..data.options import DataOptions

    expect(os.path.exists(path), name, "to be a folder or an .npz of images", f"{path!r}, which does not exist")
    try:
        dataset = load_dataset(DataOptions(data=path, data_memory=_MEMORY), first=num)
    except ArgumentError as error:
        wanted = "to have images of one size" if error.name == "image_size" else error.expected
        raise error.renamed(name=name, expected=wanted, got=error.got.partition(";")[0]) from None
    least = max(_LEAST, num or 0)
    expect(len(dataset) >= least, name, f"to have {least} images or more", len(dataset))
    info = dataset.info
    pictures, got = info.data_range is None and info.shape[0] in (1, 3), f"{info.shape[0]} channels of {info.dtype}"
    expect(pictures, name, "to be pictures of 256 levels, grey or in RGB", got)
    return dataset
