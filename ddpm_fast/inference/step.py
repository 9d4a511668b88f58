"""A sampling step: the memory that it reads and writes, and how any network takes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidValue
from ..ops import initial_noise, reverse_step
from ..plan import SamplingPlan
from .model import Model, predict


class StepState:
    """Tensors that the steps of n images read and write.

    Steps are bound to the memory of these tensors, and read the number of the step from it. One program or one CUDA
    graph therefore serves every step of every batch.

    Args:
        plan: Plan of the sampler.
        shape: [n, C, H, W].
        dtype: Dtype of x_t.
        memory_format: Memory format of x_t.
        device: Device to run on.
        label: Label of every sample until `start` sets others, and of the unconditional half with
            guidance. None: the network gets no labels.
        guidance_scale: None: no guidance. Otherwise the network evaluates 2 n samples, the second half
            without labels.

    Attributes:
        x_t: [n, C, H, W], replaced by x_{t-1}: x_T after `start`, x_0 after the last step.
        history: x_0_prev and x_0_prev2, as far as the plan uses them, like x_t. The step updates them.
        x_0: Destination of the step's x_0^. It is x_0_prev itself, unless the step copies x_0_prev to x_0_prev2. None: the
            plan does not use x_0^ again.
        seeds: int64 [n].
        class_labels: int64 [1, n], or [2, n] with guidance: of the conditional half, then of the other. None: no labels.
        step: int64 [1], the number of the step, which the step counts up.
    """

    def __init__(
        self,
        plan: SamplingPlan,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        device: torch.device,
        label: int | None,
        guidance_scale: float | None,
    ) -> None:
        n, halves = shape[0], 1 if guidance_scale is None else 2
        with torch.inference_mode(False):  # ordinary tensors, which outlive the mode
            self.x_t = torch.zeros(shape, dtype=dtype, device=device).contiguous(memory_format=memory_format)
            self.history = [torch.zeros_like(self.x_t) for needed in (plan.needs_x_0_prev, plan.needs_x_0_prev2) if needed]
            self.x_0 = torch.zeros_like(self.x_t) if plan.needs_x_0_prev2 else self.history[0] if self.history else None
            self.seeds = torch.zeros(n, dtype=torch.int64, device=device)
            self.class_labels = None if label is None else torch.full((halves, n), label, device=device)
            self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self._address = self.x_t.data_ptr()
        self._conditions: list[tuple[Tensor, slice, bool]] = []

    def add_condition(self, memory: Tensor, images: slice, *, centered: bool = False) -> None:
        """Let `start` write the condition of some images to memory that steps read.

        Args:
            memory: [n, K, H, W], or [2 n, K, H, W] with guidance, for n images.
            images: The images.
            centered: Write 2 c - 1, as networks with `center_input_sample` read it.
        """
        self._conditions.append((memory, images, centered))

    @property
    def is_intact(self) -> bool:
        """True if x_t is where steps read it. A callback that kept x_t may have replaced its memory."""
        return self.x_t.data_ptr() == self._address

    def start(self, seeds: Tensor, labels: Tensor | None, x_T: Tensor | None = None, condition: Tensor | None = None) -> None:
        """Set x_T and return to the first step.

        Args:
            seeds: int64 [n] on the device.
            labels: int64 [n] on the device, or None.
            x_T: [n, C, H, W]. None: drawn from N(0, I) by the seeds.
            condition: [n, K, H, W], or None for a network that reads x_t alone.
        """
        x_t = self.x_t
        self.step.zero_()
        self.seeds.copy_(seeds)
        if self.class_labels is not None and labels is not None:
            self.class_labels[0] = labels
        x_t.copy_(initial_noise(x_t.shape, seeds, dtype=x_t.dtype, device=x_t.device) if x_T is None else x_T)
        for x_0 in self.history:
            x_0.zero_()
        for memory, images, centered in self._conditions:
            assert condition is not None
            part = condition[images].to(memory.dtype)
            memory.unflatten(0, (-1, len(part))).copy_(2 * part - 1 if centered else part)  # to both halves with guidance
        self._shown = x_t.detach()  # an alias, so that a callback cannot change the shape and strides of x_t

    def show(self, callback: Callable[[int, int, Tensor], None], step: int, timestep: int) -> None:
        """Call a callback with x_t.

        Raises:
            ValueError: It has given x_t another shape, dtype, strides or memory.
        """
        x_t, shown = self.x_t, self._shown
        torch.autograd.graph.increment_version(shown)  # autograd does not see what a step writes
        callback(step, timestep, shown)
        same = shown.data_ptr() == self._address
        if not same or (shown.shape, shown.stride(), shown.dtype) != (x_t.shape, x_t.stride(), x_t.dtype):
            expected, got = (f"{x.dtype} {list(x.shape)} with strides {x.stride()}" for x in (x_t, shown))
            where = "" if same else " in other memory"
            raise InvalidValue(
                "sample", "callback", f"to change x_t in place, or a clone of it, and leave it {expected}", f"{got}{where}"
            )


def write_beside_condition(joint: Tensor, x_t: Tensor, *, centered: bool = False) -> None:
    """Write x_t [n, C, H, W] to the first channels of [n, C + K, H, W], or to both halves of [2 n, C + K, H, W].

    Args:
        joint: Input of a network that reads a condition, which the last channels hold.
        x_t: The state.
        centered: Write 2 x - 1.
    """
    x = x_t.to(joint.dtype)
    joint.unflatten(0, (-1, len(x)))[:, :, : x.shape[1]].copy_(2 * x - 1 if centered else x)


def step_by_any_network(
    network: Model,
    dtype: torch.dtype,
    plan: SamplingPlan,
    timesteps: Tensor,
    state: StepState,
    guidance_scale: float | None,
    joint: Tensor | None = None,
) -> None:
    """Evaluate a network once and apply one `reverse_step`.

    Args:
        network: The network.
        dtype: Dtype of its input.
        plan: The plan.
        timesteps: Its timesteps on the device.
        state: Memory of the step.
        guidance_scale: None: no guidance.
        joint: [n, C + K, H, W], or [2 n, C + K, H, W] with guidance: memory of the network's input, with the condition
            behind x_t. None: there is no condition.

    Raises:
        ValueError: The network changes its input, or its output does not fit.
    """
    x_t, x_0, labels = state.x_t, state.x_0, state.class_labels
    history: Any = dict(zip(("x_0_prev", "x_0_prev2"), state.history, strict=False))
    if joint is not None:
        write_beside_condition(joint, x_t)
    kept = x_t if joint is None else joint
    version = kept._version
    x_in = kept.detach().to(dtype)  # an alias, so that the network cannot change the shape and strides of x_t
    if guidance_scale is not None and joint is None:
        x_in = torch.cat([x_in, x_in])
    t = timesteps.index_select(0, state.step).expand(len(x_in))
    model_output = predict(network, x_in, t, None if labels is None else labels.flatten())
    if kept._version != version:
        raise InvalidValue("sample", "model", "to leave its input as it is", "one that changes x_t in place")
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
