"""The choice of how a network takes the steps of a plan: a frozen network by its program, any other by calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import expect
from ..interface import Interface
from ..nn.unet import UNet
from ..ops.modes import runs_eagerly
from ..plan import SamplingPlan
from .adapter import Adapter
from .frozen import FrozenUNet, frozen_for
from .model import Model, inference_form, model_config, placed
from .network import why_not_frozen
from .step import StepState


def adapted(model: Model, device: torch.device, dtype: torch.dtype | None, num_timesteps: int) -> Adapter:
    """Return the adapter of the network that computes `model` fastest.

    A `UNet` is frozen. Any other model is used unchanged, or copied to another device or dtype. So is a `UNet` that
    cannot be frozen, with a warning that names the reason.

    Args:
        model: Model to evaluate.
        device: Device to run on.
        dtype: Dtype of the network. None: the choice of `freeze` for a `UNet`, else the model's.
        num_timesteps: T.
    """
    model = inference_form(model)
    if isinstance(model, UNet):
        reason = why_not_frozen(model) if device.type in ("cpu", "cuda") else f"it is on {device.type}"
        if reason is None:
            return FrozenAdapter(frozen_for(model, dtype, device, num_timesteps))
        warnings.warn(
            f"ddpm_fast: this UNet is not frozen, because {reason}. It runs unchanged, which is slower.",
            RuntimeWarning,
            stacklevel=5,  # the caller of `Sampler`, which two wrappers check and name
        )
    network = placed(model, device, dtype)
    return FrozenAdapter(network) if isinstance(network, FrozenUNet) else Adapter(network, dtype)


class FrozenAdapter(Adapter):
    """A frozen network, whose step is one program: network, guidance and `reverse_step`."""

    model: FrozenUNet
    is_frozen = True

    def check_plan(self, plan: SamplingPlan) -> None:
        """Raise a ValueError if a timestep is not in the network's tables."""
        last, total = int(plan.timesteps.max()), self.model.num_timesteps
        expect(last < total, "plan", f"to have timesteps below {total}", last)

    def memory_format(self, shape: Sequence[int]) -> torch.memory_format:
        """Return channels_last, as the kernels read images."""
        return torch.channels_last

    def parameters(self) -> list[Tensor]:
        """Return nothing: the network holds what a captured step uses."""
        return []

    def bind(self, plan: SamplingPlan, state: StepState, guidance_scale: float | None) -> Callable[[], object]:
        """Return the program of a step, see `FrozenUNet.step`. A network that is traced is called as any other."""
        if not runs_eagerly():
            return super().bind(plan, state, guidance_scale)
        return self.model.step(plan, state, guidance_scale)


def interface_of(model: Model, *, predicts_variance: bool | None = None, no_label: int | None = None) -> Interface:
    """Return the interface of a network.

    Args:
        model: The network.
        predicts_variance: As the objective or the plan says. None: as the configuration says, which training writes.
        no_label: The label for no class. None: as the configuration says, see `UNet`.
    """
    model = inference_form(model)
    return Interface.from_config(
        model_config(model),
        predicts_variance=predicts_variance,
        no_label=no_label,
        halves=isinstance(model, UNet | FrozenUNet),
    )
