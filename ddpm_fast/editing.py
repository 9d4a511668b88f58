"""Editing of images by a model: variations, interpolation, inversion and inpainting. All run on `Sampler`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_float, check_int, check_number, check_strided, check_type
from .models import Model, model_config
from .ops import initial_noise, noise
from .plan import SamplingPlan
from .reference import STREAM_KNOWN
from .requests import ClassLabels, check_model, labels_of, resolve_seeds
from .sampling import Callback, Sampler


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
    progress: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw variations of images: add noise, and take it away again (SDEdit, Meng et al. 2022, section 3).

    The images are noised to the level where the last round(strength S) of the plan's S levels begin (derivation eq. 3), and
    the plan runs from there.

    Args:
        model: See `Sampler`.
        plan: From `ddpm_plan`, `dpm_solver_plan`, .... Plans with noise give other images for other seeds.
        images: Floating [N, C, H, W] in [-1, 1], of the model's size.
        strength: 0 returns the images themselves, 1 keeps little of them.
        seed: See `sample`. Image i uses the noise of image i there.
        batch_size: See `sample`.
        class_labels: See `sample`.
        guidance_scale: See `sample`.
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
    _check_images(caller, "images", images, model)
    check_number(caller, "strength", strength, 0, 1)
    seeds = resolve_seeds(caller, seed, len(images))
    later, abar = _from_strength(caller, plan, strength)
    draw = Sampler(model, later or plan, dtype=dtype, device=device, shape=images.shape[1:])
    if later is None:
        return images.detach().to(draw.device, torch.float64 if draw.dtype == torch.float64 else torch.float32, copy=True)
    start = _noised(images, abar, seeds)
    return draw(
        *(len(images),),
        seed=seeds,
        batch_size=batch_size,
        class_labels=class_labels,
        guidance_scale=guidance_scale,
        x_T=start,
        progress=progress,
    )


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
        num: The number of images for each pair, at least 2, with weights evenly spaced in 0..1.
        strength: See `vary`. Small values blend pixels, large ones change what is shown.
        seed: See `sample`. Pair i uses the noise of image i there.
        batch_size: See `sample`.
        class_labels: One class for all pairs, or one for each pair, see `sample`.
        guidance_scale: See `sample`.
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
    _check_images(caller, "a", a, model)
    _check_images(caller, "b", b, model)
    if a.shape != b.shape:
        raise ValueError(f"{caller}: expected b to have the shape of a, {list(a.shape)}, got {list(b.shape)}")
    check_int(caller, "num", num, 2)
    check_number(caller, "strength", strength, 0, 1)
    seeds = resolve_seeds(caller, seed, len(a)).repeat_interleave(num)
    labels: Any = labels_of(caller, model_config(model), class_labels)
    if isinstance(labels, Sequence | Tensor) and not (isinstance(labels, Tensor) and labels.dim() == 0):
        labels = torch.as_tensor(labels).repeat_interleave(num)
    weight = torch.linspace(0, 1, num, device=a.device)[None, :, None, None, None]
    mixed = torch.lerp(a[:, None].float(), b[:, None].to(a.device).float(), weight).flatten(0, 1)
    varied: Tensor = vary(
        *(model, plan, mixed, strength),
        seed=seeds,
        batch_size=batch_size,
        class_labels=labels,
        guidance_scale=guidance_scale,
        progress=progress,
        dtype=dtype,
        device=device,
    )
    return varied.reshape(len(a), num, *a.shape[1:])


def invert(
    model: Model,
    plan: SamplingPlan,
    images: Tensor,
    *,
    batch_size: int | None = None,
    class_labels: ClassLabels = None,
    progress: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Find the x_T from which DDIM draws images (Song et al. 2021, section 4.3).

        x_T = invert(model, ddim_inversion_plan(schedule, 50, told="arrival"), images)
        again = sample(model, ddim_plan(schedule, 50), len(images), x_T=x_T)

    Args:
        model: See `Sampler`.
        plan: From `ddim_inversion_plan`.
        images: Floating [N, C, H, W] in [-1, 1], of the model's size.
        batch_size: See `sample`.
        class_labels: See `sample`. Use the same ones on the way back.
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
    _check_images(caller, "images", images, model)
    check_type(caller, "plan", plan, SamplingPlan)
    if plan.is_random or bool((plan.timesteps.diff() < 0).any()):
        raise ValueError(f"{caller}: expected plan to go from an image to noise (ddim_inversion_plan), got\n{plan}")
    draw = Sampler(model, plan, dtype=dtype, device=device, shape=images.shape[1:])
    return draw(len(images), batch_size=batch_size, class_labels=class_labels, x_T=images, progress=progress)


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
    progress: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Paint a region of images anew and keep the rest (Lugmayr et al. 2022, algorithm 1).

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
    _check_images(caller, "images", images, model)
    _check_mask(caller, mask, images)
    _check_denoises(caller, plan)
    check_int(caller, "batch_size", batch_size, 1, optional=True)
    seeds = resolve_seeds(caller, seed, len(images))
    draw = Sampler(model, plan, dtype=dtype, device=device, shape=images.shape[1:])
    state = torch.float64 if draw.dtype == torch.float64 else torch.float32
    known, painted = images.detach().to(draw.device, state), mask.to(draw.device, state).expand(len(images), -1, -1, -1)
    labels: Any = labels_of(caller, model_config(model), class_labels)
    per_image = isinstance(labels, Sequence | Tensor) and not (isinstance(labels, Tensor) and labels.dim() == 0)
    results = []
    for begin in range(0, len(images), batch_size or len(images)):
        chunk = slice(begin, begin + (batch_size or len(images)))
        drawn = draw(
            *(len(known[chunk]),),
            seed=seeds[chunk],
            class_labels=labels[chunk] if per_image else labels,
            guidance_scale=guidance_scale,
            progress=progress,
            callback=_keep_known(plan, known[chunk], painted[chunk], seeds[chunk].to(draw.device)),
        )
        results.append(torch.lerp(known[chunk], drawn, painted[chunk]))
    return torch.cat(results)


def _keep_known(plan: SamplingPlan, known: Tensor, painted: Tensor, seeds: Tensor) -> Callback:
    """Return a callback that replaces the known region after each step, at the noise level where the step arrives."""

    def keep(step: int, timestep: int, x_t: Tensor) -> None:
        abar = float(plan.alpha_bars_prev[step])
        z = noise(x_t.shape, seeds, stream=STREAM_KNOWN + step, dtype=x_t.dtype, device=x_t.device)
        x_t.copy_(torch.lerp(math.sqrt(abar) * known + math.sqrt(1 - abar) * z, x_t, painted))

    return keep


def _from_strength(caller: str, plan: SamplingPlan, strength: float) -> tuple[SamplingPlan | None, float]:
    """Return the last part of the plan and abar where it begins, or None for no step at all."""
    _check_denoises(caller, plan)
    levels = plan.timesteps.unique_consecutive()  # Heun's method has two rows a level
    count = round(strength * len(levels))
    if count == 0:
        return None, 1.0
    timestep = int(levels[-count])
    row = int((plan.timesteps == timestep).nonzero()[0])
    abar = plan.alpha_bars_prev[row - 1] if row else plan.schedule.alpha_bars[timestep]
    return plan.starting_at(timestep), float(abar)


def _noised(images: Tensor, abar: float, seeds: Tensor) -> Tensor:
    """Return x_t of the images (derivation eq. 3), with the noise of `sample`."""
    dtype = torch.promote_types(images.dtype, torch.float32)
    z = initial_noise(images.shape, seeds.to(images.device), dtype=dtype, device=images.device)
    return math.sqrt(abar) * images.detach().to(dtype) + math.sqrt(1 - abar) * z


def _check_denoises(caller: str, plan: SamplingPlan) -> None:
    """Raise unless the plan ends with less noise than it begins with."""
    check_type(caller, "plan", plan, SamplingPlan)
    if float(plan.alpha_bars_prev[-1]) < float(plan.schedule.alpha_bars[plan.timesteps[0]]):
        raise ValueError(f"{caller}: expected plan to go from noise to an image, got\n{plan}")


def _check_images(caller: str, name: str, images: Tensor, model: Model) -> None:
    """Raise unless these are finite images of the model's size."""
    check_float(caller, name, images)
    check_strided(caller, name, images)
    config = model_config(model)
    channels, size = config.get("in_channels"), config.get("sample_size")
    wanted = ["C" if channels is None else channels, *((size, size) if isinstance(size, int) else size or ("H", "W"))]
    fits = images.dim() == 4 and len(images) > 0
    fits = fits and all(want in (got, "C", "H", "W") for want, got in zip(wanted, images.shape[1:], strict=True))
    if not fits or images.is_meta:
        shape = ", ".join(map(str, ["N", *wanted]))
        raise ValueError(f"{caller}: expected {name} to be [{shape}] with values, got {list(images.shape)} on {images.device}")
    if not images.isfinite().all():
        raise ValueError(f"{caller}: expected {name} to be finite, got NaN or infinity")


def _check_mask(caller: str, mask: Tensor, images: Tensor) -> None:
    """Raise unless the mask is bool or in 0..1, and of a shape that goes with the images."""
    check_type(caller, "mask", mask, Tensor)
    check_strided(caller, "mask", mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{caller}: expected mask to be bool or floating, got {mask.dtype}")
    n, channels, height, width = images.shape
    fits = mask.dim() == 4 and mask.shape[0] in (1, n) and mask.shape[1] in (1, channels)
    if not fits or mask.shape[2:] != (height, width) or mask.is_meta:
        wanted = f"[{n} or 1, {channels} or 1, {height}, {width}] with values"
        raise ValueError(f"{caller}: expected mask to be {wanted}, got {list(mask.shape)} on {mask.device}")
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError(
            f"{caller}: expected mask to be in 0..1, got values from {float(mask.min()):.4g} to {float(mask.max()):.4g}"
        )
