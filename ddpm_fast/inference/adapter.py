"""Any network as samplers and the variational bound use it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidValue
from ..ops import reverse_step
from ..plan import SamplingPlan
from .model import Model, device_and_dtype, model_config, predict
from .step import StepState, write_beside_condition


class Adapter:
    """A network that is called for each step, as model(x_t, t) or model(x_t, t, class_labels).

    Attributes:
        model: The network.
        device: Its device.
        dtype: Dtype of its input.
        is_frozen: The network never changes: its steps are worth keeping, and captured as CUDA graphs by default. Autocast has
            no effect.
    """

    is_frozen = False

    def __init__(self, model: Model, dtype: torch.dtype | None = None) -> None:
        self.model = model
        self.device, own_dtype = device_and_dtype(model)
        self.dtype = own_dtype if dtype is None else dtype  # a model without parameters takes any

    def check_plan(self, plan: SamplingPlan) -> None:
        """Raise a ValueError if the network cannot take the steps of a plan."""

    def memory_format(self, shape: Sequence[int]) -> torch.memory_format:
        """Return channels_last for images if the model's convolution weights are, else contiguous_format."""
        weights = [p for p in self.parameters() if p.dim() == 4 and not p.is_contiguous()]
        suits = any(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
        return torch.channels_last if suits and len(shape) == 3 else torch.contiguous_format

    def parameters(self) -> list[Tensor]:
        """Return the tensors whose addresses a captured step uses."""
        return [*self.model.parameters(), *self.model.buffers()] if isinstance(self.model, nn.Module) else []

    def evaluate(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None, condition: Tensor | None = None) -> Tensor:
        """Return the network's output m.

        Args:
            x_t: [N, C, H, W].
            t: int64 [N].
            class_labels: Labels [N, ...], or None for a network without.
            condition: [N, K, H, W], or None for a network that reads x_t alone.
        """
        x = x_t.to(self.dtype)
        return predict(self.model, x if condition is None else torch.cat([x, condition.to(self.dtype)], dim=1), t, class_labels)

    def bind(self, plan: SamplingPlan, state: StepState, guidance_scale: float | None) -> Callable[[], object]:
        """Return a function that advances x_t by a step of a plan (derivation eq. 13; Ho et al. 2020, Algorithm 2).

        Only one thread at a time may call it.

        Args:
            plan: The plan.
            state: Memory of the step, on the network's device.
            guidance_scale: None: no guidance.

        Raises:
            ValueError: From the returned function: the network changes its input, or its output does not fit.
        """
        return self.bind_at(plan.timesteps, plan, state, guidance_scale)

    def bind_at(
        self, timesteps: Tensor, plan: SamplingPlan, state: StepState, guidance_scale: float | None
    ) -> Callable[[], object]:
        """Return the same function for other timesteps, [S] of any dtype. It calls the network for each step."""
        plan.table(self.device)  # in place before a capture looks
        timesteps, everything = timesteps.to(self.device), slice(len(state.x_t))
        joint = state.condition(everything, self.dtype, after_x_t=True) if state.condition_channels else None
        return partial(self._step, plan, timesteps, state, guidance_scale, joint)

    def _step(
        self, plan: SamplingPlan, timesteps: Tensor, state: StepState, guidance_scale: float | None, joint: Tensor | None
    ) -> None:
        """Evaluate the network once and apply one `reverse_step`. With a condition, `joint` is its input."""
        x_t, x_0, labels = state.x_t, state.x_0, state.class_labels
        history: Any = dict(zip(("x_0_prev", "x_0_prev2"), state.history, strict=False))
        if joint is not None:
            write_beside_condition(joint, x_t)
        kept = x_t if joint is None else joint
        version = kept._version
        x_in = kept.detach().to(self.dtype)  # an alias, so that the network cannot change the shape and strides of x_t
        if guidance_scale is not None and joint is None:
            x_in = torch.cat([x_in, x_in])
        t = timesteps.index_select(0, state.step).expand(len(x_in))
        model_output = predict(self.model, x_in, t, None if labels is None else labels.flatten(0, 1))
        if kept._version != version:
            raise InvalidValue("model", "to leave its input unchanged", "one that changes x_t in place")
        reverse_step(
            x_t,
            model_output,
            state.step,
            plan,
            seeds=state.seeds if plan.is_random else None,
            **history,
            guidance_scale=guidance_scale,
            return_x_0=x_0 is not None,
            out=x_t if x_0 is None else (x_t, x_0),
        )
        if len(state.history) > 1 and x_0 is not None:
            state.history[1].copy_(state.history[0])
            state.history[0].copy_(x_0)
        state.step += 1


def weights_digest(model: Model, *also: object) -> str | None:
    """Return the SHA-256 of a network's configuration, weights and buffers, or None for a function without them.

    `also` are further JSON values.

    A `FrozenUNet` has the digest of the weights from which it was made.
    """
    if not isinstance(model, nn.Module):
        return getattr(model, "digest", None)
    frozen = {
        f"{path}.{name}": value.digest
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(getattr(value, "digest", None), str)
    }
    named = model.state_dict()
    if not named and not frozen:
        return None
    digest = hashlib.sha256(json.dumps([dict(model_config(model)), frozen, *also], sort_keys=True, default=repr).encode())
    for name, values in sorted(named.items()):
        if isinstance(values, Tensor):  # a module may have extra state of any type
            digest.update(f"{name} {values.dtype} {list(values.shape)} ".encode())
            digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
