"""Sampling: Algorithm 2 of Ho et al. 2020, and every other sampler that is a `SamplingPlan`."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_int
from ..dtypes import opmath
from ..files.images import evenly_spaced
from ..inference import FrozenUNet, StepState, frozen_step, inference_network, step_by_any_network
from ..inference import cuda_graph as graphs
from ..inference.model import Model, device_and_dtype, evaluation_mode
from ..inference.turns import Turns
from ..ops.modes import runs_eagerly, threads_after_fork
from ..plan import SamplingPlan
from .arguments import Callback, ClassLabels, Request, checked_request, checked_setup
from .progress import progress_bar

MAX_LOOPS: Final = 4  # that a Sampler keeps: batch sizes, guidance scales, numbers of threads and streams

_logger = logging.getLogger(__name__)


class _Loop(NamedTuple):
    """Memory of a batch, the function that applies a step to it, and what a captured step uses."""

    state: StepState
    advance: Callable[[], object]
    held: object = None


class Sampler:
    """A network, a plan and a device, ready to draw images.

        sampler = Sampler(model, ddim_plan(schedule, 50))
        for seed in range(100):
            images = sampler(16, seed=seed)

    It does once what `sample` does at every call. A `UNet` is frozen (see `freeze`) with the weights that it
    has now: later changes of the model have no effect. Any other model, and a `UNet` that cannot be frozen, is
    called as it is, and has to be in eval mode if several Samplers share it.

    A step of a frozen network is one program, from x_t to x_{t-1}. On a GPU it is captured as a CUDA graph. The
    four programs used last are kept. They differ by batch size, guidance scale, number of threads and stream.

    Threads that call a Sampler at once take turns. A forked child draws with one thread.

    Args:
        model: Called as model(x_t, t), or model(x_t, t, class_labels) if it has classes, with x_t
            [N, C, H, W] and t int64 [N]. A condition stands after x_t: the model then reads [N, C + K, H, W]. It
            returns what the plan's `prediction` says, as a tensor or as `.sample` of an object. It runs in eval
            mode and is not modified. If its weights are channels_last, so is its input.
        plan: From `ddpm_plan`, `ddim_plan`, ...
        dtype: Dtype of the network. x_t stays float32 (float64 for a float64 network). If device or dtype
            differ from the model's, a copy of the model is used. None: the model's dtype, but a float32
            `UNet` runs in bfloat16 on a GPU, or in float16 without bfloat16 support. Pass torch.float32
            to keep float32.
        device: Device to run on. None: the model's device.
        shape: (C, H, W) of an image. None: the channels that the model predicts, and `sample_size`,
            of its config.
        cuda_graph: Capture each step as a CUDA graph. None: on a GPU, for a `UNet` or its inference form.
            True: for any model. It must then compute the same from the same memory at each call and
            never wait for the GPU. False: never. If capture fails, a warning is logged and kernels are
            launched one by one.

    Attributes:
        network: The network that runs: a `FrozenUNet`, the model or a copy of it.
        plan: The plan.
        device: Device of the images.
        dtype: Dtype of the network.
        shape: (C, H, W) of an image.

    Raises:
        ValueError: An argument is out of range or does not fit the model.
        TypeError: An argument has an unsupported type.
    """

    def __init__(
        self,
        model: Model,
        plan: SamplingPlan,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        shape: Sequence[int] | None = None,
        cuda_graph: bool | None = None,
    ) -> None:
        self.plan = plan
        self.shape, self.device = checked_setup("Sampler", model, plan, dtype, device, shape, cuda_graph)
        with threads_after_fork(), _on(self.device):
            self.network = inference_network("Sampler", model, self.device, dtype, plan.schedule.num_timesteps)
        _, self.dtype = device_and_dtype(self.network)
        # Other models may not compute the same from the same memory each time.
        wanted = isinstance(self.network, FrozenUNet) if cuda_graph is None else cuda_graph
        self._captures = wanted and self.device.type in graphs.DEVICE_TYPES
        self._state_dtype = opmath(self.dtype)
        self._loops: OrderedDict[Hashable, _Loop] = OrderedDict()  # the one used last is last
        self._capture_stream: Any = None
        self._pools: dict[Hashable, Any] = {}  # memory of graphs by the stream that replays them, one after the other
        self._turns = Turns("Sampler")

    def __call__(
        self,
        num_samples: int,
        *,
        seed: int | Tensor = 0,
        batch_size: int | None = None,
        class_labels: ClassLabels = None,
        guidance_scale: float | None = None,
        x_T: Tensor | None = None,
        condition: Tensor | None = None,
        progress: bool = True,
        callback: Callback | None = None,
    ) -> Tensor:
        """Draw images. Arguments and result are those of `sample`."""
        request = checked_request(
            *("Sampler", self.network, self.device, self.shape, num_samples),
            seed=seed,
            batch_size=batch_size,
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            x_T=x_T,
            condition=condition,
            progress=progress,
            callback=callback,
        )
        images, _ = self._draw(request)
        return images

    def trajectory(
        self,
        num_samples: int,
        *,
        num_frames: int = 51,
        seed: int | Tensor = 0,
        batch_size: int | None = None,
        class_labels: ClassLabels = None,
        guidance_scale: float | None = None,
        x_T: Tensor | None = None,
        condition: Tensor | None = None,
        progress: bool = True,
        callback: Callback | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw images and keep the states on the way.

        Args:
            num_samples: See `sample`.
            num_frames: Number of states, evenly spaced over the steps. A plan of S steps has at most S + 1.
            seed: See `sample`.
            batch_size: See `sample`.
            class_labels: See `sample`.
            guidance_scale: See `sample`.
            x_T: See `sample`.
            condition: See `sample`.
            progress: See `sample`.
            callback: See `sample`.

        Returns:
            The images as `sample` returns them, and the states [frames, num_samples, C, H, W] on the CPU, from
            x_T to x_0.
        """
        check_int("Sampler.trajectory", "num_frames", num_frames, 1)
        request = checked_request(
            *("Sampler.trajectory", self.network, self.device, self.shape, num_samples),
            seed=seed,
            batch_size=batch_size,
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            x_T=x_T,
            condition=condition,
            progress=progress,
            callback=callback,
            num_frames=min(num_frames, self.plan.num_steps + 1),
        )
        images, states = self._draw(request, num_frames)
        assert states is not None
        return images, states

    def __reduce__(self) -> Any:
        raise TypeError("Sampler: it cannot be copied or pickled: make a new one from the model and the plan")

    def _draw(self, request: Request, num_frames: int = 0) -> tuple[Tensor, Tensor | None]:
        """Draw the images of a request, one batch after the other, and as many states of each."""
        n, plan, device = request.num_samples, self.plan, self.device
        batches = [slice(i, i + request.batch_size) for i in range(0, n, request.batch_size)]
        with self._turns.taken(), threads_after_fork(), _on(device):
            images = torch.empty((n, *self.shape), dtype=self._state_dtype, device=device)
            states, frames = self._frames(n, num_frames)
            # Everything that the steps need is on the device before the first: none waits for the host.
            seeds = request.seeds.to(device)
            given = (request.labels, request.x_T, request.condition)
            inputs = [None if each is None else each.to(device) for each in given]
            with (
                # On a GPU it counts the steps handed over: the host would have to wait to know how many are done.
                progress_bar(len(batches) * plan.num_steps, "sampling", "step", shown=request.progress) as bar,
                evaluation_mode(self.network),
                torch.inference_mode(),
            ):
                for batch in batches:
                    loop = self._loop(len(images[batch]), request)
                    loop.state.start(seeds[batch], *(None if each is None else each[batch] for each in inputs))
                    self._run(loop, {i: frame[batch] for i, frame in frames.items()}, request.callback, bar)
                    images[batch] = loop.state.x_t
        if states is not None and device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # the frames are on their way to the host
        return images, states

    def _frames(self, n: int, num_frames: int) -> tuple[Tensor | None, dict[int, Tensor]]:
        """Return memory for states of n images, and the part of it for each kept state.

        States have numbers: 0 is x_T, num_steps is x_0.
        """
        if not num_frames:
            return None, {}
        kept = evenly_spaced(self.plan.num_steps + 1, num_frames)
        # A GPU writes to pinned memory by itself, while the host goes on.
        shape, pinned = (len(kept), n, *self.shape), self.device.type == "cuda"
        states = torch.empty(shape, dtype=self._state_dtype, pin_memory=pinned, device="cpu")
        return states, dict(zip(kept, states, strict=True))

    def _run(self, loop: _Loop, frames: dict[int, Tensor], callback: Callback | None, bar: Any) -> None:
        """Run all steps of a batch."""
        state, advance, timesteps = loop.state, loop.advance, self.plan.timesteps.tolist()
        if isinstance(self.network, FrozenUNet) and torch.is_autocast_enabled(self.device.type):
            advance = torch.autocast(self.device.type, enabled=False)(advance)  # each layer has its dtype
        for i, timestep in enumerate(timesteps):
            if i in frames:
                frames[i].copy_(state.x_t, non_blocking=True)
            advance()
            if callback is not None:
                state.show(callback, i, timestep)
            bar.update()
        if len(timesteps) in frames:
            frames[len(timesteps)].copy_(state.x_t, non_blocking=True)

    def _loop(self, n: int, request: Request) -> _Loop:
        """Return the loop for n images of a request: one that was kept, or a new one, captured if the Sampler captures."""
        if not (isinstance(self.network, FrozenUNet) or self._captures) or not runs_eagerly():
            return self._new_loop(n, request)
        # Work on two streams may overlap, so each stream has its own loops and memory.
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        threads = torch.get_num_threads() if self.device.type == "cpu" else None
        inputs = (request.label is None, request.guidance_scale, request.condition_channels)
        key = (n, *inputs, self.network, self.plan, self.shape, threads, graphs.settings(), stream)
        loop = self._loops.pop(key, None)
        if loop is None or not loop.state.is_intact:
            if len(self._loops) == MAX_LOOPS:
                self._loops.popitem(last=False)
            loop = self._new_loop(n, request)
            if self._captures:
                loop = self._captured(loop, stream)
        self._loops[key] = loop
        return loop

    def _new_loop(self, n: int, request: Request) -> _Loop:
        plan, network, guidance_scale = self.plan, self.network, request.guidance_scale
        memory_format = _memory_format(network, self.shape)
        state = StepState(
            plan,
            (n, *self.shape),
            dtype=self._state_dtype,
            memory_format=memory_format,
            device=self.device,
            label=request.label,
            guidance_scale=guidance_scale,
        )
        if type(network) is FrozenUNet and runs_eagerly():
            return _Loop(state, frozen_step(network, plan, state, guidance_scale))
        plan.table(self.device)  # in place before a capture looks
        timesteps = plan.timesteps.to(self.device)
        joint = None
        if request.condition_channels:
            copies, channels = 1 if guidance_scale is None else 2, self.shape[0]
            shape = (copies * n, channels + request.condition_channels, *self.shape[1:])
            with torch.inference_mode(False):  # an ordinary tensor, as those of the state
                joint = torch.zeros(shape, dtype=self.dtype, device=self.device).contiguous(memory_format=memory_format)
                state.add_condition(joint[:, channels:], slice(n))
        return _Loop(state, partial(step_by_any_network, network, self.dtype, plan, timesteps, state, guidance_scale, joint))

    def _captured(self, loop: _Loop, stream: Hashable) -> _Loop:
        """Return the loop with a CUDA graph of its step, or unchanged if there can be none."""
        kind, state, advance = self.device.type, loop.state, loop.advance

        def rehearse() -> None:
            state.step.zero_()
            advance()

        if kind == "cuda":
            self._capture_stream = self._capture_stream or torch.cuda.Stream(self.device)
            if stream not in self._pools:
                self._pools[stream] = torch.cuda.graph_pool_handle()
        # The graph uses the addresses of constants and weights.
        weights = [*self.network.parameters(), *self.network.buffers()] if isinstance(self.network, nn.Module) else []
        try:
            # Weights that autocast has cast once and kept would be gone by the time of a replay.
            casts = torch.is_autocast_enabled(kind) and not isinstance(self.network, FrozenUNet)
            with torch.autocast(kind, torch.get_autocast_dtype(kind), casts, cache_enabled=False):
                replay = graphs.capture(rehearse, advance, self._capture_stream, self._pools.get(stream))
        except graphs.CaptureError as error:
            self._pools.pop(stream, None)  # torch may take it for one that is still recorded to
            _logger.warning("sample: steps are launched one kernel at a time, as there can be no CUDA graph: %s", error)
            return loop
        return _Loop(state, replay, (advance, weights))


