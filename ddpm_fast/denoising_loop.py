"""The sampling loop on a device: the same launches on the same memory at every step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import InvalidValue
from .models import Model, predict
from .ops import initial_noise, reverse_step
from .plan import SamplingPlan


class DenoisingLoop:
    """Memory for sampling n images at a time.

    `start` fills it. Each `advance` applies one step of the plan. `advance` reads the step's index from
    device memory and never synchronizes. One CUDA graph therefore serves every step of every batch.

    Args:
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
        replay: Replays a captured `advance`, or None.
        held: Tensors whose memory a captured `advance` uses.
    """

    def __init__(
        self,
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
        self._plan, self._network_dtype, self._guidance_scale = plan, network_dtype, guidance_scale
        n, halves = shape[0], 1 if guidance_scale is None else 2
        with torch.inference_mode(False):  # ordinary tensors, which outlive the mode
            self.x_t = torch.zeros(shape, dtype=state_dtype, device=device).contiguous(memory_format=memory_format)
            self._x_0 = torch.zeros_like(self.x_t) if plan.needs_x_0_prev else None
            self._seeds = torch.zeros(n, dtype=torch.int64, device=device)
            self._labels = None if label is None else torch.full((halves * n,), label, device=device)
            self._step = torch.zeros((), dtype=torch.int64, device=device)
            self._timesteps = plan.timesteps.to(device)
            plan.table(device)  # in place before a capture looks
        self.replay: Callable[[], None] | None = None
        self.held: list[Tensor] = []

    def start(self, seeds: Tensor, labels: Tensor | None, x_T: Tensor | None = None) -> None:
        """Set x_T and return to the first step.

        Args:
            seeds: int64 [n] on the device.
            labels: int64 [n] on the device, or None.
            x_T: [n, C, H, W]. None: drawn from N(0, I) by the seeds.
        """
        self.rewind()
        self._seeds.copy_(seeds)
        if self._labels is not None and labels is not None:
            self._labels[: len(labels)] = labels
        x_t = self.x_t
        x_t.copy_(initial_noise(x_t.shape, self._seeds, dtype=x_t.dtype, device=x_t.device) if x_T is None else x_T)
        if self._x_0 is not None:
            self._x_0.zero_()

    def rewind(self) -> None:
        """Return to the first step without changing x_t."""
        self._step.zero_()

    def advance(self, network: Model) -> None:
        """Evaluate the network once and apply one `reverse_step`."""
        x_t, plan, version = self.x_t, self._plan, self.x_t._version
        x_in = x_t.to(self._network_dtype)
        if self._guidance_scale is not None:
            x_in = torch.cat([x_in, x_in])
        t = self._timesteps.index_select(0, self._step.view(1)).expand(len(x_in))
        x_0 = self._x_0  # x_0^ before the step, and after it
        model_output = predict(network, x_in, t, self._labels)
        if x_t._version != version:
            raise InvalidValue("sample", "model", "to leave its input as it is", "one that changes x_t in place")
        reverse_step(
            x_t,
            model_output,
            self._step,
            plan,
            seeds=self._seeds if plan.is_random else None,
            x_0_prev=x_0,
            guidance_scale=self._guidance_scale,
            return_x_0=x_0 is not None,
            out=x_t if x_0 is None else (x_t, x_0),
        )
        self._step += 1
