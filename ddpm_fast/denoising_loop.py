"""The sampling loop on a device: the same step on the same memory, for every step of every batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .errors import InvalidValue
from .inference import FrozenUNet, StepTensors
from .models import Model, predict
from .ops import initial_noise, reverse_step
from .plan import SamplingPlan


class DenoisingLoop:
    """Memory for sampling n images at a time, and the step that advances it.

    `start` fills the memory. Each `advance` applies one step of the plan. It reads the step's number from
    device memory and never synchronizes. One CUDA graph therefore serves every step of every batch.

    Args:
        network: The network. Of a `FrozenUNet`, the step is one program.
        plan: Plan of the sampler.
        shape: [n, C, H, W].
        state_dtype: Dtype of x_t.
        network_dtype: Dtype of the network's input.
        memory_format: Memory format of x_t.
        device: Device to run on.
        label: Label of every sample until `start` sets others, and of the unconditional half with
            guidance. None: the network gets no labels.
        guidance_scale: None: no guidance. Otherwise the network evaluates 2 n samples, the second half
            without labels.

    Attributes:
        x_t: [n, C, H, W], updated in place: x_T after `start`, x_0 after the last step.
        advance: Function of no arguments that applies a step.
        held: What a captured `advance` uses.
    """

    def __init__(
        self,
        network: Model,
        plan: SamplingPlan,
        shape: tuple[int, ...],
        *,
        state_dtype: torch.dtype,
        network_dtype: torch.dtype,
        memory_format: torch.memory_format,
        device: torch.device,
        label: int | None,
        guidance_scale: float | None,
    ) -> None:
        n, halves = shape[0], 1 if guidance_scale is None else 2
        with torch.inference_mode(False):  # ordinary tensors, which outlive the mode
            self.x_t = torch.zeros(shape, dtype=state_dtype, device=device).contiguous(memory_format=memory_format)
            self._tensors = tensors = StepTensors(
                self.x_t,
                torch.zeros_like(self.x_t) if plan.needs_x_0_prev else None,
                torch.zeros(n, dtype=torch.int64, device=device),
                None if label is None else torch.full((halves, n), label, device=device),
                torch.zeros(1, dtype=torch.int64, device=device),
            )
        self._address = self.x_t.data_ptr()
        self.advance: Callable[[], object]
        if isinstance(network, FrozenUNet):
            self.advance = network.step(plan, tensors, guidance_scale)
        else:
            plan.table(device)  # in place before a capture looks
            timesteps = plan.timesteps.to(device)
            self.advance = partial(_advance, network, network_dtype, plan, timesteps, tensors, guidance_scale)
        self.held: object = None

    @property
    def is_intact(self) -> bool:
        """True if x_t is where the step reads it. A callback that kept x_t may have replaced its memory."""
        return self.x_t.data_ptr() == self._address

    def start(self, seeds: Tensor, labels: Tensor | None, x_T: Tensor | None = None) -> None:
        """Set x_T and return to the first step.

        Args:
            seeds: int64 [n] on the device.
            labels: int64 [n] on the device, or None.
            x_T: [n, C, H, W]. None: drawn from N(0, I) by the seeds.
        """
        self.rewind()
        x_t, x_0_prev, own_labels = self.x_t, self._tensors.x_0_prev, self._tensors.class_labels
        self._tensors.seeds.copy_(seeds)
        if own_labels is not None and labels is not None:
            own_labels[0] = labels
        x_t.copy_(initial_noise(x_t.shape, seeds, dtype=x_t.dtype, device=x_t.device) if x_T is None else x_T)
        if x_0_prev is not None:
            x_0_prev.zero_()
        # An alias of x_t, so that a callback can only change values and memory.
        self._shown = x_t.detach()

    def rewind(self) -> None:
        """Return to the first step without changing x_t."""
        self._tensors.step.zero_()

    def show(self, callback: Callable[[int, int, Tensor], None], step: int, timestep: int) -> None:
        """Call a callback with x_t.

        Raises:
            ValueError: It has given x_t another shape, dtype, strides or memory.
        """
        x_t, shown = self.x_t, self._shown
        callback(step, timestep, shown)
        wanted, got = ((x.dtype, list(x.shape), x.stride()) for x in (x_t, shown))
        if got != wanted or shown.data_ptr() != self._address:
            where = "" if got != wanted else " in other memory"
            kinds = (f"{dtype} {shape} with strides {strides}" for dtype, shape, strides in (wanted, got))
            expected, found = kinds
            raise InvalidValue("sample", "callback", f"to change x_t in place and leave it {expected}", f"{found}{where}")


def _advance(
    network: Model,
    dtype: torch.dtype,
    plan: SamplingPlan,
    timesteps: Tensor,
    tensors: StepTensors,
    guidance_scale: float | None,
) -> None:
    """Evaluate any network once and apply one `reverse_step`, as a `FrozenUNet`'s program does."""
    x_t, x_0_prev, labels, step = tensors.x_t, tensors.x_0_prev, tensors.class_labels, tensors.step
    version = x_t._version
    x_in = x_t.to(dtype)
    if guidance_scale is not None:
        x_in = torch.cat([x_in, x_in])
    t = timesteps.index_select(0, step).expand(len(x_in))
    model_output = predict(network, x_in, t, None if labels is None else labels.flatten())
    if x_t._version != version:
        raise InvalidValue("sample", "model", "to leave its input as it is", "one that changes x_t in place")
    reverse_step(
        x_t,
        model_output,
        step,
        plan,
        seeds=tensors.seeds if plan.is_random else None,
        x_0_prev=x_0_prev,
        guidance_scale=guidance_scale,
        return_x_0=x_0_prev is not None,
        out=x_t if x_0_prev is None else (x_t, x_0_prev),
    )
    step += 1
