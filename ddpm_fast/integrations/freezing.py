"""`freeze` and `plan_of`: networks, pipelines and samplers of this package and of other libraries."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Any, Final, overload

import torch
from torch import nn

from ..checks import MAX_TIMESTEPS, computing_device
from ..errors import ArgumentError, InvalidType, InvalidValue, expect
from ..inference import FrozenUNet, frozen_unet
from ..nn import UNet
from ..options import checked, within
from ..plan import SamplingPlan
from .foreign import unwrapped
from .frozen_module import FrozenModule

# Class of an object or a base of it -> module here and function. The libraries are imported only if there is such an object.
# Copies of guided-diffusion's classes stand in many packages, so these have no package's name.
_FREEZERS: Final = {
    "diffusers.UNet2DModel": (".diffusers.network", "frozen_network"),
    "diffusers.DiffusionPipeline": (".diffusers.network", "frozen_pipeline"),
    "denoising_diffusion_pytorch.GaussianDiffusion": (".denoising_diffusion_pytorch", "frozen_process"),
    "UNetModel": (".guided_diffusion", "frozen_model"),
}
_PLANNERS: Final = {
    "diffusers.SchedulerMixin": (".diffusers.schedulers", "plan_of_scheduler"),
    "denoising_diffusion_pytorch.GaussianDiffusion": (".denoising_diffusion_pytorch", "plan_of_process"),
    "GaussianDiffusion": (".guided_diffusion", "plan_of_diffusion"),
}


@overload
def freeze(
    x: UNet,
    dtype: torch.dtype | None = None,
    *,
    device: torch.device | str | None = None,
    num_timesteps: Annotated[int | None, within(1, MAX_TIMESTEPS)] = None,
) -> FrozenUNet: ...


@overload
def freeze(
    x: Any,
    dtype: torch.dtype | None = None,
    *,
    device: torch.device | str | None = None,
    num_timesteps: Annotated[int | None, within(1, MAX_TIMESTEPS)] = None,
) -> Any: ...


@checked()
def freeze(
    x: Any,
    dtype: torch.dtype | None = None,
    *,
    device: torch.device | str | None = None,
    num_timesteps: Annotated[int | None, within(1, MAX_TIMESTEPS)] = None,
) -> Any:
    """Return the inference form of a network, or a pipeline with one. `x` is not modified.

    | x | result |
    |---|---|
    | `UNet` | a `FrozenUNet` |
    | diffusers' `UNet2DModel` | a `UNet2DModel` |
    | a diffusers pipeline with a `UNet2DModel` | a copy of the pipeline with a frozen network and the same scheduler |
    | `UNetModel` of guided-diffusion or improved-diffusion | a network called as model(x, t, y=None) |
    | `GaussianDiffusion` of denoising-diffusion-pytorch on a `UNet` | a copy of the process with a frozen network |

    Everything that is frozen is called like `x`. Outputs are equal up to the rounding of `dtype`. It has no
    gradients and no dropout, and is immutable: a change raises an error. A later change of the network of `x` does not
    reach it. Freeze `x` again then. A pipeline or process shares all other parts with its copy. A network under
    torch.compile is taken out of it.

    A network of another library is read by its class, configuration and weights. What these do not show (hooks, patched
    methods, adapters, weights without values) is refused by name. Then the outputs of both are compared once, with random
    weights in float32 on the CPU, at the smallest size. So other layers are found, too.

    Args:
        x: The network or pipeline.
        dtype: Dtype of weights and activations. None: that of `x`, but a float32 `UNet` becomes bfloat16 on a
            GPU, or float16 without bfloat16 support. Objects of other libraries keep theirs there, too, so that their
            results stay. Inputs and outputs of those keep their dtype in any case.
        device: Device of the network. None: that of `x`.
        num_timesteps: T. Integer timesteps must be in 0..T-1. None: what the pipeline or process has,
            `num_train_timesteps` of the configuration, or 1000.

    Raises:
        TypeError: `x` is of another class, layers of a `UNet` are not those of its class, or `dtype` is not a floating
            dtype. The message names the part.
        ValueError: `num_timesteps` is out of range, `device` is unknown, the network is not supported, or a
            network of another library is not what its class and configuration describe. The message has the reason.
    """
    device = None if device is None else computing_device(device)
    x = unwrapped("x", x)
    expect(
        not isinstance(x, FrozenUNet | FrozenModule),
        "x",
        "to be an unfrozen network or pipeline",
        f"a {type(x).__name__}",
    )
    if isinstance(x, UNet):
        return frozen_unet(x, dtype, device=device, num_timesteps=num_timesteps)
    wanted = (
        "a ddpm_fast.UNet, a network or pipeline of diffusers, a UNetModel of guided-diffusion, or a "
        "GaussianDiffusion of denoising-diffusion-pytorch"
    )
    return _call(x, _FREEZERS, wanted, dtype, device, num_timesteps)


@checked()
def plan_of(
    x: Any,
    num_steps: Annotated[int | None, within(low=1)] = None,
    *,
    eta: Annotated[float | None, within(low=0, finite=True)] = None,
) -> SamplingPlan:
    """Return what a sampler of another library does as a plan for `Sampler`, `sample` and `write_samples`.

    Args:
        x: A DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler or DDIMInverseScheduler of diffusers, a pipeline with
            one, or a GaussianDiffusion of guided-diffusion, improved-diffusion or denoising-diffusion-pytorch.
        num_steps: Number of steps. None: what was set in `x`. It is fixed in guided-diffusion's processes.
        eta: Scale of the noise of DDIM. None: what was set in `x`, or ancestral sampling by guided-diffusion's processes.

    Raises:
        TypeError: `x` is of another class.
        ValueError: An argument is out of range, or no plan can do what `x` does. The message names the part and the reason.
    """
    x = getattr(x, "scheduler", x)  # a pipeline's
    plan: SamplingPlan = _call(x, _PLANNERS, "a scheduler or pipeline of diffusers, or a GaussianDiffusion", num_steps, eta)
    return plan


def _call(x: object, table: Mapping[str, tuple[str, str]], wanted: str, *arguments: Any) -> Any:
    """Call the function that a table has for an object. `wanted` says for which there is one."""
    names = {f"{package}{cls.__name__}" for cls in type(x).__mro__ for package in ("", f"{cls.__module__.partition('.')[0]}.")}
    found = next((place for name, place in table.items() if name in names), None)
    if found is None:
        has_norms = isinstance(x, nn.Module) and any(isinstance(layer, nn.GroupNorm) for layer in x.modules())
        advice = ", whose norms ddpm_fast.fuse may make faster" if has_norms else ""
        raise InvalidType("x", f"to be {wanted}", f"a {type(x).__name__}{advice}")
    module, function = found
    try:
        return getattr(import_module(module, __package__), function)(x, *arguments)
    except (ArgumentError, ImportError):
        raise
    except Exception as error:  # a namesake may lack anything, and its code may raise anything
        raise InvalidValue("x", f"to be {wanted}", error) from error