def sample(
    model: Model,
    plan: SamplingPlan,
    num_samples: int,
    *,
    seed: int | Tensor = 0,
    batch_size: int | None = None,
    class_labels: ClassLabels = None,
    guidance_scale: float | None = None,
    x_T: Tensor | None = None,
    condition: Tensor | None = None,
    progress: bool = True,
    callback: Callback | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    shape: Sequence[int] | None = None,
    cuda_graph: bool | None = None,
) -> Tensor:
    """Draw images from a model.

    x_T is drawn from N(0, I). Each row of the plan then takes one network evaluation and one `reverse_step`
    (derivation eq. 13; Ho et al. 2020, Algorithm 2).

    Image i is a function of (seed, i), the model and the plan. Noise is bit-identical across batch sizes,
    devices and thread counts. Images match up to floating-point rounding in the network.

    The call makes a `Sampler`, uses it and drops it. In a loop, make one `Sampler` and call it: a `UNet` is
    then frozen once, and on a GPU a step is captured once.

    A `UNet` runs in its inference form (see `freeze`), which ignores autocast. On a GPU it is bfloat16 by
    default and each step is one CUDA graph. The call does not wait for the GPU, so the images are complete
    only when the GPU is done.

    Args:
        model: See `Sampler`.
        plan: From `ddpm_plan`, `ddim_plan`, ...
        num_samples: Number of images.
        seed: An int, or int64 [num_samples] with a seed per image: `sample_seeds(0, 16)[5:6]` draws image 5
            of seed 0 alone.
        batch_size: Images per network evaluation. None: all.
        class_labels: One class for all images, or one per image: a number, or a name in the model's
            `class_names`. None, for a model with classes: its "no label" class, the last of
            `num_class_embeds` in its config.
        guidance_scale: Scale w of classifier-free guidance, m = m_u + w (m_c - m_u), with m_u the prediction
            for "no label". None or 1: the conditional prediction alone, at half the cost.
        x_T: Initial states [num_samples, C, H, W], floating, instead of noise drawn from the seed.
        condition: Floating [num_samples, K, H, W], for a model of C + K input channels, such as images to enlarge or to
            colour. The model reads it after x_t, in both halves of guidance. None: the model reads x_t alone.
        progress: Show a progress bar.
        callback: Called as callback(step, timestep, x_t) after each step of each batch: the number of the step
            from 0, its timestep, and the state [n, C, H, W] after it, which may be channels_last. The call is in
            inference mode. Clone the state to keep it. A change of its
            values in place takes effect. Another shape, dtype, strides or memory is an error. An exception ends
            the sampling.
        dtype: See `Sampler`.
        device: Device to run on. None: the model's device.
        shape: See `Sampler`.
        cuda_graph: See `Sampler`.

    Returns:
        float32 (float64 for a float64 network) [num_samples, C, H, W] on the device, in [-1, 1] if the plan
        clips.

    Raises:
        ValueError: An argument is out of range or does not fit the model, checked before any computation. Or the
            model or the callback does what it must not.
        TypeError: An argument has an unsupported type.
    """
    shape, device = checked_setup("sample", model, plan, dtype, device, shape, cuda_graph)
    request = checked_request(
        *("sample", model, device, shape, num_samples),
        seed=seed,
        batch_size=batch_size,
        class_labels=class_labels,
        guidance_scale=guidance_scale,
        x_T=x_T,
        condition=condition,
        progress=progress,
        callback=callback,
    )
    sampler = Sampler(model, plan, dtype=dtype, device=device, shape=shape, cuda_graph=cuda_graph)
    images, _ = sampler._draw(request)
    return images


def _on(device: torch.device) -> Any:
    """Return a context in which this GPU is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _memory_format(model: Model, shape: Sequence[int]) -> torch.memory_format:
    """Return channels_last for images if the model's convolution weights are, else contiguous_format."""
    weights = [p for p in model.parameters() if p.dim() == 4 and not p.is_contiguous()] if isinstance(model, nn.Module) else []
    suits = isinstance(model, FrozenUNet) or any(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    return torch.channels_last if suits and len(shape) == 3 else torch.contiguous_format
