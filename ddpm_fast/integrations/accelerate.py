"""`accelerate`: run a diffusers pipeline with this package's network and scheduler."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

session: Any = None
from ..nn import UNet, UNetConfig
from ..ops import sample_seeds
from . import needs_extra
from .class_swap import Swapped, own_class, swap, unswap

# Layers of a UNet2DModel. A layer that replaces one of them (an adapter, say) would not be computed.
_LAYERS = (
    *("UNet2DModel", "DownBlock2D", "AttnDownBlock2D", "UNetMidBlock2D", "UpBlock2D", "AttnUpBlock2D", "ResnetBlock2D"),
    *("Attention", "Downsample2D", "Upsample2D", "Timesteps", "TimestepEmbedding"),
    *("ModuleList", "Conv2d", "Linear", "Embedding", "GroupNorm", "SiLU", "Dropout"),
)
_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")


def accelerate(
    pipe: Any, *, dtype: torch.dtype | None = None, noise: Literal["torch", "philox"] = "torch", freeze: bool = True
) -> Any:
    """Make a diffusers `DDPMPipeline` or `DDIMPipeline` use this package's kernels.

    The call, its arguments, its progress bar and its results stay the same. The same generator gives the
    same images up to rounding in the network. `pipe.unet` is still a `UNet2DModel` with the same
    parameters, which are not copied. Later changes of its weights take effect. `pipe.save_pretrained`
    writes the same files as before. `restore` reverts everything.

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
            weights change. It has no dropout and no gradients. If gradients are recorded, or with
            False, a `ddpm_fast.UNet` in the network's mode runs instead.

    Returns:
        `pipe`.

    Raises:
        TypeError: `pipe`, its network or its scheduler is of another class.
        ValueError: An argument is out of range, or the network or scheduler is not supported. The message
            names the part and the reason.
    """
    if noise not in ("torch", "philox"):
        raise ValueError(f'accelerate: expected noise to be "torch" or "philox", got {noise!r}')
    if not isinstance(freeze, bool):
        raise TypeError(f"accelerate: expected freeze to be a bool, got {type(freeze).__name__}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"accelerate: expected dtype to be None or a floating dtype, got {dtype!r}")
    _check_pipeline("accelerate", pipe)
    import diffusers

    from . import diffusers as ours

    restore(pipe)
    if noise == "philox" and not {"batch_size", "generator"} <= inspect.signature(pipe.__call__).parameters.keys():
        raise ValueError(
            f'accelerate: expected the call of pipe to have batch_size and generator for noise="philox", '
            f"got a {type(pipe).__name__} without"
        )
    unet, scheduler = pipe.unet, pipe.scheduler
    if own_class(unet) is not diffusers.UNet2DModel:
        raise TypeError(
            f"accelerate: expected pipe.unet to be a UNet2DModel, got {type(unet).__name__}; ddpm_fast.fuse takes any"
        )
    _check_network("accelerate", unet)
    if not freeze and dtype not in (None, unet.dtype):
        raise ValueError(
            f"accelerate: expected dtype to be None or the network's, {unet.dtype}, with freeze=False, which shares its "
            f"weights, got {dtype}"
        )
    classes = {
        **{diffusers.DDPMScheduler: ours.DDPMScheduler, diffusers.DDIMScheduler: ours.DDIMScheduler},
        **{ours.DDPMScheduler: ours.DDPMScheduler, ours.DDIMScheduler: ours.DDIMScheduler},
    }
    if type(scheduler) not in classes:
        raise TypeError(
            f"accelerate: expected pipe.scheduler to be a DDPMScheduler or a DDIMScheduler, got {type(scheduler).__name__}"
        )
    try:
        faster = classes[type(scheduler)].from_config(scheduler.config)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"accelerate: expected pipe.scheduler to have a supported configuration, got: {error}") from error

    engine = _Engine(dtype, freeze, scheduler.config.num_train_timesteps)
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
        raise TypeError(f"{caller}: expected pipe to be a DDPMPipeline or a DDIMPipeline, got {type(pipe).__name__}")


def _check_network(caller: str, unet: Any) -> None:
    """Raise a ValueError that says what of a UNet2DModel `UNet` does not support."""
    reason = None
    try:
        UNetConfig.from_dict(unet.config)
    except ValueError as error:
        reason = str(error)
    if reason is None:
        reason = next((f"{name or 'it'} {why}" for name, part in unet.named_modules() if (why := _why_other(name, part))), None)
    if reason is not None:
        raise ValueError(f"{caller}: expected pipe.unet to be one that ddpm_fast.UNet can stand for, got: {reason}")


def _why_other(name: str, module: Any) -> str | None:
    kind = own_class(module)
    if kind.__name__ not in _LAYERS or not kind.__module__.startswith(("diffusers.", "torch.nn.")):
        return f"is a {kind.__name__}"
    if "forward" in vars(module):
        return "has a patched forward (offloading does that)"
    # Hooks of the network itself still run.
    if name and (module._forward_hooks or module._forward_pre_hooks):
        return "has forward hooks"
    if kind.__name__ == "Attention" and type(module.processor).__name__ not in _PROCESSORS:
        return f"has a {type(module.processor).__name__}"
    return None


class _Engine:
    """Evaluator of an accelerated network.

    Args:
        dtype: Dtype of the frozen network. None: the network's.
        freezes: Whether to use the inference form.
        num_timesteps: T.
    """

    def __init__(self, dtype: torch.dtype | None, freezes: bool, num_timesteps: int) -> None:
        self._dtype, self._freezes, self._num_timesteps = dtype, freezes, num_timesteps
        self._model: UNet | None = None  # on the parameters of the network that it stands for
        self._call: ExitStack | None = None
        self._evaluates: UNet | None = None
        self._frozen: nn.Module | None = None

    @contextmanager
    def call(self) -> Iterator[None]:
        """Compare the weights once. They must not change until the context exits."""
        if self._call is not None:
            yield
            return
        with ExitStack() as self._call:
            try:
                yield
            finally:
                self._call = self._evaluates = self._frozen = None

    def network(self, unet: Any, device: torch.device, freezable: bool) -> nn.Module:
        """Return the module that computes `unet` on this device. Valid during a `call`."""
        assert self._call is not None
        if self._evaluates is None:
            self._evaluates = self._standing_for(unet)
        if not (self._freezes and freezable):
            return self._evaluates
        if self._frozen is None:
            kept = session(self._evaluates, device, self._dtype or unet.dtype, self._num_timesteps, None)
            self._frozen = self._call.enter_context(kept).network or self._evaluates
        return self._frozen

    def _standing_for(self, unet: Any) -> UNet:
        _check_network("the accelerated pipeline", unet)
        weights = dict(unet.named_parameters())
        if self._model is None or any(weights.get(name) is not weight for name, weight in self._model.named_parameters()):
            with torch.device("meta"):
                self._model = UNet(**UNetConfig.from_dict(unet.config).to_dict())
            for name, weight in weights.items():
                layer, _, leaf = name.rpartition(".")
                setattr(self._model.get_submodule(layer), leaf, weight)
        return self._model.train(unet.conv_in.training)  # which is shared with the caller's network, whose own mode is not


class _View(Swapped):
    """A `UNet2DModel` that an engine evaluates."""

    engine: _Engine

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> Any:
        """Evaluate as `UNet2DModel.forward` does. The output has the dtype of `sample`.

        The inference form has no gradients and supports only the schedule's timesteps. In other cases a
        `ddpm_fast.UNet` runs.
        """
        from diffusers.models.unets.unet_2d import UNet2DOutput

        fractional = timestep.is_floating_point() if isinstance(timestep, Tensor) else isinstance(timestep, float)
        freezable = not (torch.is_grad_enabled() or fractional)
        with self.engine.call():
            network = self.engine.network(self, sample.device, freezable)
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
            raise ValueError(f"the accelerated pipeline: expected generator to be a list of {n}, got {len(generator)}")
        return torch.tensor([drawn(each) for each in generator], dtype=torch.int64)
    return sample_seeds(drawn(generator), n)
