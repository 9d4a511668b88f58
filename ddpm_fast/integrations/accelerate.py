"""`accelerate`: run a diffusers pipeline with this package's network and scheduler."""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..checks import check_choice, check_dtype, check_type
from ..errors import InvalidType, InvalidValue
from ..inference import FrozenUNet, freeze
from ..models import Model
from ..nn import UNet, UNetConfig
from ..nn.layers import ResnetBlock
from ..ops import sample_seeds
from . import needs_extra
from .class_swap import Swapped, own_class, swap, unswap
from .fingerprint import attributes_digest, weights_hash, why_layers_differ

_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "DDIMInverseScheduler")


def accelerate(
    pipe: Any, *, dtype: torch.dtype | None = None, noise: Literal["torch", "philox"] = "torch", freeze: bool = True
) -> Any:
    """Make a diffusers `DDPMPipeline` or `DDIMPipeline` use this package's kernels.

    The call, its arguments, its progress bar and its results stay the same. The same generator gives the
    same images up to rounding in the network. Its scheduler may be a DDPMScheduler, DDIMScheduler,
    DPMSolverMultistepScheduler or DDIMInverseScheduler, as far as the pipeline's own call takes it.
    `pipe.unet` is still a `UNet2DModel` with the same parameters, which are not copied.
    `pipe.save_pretrained` writes the same files as before. `restore` reverts everything.

    Later changes of weights, layers, hooks and the configuration take effect. Each call of the pipeline, or
    of `pipe.unet` outside one, compares all of them once. Do not change the network during a call. If no
    `ddpm_fast.UNet` computes the same any more, diffusers computes the network. A RuntimeWarning names the
    reason.

    Args:
        pipe: Pipeline, modified in place. Its network may be on any device, in any floating dtype, and may
            be trained between calls.
        dtype: Dtype of the frozen network. None: the pipeline's. Images between steps keep the
            pipeline's dtype.
        noise: "torch" draws from the generator in diffusers' order. "philox" gives each image its own seed.
            The seed comes from the image's generator. If all images share one generator, seeds are
            derived (`ddpm_fast.sample_seeds`) from one number of it. An image is then the same in
            any batch and on any device. Noise of the steps is never stored.
        freeze: Evaluate the network in its inference form (`ddpm_fast.freeze`), kept between calls until the
            network changes. It has no dropout and no gradients. If gradients are recorded, or with
            False, a `ddpm_fast.UNet` in the network's mode runs instead.

    Returns:
        `pipe`.

    Raises:
        TypeError: `pipe`, its network or its scheduler is of another class.
        ValueError: An argument is out of range, or the network or scheduler is not supported. The message
            names the part and the reason.
    """
    check_choice("accelerate", "noise", noise, ("torch", "philox"))
    check_type("accelerate", "freeze", freeze, bool)
    check_dtype("accelerate", "dtype", dtype, optional=True)
    _check_pipeline("accelerate", pipe)
    with needs_extra("diffusers"):
        import diffusers
        import xxhash  # noqa: F401  needed by every call

    from . import diffusers as ours

    restore(pipe)
    if noise == "philox" and not {"batch_size", "generator"} <= inspect.signature(pipe.__call__).parameters.keys():
        raise InvalidValue(
            "accelerate",
            "",
            'the call of pipe to have batch_size and generator for noise="philox"',
            f"a {type(pipe).__name__} without",
        )
    unet, scheduler = pipe.unet, pipe.scheduler
    if own_class(unet) is not diffusers.UNet2DModel:
        raise InvalidType("accelerate", "pipe.unet", "to be a UNet2DModel", f"{type(unet).__name__}; ddpm_fast.fuse takes any")
    if (reason := _why_not_ours(unet)) is not None:
        raise InvalidValue("accelerate", "pipe.unet", "to be one that ddpm_fast.UNet can stand for", ValueError(reason))
    if not freeze and dtype not in (None, unet.dtype):
        raise InvalidValue(
            "accelerate",
            "dtype",
            f"to be None or the network's, {unet.dtype}, with freeze=False, which shares its weights",
            dtype,
        )
    classes = {}
    for name in _SCHEDULERS:
        classes[getattr(diffusers, name)] = classes[getattr(ours, name)] = getattr(ours, name)
    if type(scheduler) not in classes:
        raise InvalidType(
            "accelerate",
            "pipe.scheduler",
            f"to be a {', a '.join(_SCHEDULERS[:-1])} or a {_SCHEDULERS[-1]}",
            type(scheduler).__name__,
        )
    try:
        faster = classes[type(scheduler)].from_config(scheduler.config)
    except (ValueError, NotImplementedError) as error:
        raise InvalidValue("accelerate", "pipe.scheduler", "to have a supported configuration", error) from error

    network = unet.engine.unet if isinstance(unet, _View) else unet
    engine = _Engine(network, dtype, freeze, scheduler.config.num_train_timesteps)
    view = copy.copy(unet)  # another object, with the same parameters and layers in the same containers
    if not isinstance(view, _View):  # as that of another accelerated pipeline is
        swap(view, _View)
    view.engine = engine
    pipe.parts = _Parts(noise, engine, own={"unet": unet, "scheduler": scheduler}, faster={"unet": view, "scheduler": faster})
    pipe.parts.put_in(pipe, pipe.parts.faster)
    swap(pipe, _Pipeline)
    return pipe


