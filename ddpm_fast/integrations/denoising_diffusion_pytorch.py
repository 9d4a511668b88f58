"""denoising-diffusion-pytorch 2.x: its `GaussianDiffusion`, frozen or as a plan, and its Trainer's files."""

from __future__ import annotations

import copy
import os
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import nn

from ..checks import check_choice, check_int
from ..errors import InvalidType, expect
from ..inference import frozen_unet
from ..nn import UNet
from ..nn.checkpoint import check_weights, load_tensors
from ..options import checked
from ..plan import SamplingPlan, ddim_plan, ddpm_plan
from ..predictions import Prediction
from ..schedule import NoiseSchedule
from .foreign import check_unpatched, unwrapped
from .frozen_module import FrozenModule

_PREDICTIONS: Final[dict[str, Prediction]] = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}


def frozen_process(process: Any, dtype: torch.dtype | None, device: Any, num_timesteps: int | None) -> Any:
    """Freeze a process's network. Arguments and errors are those of `ddpm_fast.freeze`."""
    model = unwrapped("x.model", getattr(process, "model", None))
    if not isinstance(model, UNet):
        advice = (
            "train a ddpm_fast.UNet in its place, or draw with ddpm_fast.sample and ddpm_fast.plan_of, which take it as it is"
        )
        got = f"a {type(model).__name__}, " + (
            "which is frozen already" if isinstance(model, FrozenModule) else f"which freeze does not know: {advice}"
        )
        raise InvalidType("x.model", "to be a ddpm_fast.UNet", got)
    expect(
        model.class_embedding is None,
        "x.model",
        "to have no classes, which the process does not know",
        "num_class_embeds",
    )
    num_timesteps = process.num_timesteps if num_timesteps is None else num_timesteps
    frozen = frozen_unet(model, dtype or model.conv_in.weight.dtype, device=device, num_timesteps=num_timesteps)
    other = copy.copy(process)
    # A copy shares its dictionaries of hooks, buffers and modules with the original, and both could write to the buffers.
    vars(other).update({name: copy.copy(value) for name, value in vars(process).items() if isinstance(value, dict | set)})
    other._buffers.update(
        {name: each.to(frozen.device, copy=True) for name, each in process.named_buffers(recurse=False, remove_duplicate=False)}
    )
    other._modules["model"] = network = FrozenModule(model, frozen)
    other.register_load_state_dict_pre_hook(partial(network.refuse, "call of load_state_dict"))
    other.training = False
    return other


def plan_of_process(process: Any, num_steps: int | None, eta: float | None) -> SamplingPlan:
    """Return the plan of a process. Arguments and errors are those of `ddpm_fast.plan_of`."""
    kind, itself = type(process), "to be a GaussianDiffusion itself, whose steps are known"
    known = f"{kind.__module__}.{kind.__name__}" == "denoising_diffusion_pytorch.denoising_diffusion_pytorch.GaussianDiffusion"
    expect(known, "x", itself, f"a {kind.__name__} of {kind.__module__}")
    check_unpatched("x", process)
    expect(
        not process.self_condition,
        "x",
        "to have a network without self-conditioning, which reads x_0 too",
        "one with it",
    )
    check_choice("x.objective", process.objective, _PREDICTIONS)
    schedule, prediction = NoiseSchedule.from_betas(process.betas.cpu().double()), _PREDICTIONS[process.objective]
    _check_tables(process, schedule)
    is_ddim = process.is_ddim_sampling if num_steps is None else num_steps != process.num_timesteps
    if eta is None and not is_ddim:
        return ddpm_plan(schedule, spacing=range(process.num_timesteps)[::-1], prediction=prediction)
    name, steps = ("x.sampling_timesteps", process.sampling_timesteps) if num_steps is None else ("num_steps", num_steps)
    check_int(name, steps, 1, process.num_timesteps)
    # The original's timesteps, to the roundings of their float32.
    edges = torch.linspace(-1, process.num_timesteps - 1, steps + 1, dtype=torch.float32).to(torch.int64)
    eta = process.ddim_sampling_eta if eta is None else eta
    return ddim_plan(
        schedule, None, spacing=edges[1:].flip(0).tolist(), prediction=prediction, eta=eta, use_clipped_model_output=True
    )


def _check_tables(process: Any, schedule: NoiseSchedule) -> None:
    """Raise if a table that sampling reads is not what the betas give."""
    tables = {
        "alphas_cumprod": schedule.alpha_bars,
        "sqrt_alphas_cumprod": schedule.sqrt_alpha_bars,
        "sqrt_one_minus_alphas_cumprod": schedule.sqrt_one_minus_alpha_bars,
        "sqrt_recip_alphas_cumprod": schedule.alpha_bars.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / schedule.alpha_bars - 1).sqrt(),
        "posterior_mean_coef1": schedule.posterior_mean_coef_x_0,
        "posterior_mean_coef2": schedule.posterior_mean_coef_x_t,
        "posterior_log_variance_clipped": schedule.posterior_variance.clamp(min=1e-20).log(),
    }
    # Betas rounded to float32 move beta and 1 - abar by at most one rounding (2^-24), and abar by sum(beta / alpha) roundings.
    # A table has at most one abar and three others, and is rounded itself. The logarithm of three moves by 3 * 2^-24.
    factors = 4 + (1 / schedule.alphas.clamp(min=2**-24) - 1).cumsum(0)
    for name, exact in tables.items():
        table = getattr(process, name).detach().to("cpu", torch.float64)
        same = ((table - exact).abs() <= 2**-24 * (factors * exact.abs() + 3)) | (table == exact)  # infinities are equal
        expect(same.all(), f"x.{name}", "to be what x.betas give, up to float32's rounding", "other values")


@checked()
def load_checkpoint(process: Any, path: str | os.PathLike[str], *, weights: Literal["ema", "model"] = "ema") -> int:
    """Load a checkpoint of denoising-diffusion-pytorch's Trainer (model-N.pt) without running its code.

    Args:
        process: GaussianDiffusion with a model like the trained one. It is not modified if loading fails.
        path: The file.
        weights: "ema", the weights' moving average, with which the Trainer samples; or "model", the weights.

    Returns:
        The step of training.

    Raises:
        FileNotFoundError: The file does not exist.
        TypeError: `process` is no GaussianDiffusion.
        ValueError: The file is damaged, needs pickle, is no checkpoint of the Trainer, or does not fit.
    """
    if not isinstance(process, nn.Module) or not hasattr(process, "objective"):
        raise InvalidType("process", "to be a GaussianDiffusion of denoising-diffusion-pytorch", type(process).__name__)
    checkpoint = load_tensors(path)
    content: dict[str, Any] = checkpoint if isinstance(checkpoint, dict) else {}
    step, state = content.get("step", ""), content.get(weights, "")
    whole, got = isinstance(step, int) and isinstance(state, dict), f"one with {', '.join(map(str, content)) or 'no names'}"
    expect(whole, repr(os.fspath(path)), "to be a Trainer's checkpoint, with step, model and ema", got)
    if weights == "ema":
        state = {name[10:]: tensor for name, tensor in state.items() if name.startswith("ema_model.")}
    check_weights(path, "the model", process.state_dict(), state)
    process.load_state_dict(state)
    return int(step)
