"""Sampling: Algorithm 2 of Ho et al. 2020, and every other sampler that is a `SamplingPlan`."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any, Final, NamedTuple, Unpack

import torch
from torch import Tensor

from ..checks import check_ints
from ..dtypes import opmath
from ..errors import InvalidValue, expect, public, public_methods
from ..files.images import evenly_spaced
from ..inference import StepState, adapted, interface_of
from ..inference import cuda_graph as graphs
from ..inference.adapter import weights_digest
from ..inference.model import Model, evaluation_mode, inference_form
from ..inference.turns import Turns
from ..interface import Interface
from ..ops.modes import runs_eagerly, threads_after_fork
from ..options import checked, taking, within
from ..plan import SamplingPlan
from .arguments import Request, check_model, check_takes_labels, checked_request, sampling_device
from .options import Callback, DrawOptions
from .progress import progress_bar

MAX_LOOPS: Final = 4  # that a Sampler keeps: batch sizes, guidance scales, numbers of threads and streams

_logger = logging.getLogger(__name__)


class _Loop(NamedTuple):
    """Memory of a batch, the function that applies a step to it, and what a captured step uses."""

    state: StepState
    advance: Callable[[], object]
    held: object = None


@public_methods
class Sampler:
    """A network, a plan and a device, ready to draw images.

        sampler = Sampler(model, ddim_plan(schedule, 50))
        for seed in range(100):
            images = sampler(16, seed=seed)

    Image i is a function of (seed, i), its label and condition, the model and the plan. Noise is bit-identical across batch
    sizes, devices and thread counts. Images match up to floating-point rounding in the network.

    A `UNet` is frozen (see `freeze`) with the weights that it has now: later changes of the model have no effect. Any other
    model, and a `UNet` that cannot be frozen, is called unchanged, and has to be in eval mode if several Samplers share it.

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
        device: Device to run on. None: the model's device. For a module on the first GPU it is the GPU of the local rank,
            if torchrun or the like has started several processes.
        shape: (C, H, W) of an image. None: the channels that the model predicts, and `sample_size`,
            of its config.
        cuda_graph: Capture each step as a CUDA graph. None: on a GPU, for a `UNet` or its inference form.
            True: for any model. It must then compute the same from the same memory at each call and
            never wait for the GPU. False: never. If capture fails, a warning is logged and kernels are
            launched one by one.
        no_label: The label that stands for no class, for guidance. None: as the model's configuration says.

    Attributes:
        network: The network that runs: a `FrozenUNet`, the model or a copy of it.
        interface: What the network reads and gives.
        device: Device of the images.
        dtype: Dtype of the network.
        shape: (C, H, W) of an image.

    Raises:
        ValueError: An argument is out of range or does not fit the model.
        TypeError: An argument has an unsupported type.
    """

    @checked()
    def __init__(
        self,
        model: Model,
        plan: SamplingPlan,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        shape: Sequence[int] | None = None,
        cuda_graph: bool | None = None,
        no_label: Annotated[int | None, within(0, (1 << 63) - 1)] = None,
    ) -> None:
        check_model(model)
        model = inference_form(model)
        self._no_label = no_label
        if no_label is not None:
            interface_of(model).labels.check_none(no_label)
            check_takes_labels(model, "no_label", no_label)
        self.interface = self._interface_of(model, plan)
        self.shape = _checked_shape(self.interface, shape)
        self.device = sampling_device(model, device)
        may_capture = self.device.type in graphs.DEVICE_TYPES
        expect(not cuda_graph or may_capture, "cuda_graph", f"to be None or False on {self.device.type}", "True")
        with threads_after_fork(), current_device(self.device):
            self._adapter = adapted(model, self.device, dtype, plan.schedule.num_timesteps)
        self.network, self.dtype = self._adapter.model, self._adapter.dtype
        self._captures = may_capture and (self._adapter.is_frozen if cuda_graph is None else cuda_graph)
        self._state_dtype = opmath(self.dtype)
        self._set_plan(plan)

    def _set_plan(self, plan: SamplingPlan) -> None:
        self._adapter.check_plan(plan)
        self._plan = plan
        self._loops: OrderedDict[Hashable, _Loop] = OrderedDict()  # the one used last is last
        self._capture_stream: Any = None
        self._pools: dict[Hashable, Any] = {}  # memory of graphs by the stream that replays them, one after the other
        self._turns = Turns("Sampler")

    def __repr__(self) -> str:
        """Return the network, its images and the plan in two lines."""
        plan = "a plan from coefficients" if self.plan.builder is None else self.plan.builder.func.__name__
        drawn = f"images {self.shape} by a {type(self.network).__name__}, {self.dtype} on {self.device}"
        return f"Sampler: {drawn}\n{len(self.plan)} steps of {plan}"

    @property
    def plan(self) -> SamplingPlan:
        """The plan. `with_plan` takes another."""
        return self._plan

    @checked()
    def with_plan(self, plan: SamplingPlan) -> Sampler:
        """Return a Sampler with another plan and the same network.

        Raises:
            ValueError: The plan does not fit the model.
            TypeError: It is no plan.
        """
        other = object.__new__(type(self))
        vars(other).update(vars(self), interface=self._interface_of(self.network, plan))
        other.interface.check_images("shape", self.shape)
        other._set_plan(plan)
        return other

    def digest(self) -> str | None:
        """Return the SHA-256 of the network's configuration and weights, or None for a function without them."""
        return weights_digest(self.network)

    @taking(DrawOptions)
    def __call__(self, num_samples: int, **options: Unpack[DrawOptions]) -> Tensor:
        """Draw images.

        x_T is drawn from N(0, I). Each row of the plan then takes one network evaluation and one `reverse_step`
        (derivation eq. 13; Ho et al. 2020, Algorithm 2). The call does not wait for a GPU, so the images are complete only
        when the GPU is done.

        Args:
            num_samples: Number of images.
            **options: See `DrawOptions`.

        Returns:
            float32 (float64 for a float64 network) [num_samples, C, H, W] on the device, in [-1, 1] if the plan
            clips.

        Raises:
            ValueError: An argument is out of range or does not fit the model, checked before any computation. Or the
                model or the callback does what it must not.
            TypeError: An argument has an unsupported type, or is unknown.
        """
        images, _ = self.draw(self.request(num_samples, options))
        return images

    @checked()
    @taking(DrawOptions)
    def trajectory(
        self, num_samples: int, *, num_frames: Annotated[int, within(low=1)] = 51, **options: Unpack[DrawOptions]
    ) -> tuple[Tensor, Tensor]:
        """Draw images and keep the states on the way.

        Args:
            num_samples: Number of images.
            num_frames: Number of states, evenly spaced over the steps. A plan of S steps has at most S + 1.
            **options: See `DrawOptions`.

        Returns:
            The images as a call of the Sampler returns them, and the states [frames, num_samples, C, H, W] on the CPU, from
            x_T to x_0.
        """
        request = self.request(num_samples, options)
        return self.draw(request, min(num_frames, self.plan.num_steps + 1))

    def __reduce__(self) -> Any:
        raise TypeError("Sampler: it cannot be copied or pickled: make a new one from the model and the plan")

    def _interface_of(self, model: Model, plan: SamplingPlan) -> Interface:
        return interface_of(model, predicts_variance=plan.variance != "fixed", no_label=self._no_label)

    def request(self, num_samples: int, options: Any, **further: Any) -> Request:
        """Return the checked arguments of a call, for `draw` and `steps`.

        Args:
            num_samples: Number of images.
            options: Options of the call, see `DrawOptions`.
            **further: Arguments of `checked_request`. By default the classes take turns, as for new images.
        """
        given = (self.network, self.interface, self.shape, num_samples, options)
        return checked_request(*given, **{"in_turn": True} | further)

    def evaluate(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None, condition: Tensor | None = None) -> Tensor:
        """Return the network's output for checked arguments on the device, see `Adapter.evaluate`."""
        return self._adapter.evaluate(x_t, t, class_labels, condition)

    def draw(self, request: Request, num_frames: int = 0) -> tuple[Tensor, Tensor]:
        """Return the images of a request, drawn one batch after the other, and as many states of each on the CPU."""
        n, plan, device, given = request.num_samples, self.plan, self.device, request.given
        batches = [slice(i, i + given["batch_size"]) for i in range(0, n, given["batch_size"])]
        with self._turns.taken(), threads_after_fork(), current_device(device):
            images = torch.empty((n, *self.shape), dtype=self._state_dtype, device=device)
            states, frames = self._frames(n, num_frames)
            # Everything that the steps need is on the device before the first: none waits for the host.
            seeds = request.seeds.to(device)
            inputs = [None if x is None else x.to(device) for x in (request.labels, given["x_T"], given["condition"])]
            with (
                # On a GPU it counts steps as they are submitted, because the host does not wait for them.
                progress_bar(len(batches) * plan.num_steps, "sampling", "step", shown=given["progress"]) as bar,
                evaluation_mode(self.network),
                torch.inference_mode(),
            ):
                for batch in batches:
                    loop = self._loop(len(images[batch]), request)
                    loop.state.start(seeds[batch], *(None if each is None else each[batch] for each in inputs))
                    self._run(loop, {i: frame[batch] for i, frame in frames.items()}, given["callback"], bar)
                    images[batch] = loop.state.x_t
        if num_frames and device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # the frames are on their way to the host
        return images, states

    @contextmanager
    def steps(self, request: Request, timesteps: Tensor) -> Iterator[tuple[StepState, Callable[[], object]]]:
        """Yield the state of a request in front of its first step, and a function that takes the next step in it.

        Args:
            request: What to draw, as one batch.
            timesteps: Floating [steps], where the network is evaluated instead of at those of the plan.
        """
        given, device = request.given, self.device
        inputs = (request.labels, given["x_T"], given["condition"])
        with self._turns.taken(), current_device(device), evaluation_mode(self.network), torch.inference_mode():
            state = self._new_state(request.num_samples, request)
            advance = self._adapter.bind_at(timesteps, self.plan, state, given["guidance_scale"])
            state.start(request.seeds.to(device), *(None if x is None else x.to(device) for x in inputs))
            yield state, advance

    def _frames(self, n: int, num_frames: int) -> tuple[Tensor, dict[int, Tensor]]:
        """Return memory for states of n images, and the part of it for each kept state.

        States have numbers: 0 is x_T, num_steps is x_0.
        """
        kept = evenly_spaced(self.plan.num_steps + 1, num_frames) if num_frames else []
        # A GPU writes to pinned memory by itself, while the host goes on.
        shape, pinned = (len(kept), n, *self.shape), self.device.type == "cuda"
        states = torch.empty(shape, dtype=self._state_dtype, pin_memory=pinned, device="cpu")
        return states, dict(zip(kept, states, strict=True))

    def _run(self, loop: _Loop, frames: dict[int, Tensor], callback: Callback | None, bar: Any) -> None:
        """Run all steps of a batch."""
        state, advance, timesteps = loop.state, loop.advance, self.plan.timesteps.tolist()
        if self._adapter.is_frozen and torch.is_autocast_enabled(self.device.type):
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
        if not (self._adapter.is_frozen or self._captures) or not runs_eagerly():
            return self._new_loop(n, request)
        # Work on two streams may overlap, so each stream has its own loops and memory.
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        threads = torch.get_num_threads() if self.device.type == "cpu" else None
        inputs = (request.no_label is None, request.given["guidance_scale"], request.condition_channels)
        key = (n, *inputs, threads, graphs.settings(), stream)
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
        state = self._new_state(n, request)
        return _Loop(state, self._adapter.bind(self.plan, state, request.given["guidance_scale"]))

    def _new_state(self, n: int, request: Request) -> StepState:
        return StepState(
            self.plan,
            (n, *self.shape),
            dtype=self._state_dtype,
            memory_format=self._adapter.memory_format(self.shape),
            device=self.device,
            no_label=request.no_label,
            guided=request.given["guidance_scale"] is not None,
            condition_channels=request.condition_channels,
        )

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
        weights = self._adapter.parameters()
        try:
            # Weights that autocast has cast once and kept would be gone by the time of a replay.
            casts = torch.is_autocast_enabled(kind) and not self._adapter.is_frozen
            with torch.autocast(kind, torch.get_autocast_dtype(kind), casts, cache_enabled=False):
                replay = graphs.capture(rehearse, advance, self._capture_stream, self._pools.get(stream))
        except graphs.CaptureError as error:
            self._pools.pop(stream, None)  # torch may take it for one that is still recorded to
            _logger.warning("sample: steps are launched one kernel at a time, as there can be no CUDA graph: %s", error)
            return loop
        return _Loop(state, replay, (advance, weights))