def restore(pipe: Any) -> Any:
    """Undo `accelerate`.

    The pipeline gets its own network and scheduler back, unless others were assigned meanwhile. A pipeline
    that is not accelerated is not modified.

    Args:
        pipe: The pipeline.

    Returns:
        `pipe`.

    Raises:
        TypeError: `accelerate` does not support the pipeline.
    """
    _check_pipeline("restore", pipe)
    if isinstance(pipe, _Pipeline):
        pipe.parts.put_in(pipe, pipe.parts.own)
        del pipe.parts
        unswap(pipe)
    return pipe


def _check_pipeline(caller: str, pipe: Any) -> None:
    with needs_extra("diffusers"):
        import diffusers
    if not isinstance(pipe, (diffusers.DDPMPipeline, diffusers.DDIMPipeline)):
        raise InvalidType(caller, "pipe", "to be a DDPMPipeline or a DDIMPipeline", type(pipe).__name__)


def _why_not_ours(unet: Any) -> str | None:
    """Return why a `ddpm_fast.UNet` does not compute the same as this UNet2DModel, or None if it does."""
    try:
        UNetConfig.from_dict(unet.config)
    except ValueError as error:
        return str(error)
    return why_layers_differ(unet)


@dataclass
class _Call:
    """Results that hold until a call ends.

    Attributes:
        why_not: Why diffusers must compute the network.
        weights: Hash of the weights, once it is known.
        networks: Networks by device and by whether they may be frozen.
    """

    why_not: str | None
    weights: int | None = None
    networks: dict[tuple[torch.device, bool], Model] = field(default_factory=dict)


@dataclass(eq=False)
class _Kept:
    """Results that an engine keeps between calls. A copy is empty.

    Attributes:
        verdict: Digest of the network's attributes, and why diffusers must compute that network.
        model: Configuration, and a `UNet` on the network's parameters.
        frozen: State that the frozen network was made for, and the frozen network.
        warned: Warnings that were given.
        lock: Held by the thread whose call is in progress. Others wait for their turn.
        is_called: Whether a call is in progress.
        call: Results of that call, once there are any.
    """

    verdict: tuple[Any, str | None] | None = None
    model: tuple[UNetConfig, UNet] | None = None
    frozen: tuple[Hashable, FrozenUNet] | None = None
    warned: set[str] = field(default_factory=set)
    lock: Any = field(default_factory=threading.RLock)
    is_called: bool = False
    call: _Call | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Kept, ()


class _Engine:
    """Evaluator of an accelerated network.

    Nothing about the network is trusted from one call to the next. Each call compares its attributes and,
    for the frozen network, all bytes of its weights.

    Args:
        unet: The network.
        dtype: Dtype of the frozen network. None: the network's.
        freezes: Whether to use the inference form.
        num_timesteps: T.
    """

    def __init__(self, unet: Any, dtype: torch.dtype | None, freezes: bool, num_timesteps: int) -> None:
        self.unet = unet
        self._dtype, self._freezes, self._num_timesteps = dtype, freezes, num_timesteps
        self._kept = _Kept()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Compare the network once. It must not change until the context exits."""
        kept = self._kept
        with kept.lock:
            if kept.is_called:  # by this thread
                yield
                return
            kept.is_called = True
            try:
                yield
            finally:
                kept.is_called, kept.call = False, None

    def network(self, device: torch.device, freezable: bool) -> Model | None:
        """Return the module that computes the network on this device. Valid during a `call`.

        None: diffusers must compute it.
        """
        if self._kept.call is None:
            self._kept.call = _Call(self._why_not())
        call = self._kept.call
        key = device, freezable and self._freezes
        if call.why_not is None and key[1] and call.weights is None:
            try:
                call.weights = weights_hash(self.unet)
            except TypeError as error:
                call.why_not = str(error)
        if call.why_not is not None:
            self._warn(
                f"the accelerated pipeline: diffusers computes its network, because {call.why_not}. "
                "Undo the change, or call ddpm_fast.restore(pipe) and ddpm_fast.fuse(pipe.unet)"
            )
            return None
        if key not in call.networks:
            frozen = None if call.weights is None or not key[1] else self._frozen(call.weights, device)
            call.networks[key] = self._model() if frozen is None else frozen
        return call.networks[key]

    def _warn(self, message: str) -> None:
        if message not in self._kept.warned:
            self._kept.warned.add(message)
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _why_not(self) -> str | None:
        digest = attributes_digest(self.unet)
        if self._kept.verdict is None or self._kept.verdict[0] != digest:
            self._kept.verdict = digest, _why_not_ours(self.unet)
        return self._kept.verdict[1]

    def _frozen(self, weights: int, device: torch.device) -> FrozenUNet | None:
        """Return the frozen network of the weights with this hash. None: there is none."""
        if device.type not in ("cpu", "cuda"):
            return None
        dtype = self._dtype or self.unet.dtype
        # Another stream does not wait for the weights to be written.
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        state = (weights, UNetConfig.from_dict(self.unet.config), dtype, device, stream)
        if self._kept.frozen is None or self._kept.frozen[0] != state:
            self._kept.frozen = None  # before another takes memory
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                frozen = freeze(self._model(), dtype, device=device, num_timesteps=self._num_timesteps)
            self._kept.frozen = state, frozen
        return self._kept.frozen[1]

    def _model(self) -> UNet:
        """Return a `UNet` on the network's parameters, in its mode."""
        config, weights = UNetConfig.from_dict(self.unet.config), dict(self.unet.named_parameters(remove_duplicate=False))
        if (
            self._kept.model is None
            or self._kept.model[0] != config
            or any(weights[name] is not weight for name, weight in self._kept.model[1].named_parameters(remove_duplicate=False))
        ):
            with torch.device("meta"):
                model = UNet(**config.to_dict())
            for name, _ in list(model.named_parameters()):
                layer, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(layer), leaf, weights[name])
            self._kept.model = config, model
        model = self._kept.model[1]
        for name, layer in model.named_modules():
            if isinstance(layer, ResnetBlock):
                layer.training = self.unet.get_submodule(f"{name}.dropout").training
        return model


