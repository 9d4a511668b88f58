"""The memory that a sampling step reads and writes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InvalidValue
from ..ops import initial_noise
from ..plan import SamplingPlan


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
        no_label: Label of every sample until `start` sets others, and of the unconditional half with
            guidance, [1, ...]. None: the network gets no labels.
        guided: The network evaluates 2 n samples, the second half without labels.
        condition_channels: Channels of the condition that the network reads after x_t.

    Attributes:
        x_t: [n, C, H, W], replaced by x_{t-1}: x_T after `start`, x_0 after the last step.
        history: x_0_prev and x_0_prev2, as far as the plan uses them, like x_t. The step updates them.
        x_0: Destination of the step's x_0^. It is x_0_prev itself, unless the step copies x_0_prev to x_0_prev2. None: the
            plan does not use x_0^ again.
        seeds: int64 [n].
        class_labels: [1, n, ...], or [2, n, ...] with guidance: of the conditional half, then of the other. None: no labels.
        step: int64 [1], the number of the step, which the step counts up.
        copies: Samples that the network evaluates for each image, 2 with guidance.
        condition_channels: As given.
    """

    def __init__(
        self,
        plan: SamplingPlan,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        device: torch.device,
        no_label: Tensor | None,
        guided: bool,
        condition_channels: int = 0,
    ) -> None:
        n, self.copies, self.condition_channels = shape[0], 2 if guided else 1, condition_channels
        with torch.inference_mode(False):  # ordinary tensors, which outlive the mode
            self.x_t = torch.zeros(shape, dtype=dtype, device=device).contiguous(memory_format=memory_format)
            self.history = [torch.zeros_like(self.x_t) for needed in (plan.needs_x_0_prev, plan.needs_x_0_prev2) if needed]
            self.x_0 = torch.zeros_like(self.x_t) if plan.needs_x_0_prev2 else self.history[0] if self.history else None
            self.seeds = torch.zeros(n, dtype=torch.int64, device=device)
            rest = [] if no_label is None else [1] * (no_label.dim() - 1)
            self.class_labels = None if no_label is None else no_label.to(device).repeat(self.copies, n, *rest)
            self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self._memory_format = memory_format
        self._address = self.x_t.data_ptr()
        self._conditions: list[tuple[Tensor, slice, bool]] = []

    def condition(self, images: slice, dtype: torch.dtype, *, centered: bool = False, after_x_t: bool = False) -> Tensor:
        """Make memory for the condition of some images, which `start` writes, as the network reads it.

        Args:
            images: The images.
            dtype: Dtype of the network's input.
            centered: Hold 2 c - 1, as networks with `center_input_sample` read it.
            after_x_t: Lie behind x_t in one map, as most networks read it.

        Returns:
            [n, K, H, W], or [n, C + K, H, W] with `after_x_t`. With guidance n is twice the number of images.
        """
        x_t = self.x_t[images]
        channels = x_t.shape[1] if after_x_t else 0
        shape = (self.copies * len(x_t), channels + self.condition_channels, *x_t.shape[2:])
        with torch.inference_mode(False):
            memory = torch.zeros(shape, dtype=dtype, device=x_t.device).contiguous(memory_format=self._memory_format)
            self._conditions.append((memory[:, channels:], images, centered))
        return memory

    @property
    def is_intact(self) -> bool:
        """True if x_t is where steps read it. A callback that kept x_t may have replaced its memory."""
        return self.x_t.data_ptr() == self._address

    def start(self, seeds: Tensor, labels: Tensor | None, x_T: Tensor | None = None, condition: Tensor | None = None) -> None:
        """Set x_T and return to the first step.

        Args:
            seeds: int64 [n] on the device.
            labels: Labels [n, ...] on the device, or None.
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
                "callback", f"to change x_t in place, or a clone of it, and leave it {expected}", f"{got}{where}"
            )


def write_beside_condition(joint: Tensor, x_t: Tensor, *, centered: bool = False) -> None:
    """Write x_t [n, C, H, W] to the first channels of [n, C + K, H, W], or of both halves of guidance's [2 n, C + K, H, W].

    Args:
        joint: Input of a network that reads a condition, which the last channels hold.
        x_t: The state.
        centered: Write 2 x - 1.
    """
    x = x_t.to(joint.dtype)
    joint.unflatten(0, (-1, len(x)))[:, :, : x.shape[1]].copy_(2 * x - 1 if centered else x)
