"""Editing of images by a `Sampler`: variations, interpolation, inversion and inpainting."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, Final, Unpack

import torch
from torch import Tensor

from ..checks import check_float, check_strided
from ..data.items import to_unit_range
from ..data.load import read_image
from ..dtypes import FLOATS, opmath
from ..errors import InvalidType, InvalidValue, expect
from ..ops import initial_noise, noise
from ..options import checked, taking, within
from ..plan import SamplingPlan
from ..reference import STREAM_KNOWN
from .arguments import Request
from .options import BatchOptions, Callback, EditOptions
from .sampler import Sampler

_MOST_WEIGHTS: Final = 1 << 16
_Strength = Annotated[float, within(0, 1)]
_LARGEST: Final = 2.0  # resampling overshoots a little; images in 0..255 are a mistake


@checked()
@taking(EditOptions)
def vary(sampler: Sampler, images: Tensor, strength: _Strength = 0.5, **options: Unpack[EditOptions]) -> Tensor:
    """Draw variations of images: add noise, and take it away again (SDEdit, Meng et al. 2022, section 3).

    The images get the noise of a level of the plan (derivation eq. 3), and the plan runs from there. Of its S levels the
    last round(strength S) run, and at least one.

    Args:
        sampler: A Sampler. Plans with noise give other images for other seeds.
        images: Floating [N, C, H, W] in [-1, 1], of the sampler's shape.
        strength: 0 returns the images themselves, 1 keeps little of them.
        **options: See `EditOptions`. Image i uses the noise of image i of `Sampler`.

    Returns:
        The variations, as a `Sampler` returns images.

    Raises:
        ValueError: An argument is out of range or does not fit the sampler, checked before any computation.
        TypeError: An argument has an unsupported type, or is unknown.
    """
    return _denoised(sampler, images, strength, _request(sampler, "images", images, options))


@checked()
@taking(EditOptions)
def interpolate(
    sampler: Sampler,
    a: Tensor,
    b: Tensor,
    num: Annotated[int, within(2, _MOST_WEIGHTS)] = 8,
    *,
    strength: _Strength = 0.5,
    **options: Unpack[EditOptions],
) -> Tensor:
    """Interpolate between pairs of images through noise (Ho et al. 2020, section 4.4 and figure 8).

    Both images are noised with the same noise, mixed at that level, and denoised with the same noise. Weight 0 gives a
    variation of `a`, and weight 1 one of `b`.

    Args:
        sampler: A Sampler.
        a: Floating [N, C, H, W] in [-1, 1], of the sampler's shape.
        b: Images like `a`.
        num: The number of images for each pair, 2..65536, with weights evenly spaced in 0..1.
        strength: See `vary`. Small values blend pixels, large ones change what is shown.
        **options: See `EditOptions`, for each pair. Pair i uses the noise of image i of `Sampler`.

    Returns:
        float32 (float64 for a float64 network) [N, num, C, H, W] on the device.

    Raises:
        ValueError: An argument is out of range or does not fit the sampler, checked before any computation.
        TypeError: An argument has an unsupported type, or is unknown.
    """
    pairs = _request(sampler, "a", a, options)
    _check_images("b", b, sampler)
    expect(a.shape == b.shape, "b", f"to have the shape of a, {list(a.shape)}", list(b.shape))
    condition = pairs.given["condition"]
    request = replace(
        pairs,
        num_samples=num * len(a),
        seeds=pairs.seeds.repeat_interleave(num),
        labels=None if pairs.labels is None else pairs.labels.repeat_interleave(num),
        given={
            **pairs.given,
            "batch_size": options.get("batch_size") or num * len(a),
            "condition": None if condition is None else condition.repeat_interleave(num, dim=0),
        },
    )
    weights = torch.linspace(0, 1, num, device=a.device)[None, :, None, None, None]
    wide = torch.promote_types(a.dtype, torch.float32)
    mixed = torch.lerp(a[:, None].to(wide), b[:, None].to(a.device, wide), weights.to(wide)).flatten(0, 1)
    return _denoised(sampler, mixed, strength, request).reshape(len(a), num, *sampler.shape)


@checked()
@taking(BatchOptions)
def invert(sampler: Sampler, images: Tensor, **options: Unpack[BatchOptions]) -> Tensor:
    """Find the x_T from which DDIM draws images (Song et al. 2021, section 4.3).

        inverse = Sampler(model, ddim_inversion_plan(schedule, 50, evaluate_at="arrival", clip=None))
        x_T = invert(inverse, images)
        again = inverse.with_plan(ddim_plan(schedule, 50, clip=None))(len(images), x_T=x_T, class_labels="none")

    Both plans are exact inverses in the limit of many steps, but only without a clip.

    Args:
        sampler: A Sampler with a plan of `ddim_inversion_plan`.
        images: Floating [N, C, H, W] in [-1, 1], of the sampler's shape.
        **options: See `BatchOptions`. Use the same labels and condition on the way back.

    Returns:
        x_T, as a `Sampler` returns images.

    Raises:
        ValueError: An argument is out of range or does not fit the sampler, checked before any computation.
        TypeError: An argument has an unsupported type, or is unknown.
    """
    request = _request(sampler, "images", images, options, BatchOptions, denoises=False)
    plan = sampler.plan
    abar = float(plan.schedule.alpha_bars[plan.timesteps[-1]])
    if plan.is_random or _denoises(plan) or float(plan.alpha_bars_prev[-1]) > abar * (1 + 1e-9):
        raise InvalidValue("sampler", "to have a plan from an image to noise (ddim_inversion_plan)", f"\n{plan}")
    x_T, _ = sampler.draw(request.changed(x_T=images.detach()))
    return x_T


@checked()
@taking(EditOptions)
def inpaint(sampler: Sampler, images: Tensor, mask: Tensor, **options: Unpack[EditOptions]) -> Tensor:
    """Paint a region of images and keep the rest (Lugmayr et al. 2022, algorithm 1).

    After each step, the known region is replaced by the images at the step's noise level, with noise that is drawn for that
    step. `repaint_plan` takes steps several times, so that both regions fit. Other plans are faster and fit less.

    Args:
        sampler: A Sampler with a plan of `repaint_plan`, `ddpm_plan`, `dpm_solver_plan`, ...
        images: Floating [N, C, H, W] in [-1, 1], of the sampler's shape. Masked pixels may have any finite value.
        mask: 1 or true is painted, 0 or false is kept, values between mix. Floating in 0..1 or bool, [N or 1, C or 1, H, W].
        **options: See `EditOptions`.

    Returns:
        The images, as a `Sampler` returns them. Pixels with mask 0 equal the given ones bit for bit.

    Raises:
        ValueError: An argument is out of range or does not fit the sampler, checked before any computation.
        TypeError: An argument has an unsupported type, or is unknown.
    """
    request = _request(sampler, "images", images, options, in_range=False)
    _check_mask(mask, images)
    known = images.detach().to(sampler.device, opmath(sampler.dtype))
    painted = mask.detach().to(sampler.device, known.dtype).expand(len(images), -1, -1, -1)
    results = []
    for begin in range(0, len(images), request.given["batch_size"]):
        chunk = slice(begin, begin + request.given["batch_size"])
        keep = _keep_known(sampler.plan, known[chunk], painted[chunk], request.seeds[chunk].to(sampler.device))
        drawn, _ = sampler.draw(request.part(chunk, callback=keep))
        results.append(_blend(known[chunk], drawn, painted[chunk]))
    return torch.cat(results)


@checked()
def load_image(image: Any, sampler: Sampler) -> Tensor:
    """Read an image for `vary`, `interpolate`, `invert` or `inpaint`.

    The largest centred part with the proportions of the sampler's images is resized to theirs.

    Args:
        image: A path of a file that Pillow can read, or a `PIL.Image.Image`.
        sampler: A Sampler that draws grey, RGB or RGBA pictures.

    Returns:
        float32 [1, C, H, W] in [-1, 1] on the CPU.

    Raises:
        ValueError: The file is damaged or holds no image, or the sampler draws no pictures.
        OSError: The file cannot be opened.
        TypeError: An argument has an unsupported type.
    """
    shape = sampler.shape
    expect(len(shape) == 3 and shape[0] in (1, 3, 4), "sampler", "to draw pictures, grey, RGB or RGBA", shape)
    return to_unit_range(read_image(image, shape, name="image"))[None]


def _request(
    sampler: Sampler,
    name: str,
    images: Tensor,
    options: Any,
    struct: type = EditOptions,
    *,
    denoises: bool = True,
    in_range: bool = True,
) -> Request:
    """Check the sampler, the images and the options of a call. Return the request. Images without labels have no class.

    Args:
        sampler: The sampler.
        name: Name of the images for error messages.
        images: The images.
        options: Options of `struct`.
        struct: The options that the function has.
        denoises: The plan has to go from noise to an image.
        in_range: The images have to be about in [-1, 1].
    """
    _check_sampler(sampler, denoises=denoises)
    _check_images(name, images, sampler, in_range=in_range)
    return sampler.request(len(images), options, struct=struct, in_turn=False)


def _keep_known(plan: SamplingPlan, known: Tensor, painted: Tensor, seeds: Tensor) -> Callback:
    """Return a callback that replaces the known region after each step, at the noise level where the step arrives."""

    def keep(step: int, timestep: int, x_t: Tensor) -> None:
        abar = float(plan.alpha_bars_prev[step])
        z = noise(x_t.shape, seeds, stream=STREAM_KNOWN + step, dtype=x_t.dtype, device=x_t.device)
        x_t.copy_(_blend(math.sqrt(abar) * known + math.sqrt(1 - abar) * z, x_t, painted))

    return keep


def _blend(known: Tensor, drawn: Tensor, painted: Tensor) -> Tensor:
    """Mix `known` and `drawn` by the weights `painted`. Where the weight is 0, `known` stays, even next to NaN."""
    return torch.where(painted == 0, known, torch.lerp(known, drawn, painted))


def _denoised(sampler: Sampler, images: Tensor, strength: float, request: Request) -> Tensor:
    """Noise the images as far as `strength` says (derivation eq. 3), and run the plan from there."""
    x_0 = images.detach().to(sampler.device, opmath(sampler.dtype), copy=True)
    if strength == 0:
        return x_0
    plan = sampler.plan
    levels = plan.timesteps.unique_consecutive()  # Heun's method has two rows per level
    count = max(1, round(strength * len(levels)))  # no strength but 0 returns the images
    timestep = int(levels[-count])
    row = int((plan.timesteps == timestep).nonzero()[0])
    abar = float(plan.alpha_bars[row])
    z = initial_noise(x_0.shape, request.seeds.to(sampler.device), dtype=x_0.dtype, device=sampler.device)
    x_t = math.sqrt(abar) * x_0 + math.sqrt(1 - abar) * z
    drawn, _ = sampler.with_plan(plan.starting_at(timestep)).draw(request.changed(x_T=x_t))
    return drawn


def _check_sampler(sampler: Sampler, *, denoises: bool) -> None:
    """Raise unless this is a Sampler, and with `denoises` one whose plan goes from noise to an image."""
    expect(len(sampler.shape) == 3, "sampler", "to draw images (C, H, W)", sampler.shape)
    if denoises and not _denoises(sampler.plan):
        raise InvalidValue("sampler", "to have a plan from noise to an image", f"\n{sampler.plan}")


def _denoises(plan: SamplingPlan) -> bool:
    """Return whether the plan ends at an image, x_0 or the level of timestep 0, and not where an inversion begins.

    An inversion arrives at its timestep or above.
    """
    arrivals, abar = plan.alpha_bars_prev, plan.schedule.alpha_bars
    end, last, image = float(arrivals[-1]), float(abar[plan.timesteps[-1]]), float(abar[0])
    falls = end > last * (1 + 1e-9) or end > float(arrivals[0])
    return falls and end > image * (1 - 1e-9)


def _check_images(name: str, images: Tensor, sampler: Sampler, *, in_range: bool = True) -> None:
    """Raise unless these are finite images of the sampler's shape, about in [-1, 1]."""
    check_float(name, images)
    images = images.detach()
    if images.shape[1:] != sampler.shape or not len(images) or images.is_meta:
        shape = ", ".join(map(str, ["N", *sampler.shape]))
        raise InvalidValue(name, f"to be [{shape}] with values", f"{list(images.shape)} on {images.device}")
    expect(images.isfinite().all(), name, "to be finite", "NaN or infinity")
    if in_range and float(images.abs().max()) > _LARGEST:
        low, high = float(images.min()), float(images.max())
        raise InvalidValue(name, "to be in [-1, 1]", f"values from {low:.4g} to {high:.4g}")


def _check_mask(mask: Tensor, images: Tensor) -> None:
    """Raise unless the mask is bool or in 0..1, and of a shape that goes with the images."""
    check_strided("mask", mask)
    if mask.dtype not in (torch.bool, *FLOATS):
        raise InvalidType("mask", "to be bool or floating", mask.dtype)
    n, channels, height, width = images.shape
    fits = mask.dim() == 4 and mask.shape[0] in (1, n) and mask.shape[1] in (1, channels)
    if not fits or mask.shape[2:] != (height, width) or mask.is_meta:
        wanted = f"[{n} or 1, {channels} or 1, {height}, {width}] with values"
        raise InvalidValue("mask", f"to be {wanted}", f"{list(mask.shape)} on {mask.device}")
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise InvalidValue("mask", "to be in 0..1", f"values from {float(mask.min()):.4g} to {float(mask.max()):.4g}")