class _View(Swapped):
    """A `UNet2DModel` that an engine evaluates. It shares the layers and the configuration of the engine's."""

    engine: _Engine

    @property
    def _internal_dict(self) -> Any:
        """Configuration, which `register_to_config` replaces."""
        return self.engine.unet._internal_dict

    @_internal_dict.setter
    def _internal_dict(self, config: Any) -> None:
        self.engine.unet._internal_dict = config

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> Any:
        """Evaluate as `UNet2DModel.forward` does. The output has the dtype of `sample`.

        The inference form has no gradients and supports only the schedule's timesteps. In other cases a
        `ddpm_fast.UNet` runs. If neither computes the same as the network, its own forward runs.
        """
        from diffusers.models.unets.unet_2d import UNet2DOutput

        fractional = timestep.is_floating_point() if isinstance(timestep, Tensor) else isinstance(timestep, float)
        freezable = not (torch.is_grad_enabled() or fractional)
        with self.engine.call():
            network = self.engine.network(sample.device, freezable)
            if network is None:  # not called itself, which would call the hooks that it shares twice
                return self.engine.unet.forward(sample, timestep, class_labels, return_dict)
            out = network(sample, timestep, class_labels).to(sample.dtype)
        return UNet2DOutput(sample=out) if return_dict else (out,)


@dataclass
class _Parts:
    """Changes that `accelerate` made to a pipeline.

    Attributes:
        own: The pipeline's own parts by name.
        faster: Their replacements.
    """

    noise: str
    engine: _Engine
    own: dict[str, Any]
    faster: dict[str, Any]

    def put_in(self, pipe: Any, parts: dict[str, Any]) -> None:
        """Assign parts, except where others were assigned meanwhile."""
        for name, part in parts.items():
            if any(getattr(pipe, name) is known for known in (self.own[name], self.faster[name])):
                setattr(pipe, name, part)


class _Pipeline(Swapped):
    """A pipeline with an accelerated network and scheduler."""

    parts: _Parts

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = super().__call__  # type: ignore[misc]
        with self.parts.engine.call():
            if self.parts.noise == "torch":
                return call(*args, **kwargs)
            bound = inspect.signature(call).bind(*args, **kwargs)
            bound.apply_defaults()
            seeds = _seeds(bound.arguments["generator"], bound.arguments["batch_size"])
            # On the CPU, where a generator draws the same on any machine.
            bound.arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
            self.scheduler.seeds = seeds
            try:
                return call(*bound.args, **bound.kwargs)
            finally:
                self.scheduler.seeds = None

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Save the pipeline with its own parts, so that diffusers alone can read it."""
        self.parts.put_in(self, self.parts.own)
        try:
            return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.parts.put_in(self, self.parts.faster)


def _seeds(generator: Any, n: int) -> Tensor:
    """Return seeds int64 [n], one per generator, or derived from a number of the only generator.

    None is torch's global generator.
    """
    if isinstance(generator, list) and len(generator) == 1:
        (generator,) = generator

    def drawn(generator: torch.Generator | None) -> int:
        device = "cpu" if generator is None else generator.device
        return int(torch.randint(2**63 - 1, (), generator=generator, device=device))

    if isinstance(generator, list):
        if len(generator) != n:
            raise InvalidValue("the accelerated pipeline", "generator", f"to be a list of {n}", len(generator))
        return torch.tensor([drawn(each) for each in generator], dtype=torch.int64)
    return sample_seeds(drawn(generator), n)
