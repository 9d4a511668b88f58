"""Schedulers of this package and of diffusers, and the images that their chains arrive at."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import diffusers, generator
from torch import Tensor

from ddpm_fast.integrations.diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

solvers: Any = diffusers.schedulers.scheduling_dpmsolver_multistep

KINDS = (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, DDIMInverseScheduler)
THEIRS: dict[Any, Any] = {kind: getattr(diffusers, kind.__name__) for kind in KINDS}
NOISY: dict[Any, dict[str, Any]] = {DDPMScheduler: {}, DDIMScheduler: {"eta": 1.0}}  # options of a step that draws noise
LISTED = [999, 990, 700, 500, 499, 100, 20, 3, 2, 0]
EPS, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
SHAPE = (3, 3, 6, 6)


def normals(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def made(kind: Any, steps: Any = None, **config: Any) -> Any:
    """Return a scheduler with a number of timesteps, or a list of them, that is set."""
    scheduler = kind(**config)
    if steps is not None:
        scheduler.set_timesteps(**({"timesteps": steps} if np.ndim(steps) else {"num_inference_steps": steps}))
    return scheduler


def pair(kind: Any, steps: Any = None, **config: Any) -> tuple[Any, Any]:
    """Return the scheduler of this package and that of diffusers."""
    return made(kind, steps, **config), made(THEIRS[kind], steps, **config)


def in_float64(ours: Any, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return diffusers' scheduler as it would be without rounding: float64 throughout, with the noise of float32."""
    schedule, timesteps, draw = ours.schedule, theirs.timesteps, diffusers.utils.torch_utils.randn_tensor
    theirs.alphas_cumprod, theirs.one = schedule.alpha_bars, torch.tensor(1.0, dtype=torch.float64)
    if not theirs.config.get("set_alpha_to_one", True):
        theirs.final_alpha_cumprod = theirs.initial_alpha_cumprod = schedule.alpha_bars[0]

    def drawn(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None) -> Tensor:
        return draw(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    for module in (diffusers.schedulers.scheduling_ddpm, diffusers.schedulers.scheduling_ddim, solvers):
        monkeypatch.setattr(module, "randn_tensor", drawn)
    if isinstance(ours, DPMSolverMultistepScheduler):
        for name, library in (("torch", torch), ("np", np)):
            monkeypatch.setattr(solvers, name, SimpleNamespace(**(vars(library) | {"float32": library.float64})))
        begin = theirs.begin_index
        theirs.set_timesteps(
            **({"num_inference_steps": len(timesteps)} if ours.config.use_karras_sigmas else {"timesteps": timesteps})
        )
        theirs.timesteps = timesteps  # Karras's are rounded from float32 levels
        theirs.set_begin_index(begin)
    return theirs


def model(schedule: Any, config: Any, x: Tensor, t: Any) -> Tensor:
    """Near what the best model says of images that are noise; amplifies no difference, and has some x_0 beyond the clip."""
    abar = schedule.alpha_bars[int(t)].to(x.dtype)
    best = {"epsilon": (1 - abar).sqrt() * x, "sample": abar.sqrt() * x, "v_prediction": torch.zeros_like(x)}
    m = 0.9 * best[config.prediction_type] + 0.1 * (1 - abar).sqrt() * torch.sin(x.roll(1, -1))
    return torch.cat([m, torch.cos(2 * x)], dim=1) if config.get("variance_type") in ("learned", "learned_range") else m


def loop(scheduler: Any, schedule: Any, dtype: torch.dtype = torch.float32, begin: int = 0, **options: Any) -> Tensor:
    """Run the chain from step `begin` on. The result ends with what the generator draws next."""
    x, draws = normals(*SHAPE, dtype=dtype), generator(5)
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = draws
    if begin:
        noise = normals(*SHAPE, seed=7, dtype=dtype)
        x = scheduler.add_noise(0.5 * x.clamp(-1, 1), noise, scheduler.timesteps[begin : begin + 1])
    elif scheduler.config.get("use_karras_sigmas"):
        scheduler.set_begin_index(0)  # as pipelines do: the first timestep may be listed twice, and the second one is found
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(model(schedule, scheduler.config, x, t), t, x, **options).prev_sample
    assert torch.isfinite(x).all()
    return torch.cat([x.flatten(), torch.randn(4, generator=draws).to(dtype)])


def assert_same_image(ours: Any, theirs: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Tensor:
    """From the same seed, and as near to that of diffusers without rounding as diffusers is.

    Returns:
        What diffusers' scheduler arrives at in float64.
    """
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert ours.num_inference_steps == (theirs.num_inference_steps or len(theirs.timesteps))
    assert getattr(ours, "custom_timesteps", None) == getattr(theirs, "custom_timesteps", None)
    got, rounded = (loop(scheduler, ours.schedule, **options) for scheduler in (ours, theirs))
    exact = loop(in_float64(ours, theirs, monkeypatch), ours.schedule, torch.float64, **options)
    scale = max(1.0, float(exact.abs().max()))  # without a clip, values leave [-1, 1]
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=2 * float((rounded - exact).abs().max()) + 4 * EPS * scale)
    return exact
