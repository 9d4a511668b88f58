"""Editing of images by a model: variations, interpolation, inversion and inpainting. All run on `Sampler`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from ..checks import check_float, check_int, check_number, check_strided, check_type
from ..dtypes import opmath
from ..errors import InvalidType, InvalidValue, expect
from ..inference.model import Model, model_config
from ..ops import initial_noise, noise
from ..plan import SamplingPlan
from ..reference import STREAM_KNOWN
from ..resources import check_free_memory
from .arguments import Callback, ClassLabels, Request, check_model, checked_request, checked_setup, image_channels
from .sampler import Sampler

_MOST_WEIGHTS: Final = 1 << 16
_LARGEST: Final = 2.0  # resampling overshoots a little; images in 0..255 are a mistake


def vary(
    model: Model,
    plan: SamplingPlan,
    images: Tensor,
    strength: float = 0.5,
    *,
    seed: int | Tensor = 0,
    batch_size: int | None = None,
    class_labels: ClassLabels = None,
    guidance_scale: float | None = None,
    condition: Tensor | None = None,
    progress: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw variations of images: add noise, and take it away again (SDEdit, Meng et al. 2022, section 3).

    The images are noised to the level where the last round(strength S) of the plan's S levels begin, or the last one
    (derivation eq. 3). The plan runs from there.

    Args:
        model: See `Sampler`.
        plan: From `ddpm_plan`, `dpm_solver_plan`, .... Plans with noise give other images for other seeds.
        images: Floating [N, C, H, W] in [-1, 1], of the model's size.
        strength: 0 returns the images themselves, 1 keeps little of them.
        seed: See `sample`. Image i uses the noise of image i there.
        batch_size: See `sample`.
        class_labels: See `sample`.
        guidance_scale: See `sample`.
        condition: See `sample`.
        progress: See `sample`.
        dtype: See `Sampler`.
        device: See `Sampler`.

    Returns:
        The variations, as `sample` returns images.

    Raises:
        ValueError: An argument is out of range or does not fit the model. Checked before any computation.
        TypeError: An argument has an unsupported type.
    """
    caller = "vary"
    check_model(caller, model)
    _check_denoises(caller, plan)
    _check_images(caller, "images", images, model, plan)
    check_number(caller, "strength", strength, 0, 1)
    shape, device = checked_setup(caller, model, plan, dtype, device, images.shape[1:], None)
    request = checked_request(
        *(caller, model, device, shape, len(images)),
        seed=seed,
        batch_size=batch_size,
        class_labels=class_labels,
        guidance_scale=guidance_scale,
        condition=condition,
        progress=progress,
    )
    return _denoised(model, plan, images, strength, request, dtype, device)