@public()
@taking(DrawOptions)
def sample(
    model: Model,
    plan: SamplingPlan,
    num_samples: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    shape: Sequence[int] | None = None,
    cuda_graph: bool | None = None,
    no_label: int | None = None,
    **options: Unpack[DrawOptions],
) -> Tensor:
    """Draw images from a model: make a `Sampler`, call it and drop it.

    In a loop, make one `Sampler` and call it: a `UNet` is then frozen once, and on a GPU a step is captured once.

    Args:
        model: See `Sampler`.
        plan: See `Sampler`.
        num_samples: Number of images.
        dtype: See `Sampler`.
        device: See `Sampler`.
        shape: See `Sampler`.
        cuda_graph: See `Sampler`.
        no_label: See `Sampler`.
        **options: See `DrawOptions`.

    Returns:
        float32 (float64 for a float64 network) [num_samples, C, H, W] on the device, in [-1, 1] if the plan clips.

    Raises:
        ValueError: An argument is out of range or does not fit the model, checked before any computation.
        TypeError: An argument has an unsupported type, or is unknown.
    """
    sampler = Sampler(model, plan, dtype=dtype, device=device, shape=shape, cuda_graph=cuda_graph, no_label=no_label)
    request = sampler.request(num_samples, options)
    images, _ = sampler.draw(request)
    return images


def current_device(device: torch.device) -> Any:
    """Return a context in which this GPU is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _checked_shape(interface: Interface, shape: Sequence[int] | None) -> tuple[int, ...]:
    """Return the shape (C, H, W) of an image that the network draws."""
    shape = interface.shape if shape is None else shape
    if shape is None:
        raise InvalidValue("shape", "to be (C, H, W), as the model has no config with in_channels and sample_size", "None")
    check_ints("shape", shape, 1, "integers (C, H, W)")
    interface.check_images("shape", shape)
    return tuple(shape)
