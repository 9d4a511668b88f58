"""`ddpm-fast evaluate --fid`."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ..errors import expect
from .options import drawing, load_model
from .outputs import try_writing, write
from .sample import write_each

if TYPE_CHECKING:
    from ..evaluation import Moments
    from ..training.data import ItemDataset

_LEAST: Final = 2049  # images: a covariance of 2048 features has full rank from here on
_USUAL: Final = 50_000  # images of a published FID
_APART: Final = timedelta(hours=24)  # between the ends of the first process and the last


def compare(
    reference: str,
    images: str | None,
    num: int | None,
    features: Path,
    inception: str | None,
    json: Path | None,
    **options: Any,
) -> None:
    """Print FID, KID and the Inception Score of images, or of a model's after drawing them."""
    import torch

    from ..checks import computing_device
    from ..distributed import joined, own_device
    from ..evaluation import Moments
    from ..evaluation.inception import load_inception, scores, write_features
    from ..files.writing import write_json

    model, said = options["model"], ""
    wanted = "to be given with --fid: a folder or an .npz of images, or where --model draws them"
    expect(images is not None, "evaluate", "images", wanted, "none")
    known = _reference(reference)
    device = own_device(computing_device("evaluate", options["device"]))
    network = load_inception("evaluate", inception, device)
    try_writing("evaluate", "features", features / "1.safetensors")
    if json is not None:
        try_writing("evaluate", "json", json)
    if model is not None:
        loaded = load_model("evaluate", options)
        plan, sampler = loaded.build_plan()
        shape = loaded.interface.shape or (0, 0, 0)
        _check_size("model", shape, known)
        num = _USUAL if num is None else num
        expect(num >= _LEAST, "evaluate", "num", f"to be at least {_LEAST} for --fid", num)
        arguments = drawing(options) | {"share_gpu": options["device"] is not None}
        write_each(loaded.sampler(plan), num, str(images), arguments)
        said = f"; {model}, {plan.num_steps} steps ({sampler}), seed {options['seed']}"
    drawn = _pictures("images", str(images), num)
    _check_size("images", drawn.info.shape, known)
    features.mkdir(parents=True, exist_ok=True)
    with joined("evaluate", _APART) as processes:

        def files_of(dataset: ItemDataset) -> list[Path]:
            from ..training.data import read_batch

            def read(part: range) -> torch.Tensor:
                return read_batch(dataset, part).images

            return write_features(network, features, len(dataset), read, processes, progress=not options["quiet"])

        files = files_of(drawn), known if isinstance(known, Moments) else files_of(known)
        if not processes.is_first:
            return
    found = scores(*files)
    kind = "FID" if network.is_standard else "Frechet distance"
    numbers = [f"{kind} {found['frechet_distance']:.4f}"]
    for short, key, digits in (("KID", "kernel_inception_distance", 6), ("Inception Score", "inception_score", 3)):
        if f"{key}_mean" in found:
            numbers.append(f"{short} {found[f'{key}_mean']:.{digits}f} ± {found[f'{key}_std']:.{digits}f}")
    height, width = drawn.info.shape[1:]
    against = f"the moments in {reference}" if isinstance(known, Moments) else f"{len(known)} of {reference}"
    record = {
        "images": str(images),
        "num": len(drawn),
        "reference": reference,
        "reference_num": None if isinstance(known, Moments) else len(known),
        "size": [height, width],
        "resizing": "299x299, by torch-fidelity",
        "inception": network.digest,
        "drawn_by": said.removeprefix("; ") or None,
    }
    if not options["quiet"]:
        about = f"{width}x{height} resized to 299x299 by torch-fidelity, weights {network.digest[:8]}{said}"
        click.echo(f"{', '.join(numbers)}: {len(drawn)} images of {images} and {against}; {about}")
        if isinstance(known, Moments):
            click.echo("Moments of another extractor give another distance: those of EDM and guided-diffusion are such.")
    if json is not None:
        write(json, lambda path: write_json(path, record | found))


def _reference(path: str) -> Moments | ItemDataset:
    """Return the moments in an .npz with mu and sigma, or images."""
    import torch

    from ..evaluation import Moments
    from ..evaluation.inception import FEATURES
    from ..training.data.arrays import loaded_arrays

    if path.lower().endswith(".npz"):
        arrays = loaded_arrays(path)
        if {"mu", "sigma"} <= arrays.keys():
            mean, cov = (torch.from_numpy(arrays[name]).double() for name in ("mu", "sigma"))
            fits = mean.shape == (FEATURES,) and cov.shape == (FEATURES, FEATURES)
            wanted = f"to have mu [{FEATURES}] and sigma [{FEATURES}, {FEATURES}]"
            expect(fits, "evaluate", "fid", wanted, f"{list(mean.shape)} and {list(cov.shape)}")
            return Moments(mean, cov)
    return _pictures("fid", path, None)


def _pictures(name: str, path: str, num: int | None) -> ItemDataset:
    """Return pictures as a data set. Raise unless they are enough, of one size, grey or in RGB."""
    from ..training.data import load_dataset

    dataset = load_dataset(path, data_range=None, memory=0, first=num)
    expect(len(dataset) >= _LEAST, "evaluate", name, f"to have at least {_LEAST} images for FID", len(dataset))
    channels = dataset.info.shape[0]
    expect(channels in (1, 3), "evaluate", name, "to be grey or in RGB", f"{channels} channels")
    return dataset


def _check_size(name: str, shape: tuple[int, ...], reference: Moments | ItemDataset) -> None:
    """Raise unless images have the size of those of the reference."""
    from ..evaluation import Moments

    if not isinstance(reference, Moments):
        size, of_reference = shape[1:], reference.info.shape[1:]
        expect(size == of_reference, "evaluate", name, f"to have {list(of_reference)} pixels as the reference", list(size))