def interpolate(
    model: Model,
    plan: SamplingPlan,
    a: Tensor,
    b: Tensor,
    num: int = 8,
    *,
    strength: float = 0.5,
    seed: int | Tensor = 0,
    batch_size: int | None = None,
    class_labels: ClassLabels = None,
    guidance_scale: float | None = None,
    condition: Tensor | None = None,
    progress: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Interpolate between pairs of images through noise (Ho et al. 2020, section 4.4 and figure 8).

    Both images are noised with the same noise, mixed at that level, and denoised with the same noise. Weight 0 gives a
    variation of `a`, and weight 1 one of `b`.

    Args:
        model: See `Sampler`.
        plan: From `ddpm_plan`, `dpm_solver_plan`, ....
        a: Floating [N, C, H, W] in [-1, 1], of the model's size.
        b: Images like `a`.
        num: The number of images for each pair, 2..65536, with weights evenly spaced in 0..1.
        strength: See `vary`. Small values blend pixels, large ones change what is shown.
        seed: See `sample`. Pair i uses the noise of image i there.
        batch_size: See `sample`.
        class_labels: One class for all pairs, or one for each pair, see `sample`.
        guidance_scale: See `sample`.
        condition: See `sample`, one for each pair.
        progress: See `sample`.
        dtype: See `Sampler`.
        device: See `Sampler`.

    Returns:
        float32 (float64 for a float64 network) [N, num, C, H, W] on the device.

    Raises:
        ValueError: An argument is out of range or does not fit the model. Checked before any computation.
        TypeError: An argument has an unsupported type.
    """
    caller = "interpolate"
    check_model(caller, model)
    _check_denoises(caller, plan)
    _check_images(caller, "a", a, model, plan)
    _check_images(caller, "b", b, model, plan)
    expect(a.shape == b.shape, caller, "b", f"to have the shape of a, {list(a.shape)}", list(b.shape))
    check_int(caller, "num", num, 2, _MOST_WEIGHTS)
    check_number(caller, "strength", strength, 0, 1)
    shape, device = checked_setup(caller, model, plan, dtype, device, a.shape[1:], None)
    pairs = checked_request(
        *(caller, model, device, shape, len(a)),
        seed=seed,
        batch_size=batch_size,
        class_labels=class_labels,
        guidance_scale=guidance_scale,
        condition=condition,
        progress=progress,
    )
    check_free_memory(caller, "num", num, 12 * num * a.numel())  # mixed images, x_T and results in float32
    request = replace(
        pairs,
        num_samples=num * len(a),
        batch_size=num * len(a) if batch_size is None else batch_size,
        seeds=pairs.seeds.repeat_interleave(num),
        labels=None if pairs.labels is None else pairs.labels.repeat_interleave(num),
        condition=None if condition is None else condition.repeat_interleave(num, dim=0),
    )
    weights = torch.linspace(0, 1, num, device=a.device)[None, :, None, None, None]
    wide = torch.promote_types(a.dtype, torch.float32)
    mixed = torch.lerp(a[:, None].to(wide), b[:, None].to(a.device, wide), weights.to(wide)).flatten(0, 1)
    return _denoised(model, plan, mixed, strength, request, dtype, device).reshape(len(a), num, *shape)


def invert(
    model: Model,
    plan: SamplingPlan,
    images: Tensor,
    *,
    batch_size: int | None = None,
    class_labels: ClassLabels = None,
    condition: Tensor | None = None,
    progress: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Find the x_T from which DDIM draws images (Song et al. 2021, section 4.3).

        x_T = invert(model, ddim_inversion_plan(schedule, 50, evaluate_at="arrival", clip=None), images)
        again = sample(model, ddim_plan(schedule, 50, clip=None), len(images), x_T=x_T)

    Both plans are exact inverses in the limit of many steps, but only without a clip.

    Args:
        model: See `Sampler`.
        plan: From `ddim_inversion_plan`.
        images: Floating [N, C, H, W] in [-1, 1], of the model's size.
        batch_size: See `sample`.
        class_labels: See `sample`. Use the same ones on the way back.
        condition: See `sample`. Use the same one on the way back.
        progress: See `sample`.
        dtype: See `Sampler`.
        device: See `Sampler`.

    Returns:
        x_T, as `sample` returns images.

    Raises:
        ValueError: An argument is out of range or does not fit the model. Checked before any computation.
        TypeError: An argument has an unsupported type.
    """
    caller = "invert"
    check_model(caller, model)
    check_type(caller, "plan", plan, SamplingPlan)
    _check_images(caller, "images", images, model, plan)
    abar = float(plan.schedule.alpha_bars[plan.timesteps[-1]])
    if plan.is_random or _denoises(plan) or float(plan.alpha_bars_prev[-1]) > abar * (1 + 1e-9):
        raise InvalidValue(caller, "plan", "to go from an image to noise (ddim_inversion_plan)", f"\n{plan}")
    shape, device = checked_setup(caller, model, plan, dtype, device, images.shape[1:], None)
    request = checked_request(
        *(caller, model, device, shape, len(images)),
        seed=0,
        batch_size=batch_size,
        class_labels=class_labels,
        guidance_scale=None,
        x_T=images,
        condition=condition,
        progress=progress,
    )
    x_T, _ = Sampler(model, plan, dtype=dtype, device=device, shape=shape)._draw(request)
    return x_T


def inpaint(
    model: Model,
    plan: SamplingPlan,
    images: Tensor,
    mask: Tensor,
    *,
    seed: int | Tensor = 0,
    batch_size: int | None = None,
    class_labels: ClassLabels = None,
    guidance_scale: float | None = None,
    condition: Tensor | None = None,
    progress: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Paint a region of images and keep the rest (Lugmayr et al. 2022, algorithm 1).

    After each step, the known region is replaced by the images at the step's noise level, with noise that is drawn for that
    step. `repaint_plan` takes steps several times, so that both regions fit. Other plans are faster and fit less.

    Args:
        model: See `Sampler`.
        plan: From `repaint_plan`, `ddpm_plan`, `dpm_solver_plan`, ....
        images: Floating [N, C, H, W] in [-1, 1], of the model's size. Masked pixels may have any finite value.
        mask: 1 or true is painted, 0 or false is kept, values between mix. Floating in 0..1 or bool, [N or 1, C or 1, H, W].
        seed: See `sample`.
        batch_size: See `sample`.
        class_labels: See `sample`.
        guidance_scale: See `sample`.
        condition: See `sample`.
        progress: See `sample`.
        dtype: See `Sampler`.
        device: See `Sampler`.

    Returns:
        The images, as `sample` returns them. Pixels with mask 0 equal the given ones bit for bit.

    Raises:
        ValueError: An argument is out of range or does not fit the model. Checked before any computation.
        TypeError: An argument has an unsupported type.
    """
    caller = "inpaint"
    check_model(caller, model)
    _check_denoises(caller, plan)
    _check_images(caller, "images", images, model, plan, in_range=False)
    _check_mask(caller, mask, images)
    shape, device = checked_setup(caller, model, plan, dtype, device, images.shape[1:], None)
    request = checked_request(
        *(caller, model, device, shape, len(images)),
        seed=seed,
        batch_size=batch_size,
        class_labels=class_labels,
        guidance_scale=guidance_scale,
        condition=condition,
        progress=progress,
    )
    draw = Sampler(model, plan, dtype=dtype, device=device, shape=shape)
    known = images.detach().to(device, opmath(draw.dtype))
    painted = mask.detach().to(device, known.dtype).expand(len(images), -1, -1, -1)
    results = []
    for begin in range(0, len(images), request.batch_size):
        chunk = slice(begin, begin + request.batch_size)
        keep = _keep_known(plan, known[chunk], painted[chunk], request.seeds[chunk].to(device))
        drawn, _ = draw._draw(request.part(chunk, callback=keep))
        results.append(_blend(known[chunk], drawn, painted[chunk]))
    return torch.cat(results)


def _keep_known(plan: SamplingPlan, known: Tensor, painted: Tensor, seeds: Tensor) -> Callback:
    """Return a callback that replaces the known region after each step, at the noise level where the step arrives."""

    def keep(step: int, timestep: int, x_t: Tensor) -> None:
        abar = float(plan.alpha_bars_prev[step])
        z = noise(x_t.shape, seeds, stream=STREAM_KNOWN + step, dtype=x_t.dtype, device=x_t.device)
        x_t.copy_(_blend(math.sqrt(abar) * known + math.sqrt(1 - abar) * z, x_t, painted))

    return keep


def _blend(known: Tensor, drawn: Tensor, painted: Tensor) -> Tensor:
    """Return `known`, and `drawn` as far as `painted` says. Pixels with 0 are those of `known`, whatever was drawn."""
    return torch.where(painted == 0, known, torch.lerp(known, drawn, painted))


def _denoised(
    model: Model,
    plan: SamplingPlan,
    images: Tensor,
    strength: float,
    request: Request,
    dtype: torch.dtype | None,
    device: torch.device,
) -> Tensor:
    """Noise the images as far as `strength` says (derivation eq. 3), and run the plan from there."""
    levels = plan.timesteps.unique_consecutive()  # Heun's method has two rows a level
    count = max(1, round(strength * len(levels)))  # no strength but 0 returns the images
    timestep = int(levels[-count])
    draw = Sampler(model, plan.starting_at(timestep), dtype=dtype, device=device, shape=images.shape[1:])
    x_0 = images.detach().to(device, opmath(draw.dtype), copy=True)
    if strength == 0:
        return x_0
    row = int((plan.timesteps == timestep).nonzero()[0])
    abar = float(plan.alpha_bars[row])
    z = initial_noise(x_0.shape, request.seeds.to(device), dtype=x_0.dtype, device=device)
    drawn, _ = draw._draw(replace(request, x_T=math.sqrt(abar) * x_0 + math.sqrt(1 - abar) * z))
    return drawn


def _check_denoises(caller: str, plan: SamplingPlan) -> None:
    """Raise unless the plan goes from noise to an image."""
    check_type(caller, "plan", plan, SamplingPlan)
    if not _denoises(plan):
        raise InvalidValue(caller, "plan", "to go from noise to an image", f"\n{plan}")


def _denoises(plan: SamplingPlan) -> bool:
    """Return whether the plan ends at an image, x_0 or the level of timestep 0, and not where an inversion begins.

    An inversion arrives at its timestep or above.
    """
    arrivals, abar = plan.alpha_bars_prev, plan.schedule.alpha_bars
    end, last, image = float(arrivals[-1]), float(abar[plan.timesteps[-1]]), float(abar[0])
    falls = end > last * (1 + 1e-9) or end > float(arrivals[0])
    return falls and end > image * (1 - 1e-9)


def _check_images(caller: str, name: str, images: Tensor, model: Model, plan: SamplingPlan, *, in_range: bool = True) -> None:
    """Raise unless these are finite images of the model's size, about in [-1, 1]."""
    check_float(caller, name, images)
    check_strided(caller, name, images)
    config = model_config(model)
    channels, size = image_channels(config, plan.variance != "fixed"), config.get("sample_size")
    wanted = ["C" if channels is None else channels, *((size, size) if isinstance(size, int) else size or ("H", "W"))]
    images = images.detach()
    fits = images.dim() == 4 and images.numel() > 0
    fits = fits and all(want in (got, "C", "H", "W") for want, got in zip(wanted, images.shape[1:], strict=True))
    if not fits or images.is_meta:
        shape = ", ".join(map(str, ["N", *wanted]))
        raise InvalidValue(caller, name, f"to be [{shape}] with values", f"{list(images.shape)} on {images.device}")
    expect(images.isfinite().all(), caller, name, "to be finite", "NaN or infinity")
    if in_range and float(images.abs().max()) > _LARGEST:
        low, high = float(images.min()), float(images.max())
        raise InvalidValue(caller, name, "to be in [-1, 1]", f"values from {low:.4g} to {high:.4g}")


def _check_mask(caller: str, mask: Tensor, images: Tensor) -> None:
    """Raise unless the mask is bool or in 0..1, and of a shape that goes with the images."""
    check_type(caller, "mask", mask, Tensor)
    check_strided(caller, "mask", mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise InvalidType(caller, "mask", "to be bool or floating", mask.dtype)
    n, channels, height, width = images.shape
    fits = mask.dim() == 4 and mask.shape[0] in (1, n) and mask.shape[1] in (1, channels)
    if not fits or mask.shape[2:] != (height, width) or mask.is_meta:
        wanted = f"[{n} or 1, {channels} or 1, {height}, {width}] with values"
        raise InvalidValue(caller, "mask", f"to be {wanted}", f"{list(mask.shape)} on {mask.device}")
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise InvalidValue(caller, "mask", "to be in 0..1", f"values from {float(mask.min()):.4g} to {float(mask.max()):.4g}")
