"""Inference form of the U-Net: the same outputs with less work at every step."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..checks import MAX_TIMESTEPS, check_dtype, check_int, check_range, computing_device
from ..errors import InvalidType, InvalidValue, public
from ..nn.config import UNetConfig
from ..nn.unet import UNet, centered, checked_timesteps
from ..ops.modes import is_transformed_tensor, runs_eagerly
from ..ops.packed_conv import conv_ops
from ..ops.reverse_step import reverse_step_op
from ..ops.step_parts import count_step_op, network_input_op
from ..plan import SamplingPlan
from ..reference import VARIANCES
from .adapter import weights_digest
from .calls import Layers, append_network
from .network import Network, read_network, why_not_frozen
from .packed_layers import PackedLayers
from .program import Buffer, Builder, Call, NativeProgram, PythonProgram, Value
from .pytorch_layers import PyTorchLayers
from .step import StepState, write_beside_condition
from .turns import Turns

MAX_PROGRAMS: Final = 4  # per network: one per input shape and number of threads
_CACHED_BYTES: Final = 8 << 20  # the largest feature map of a batch: 16 images of the CIFAR-10 network in float32


def frozen_unet(
    model: UNet,
    dtype: torch.dtype | None = None,
    *,
    device: torch.device | str | None = None,
    num_timesteps: int | None = None,
) -> FrozenUNet:
    """Return the inference form of a U-Net. Arguments and errors are those of `ddpm_fast.freeze`."""
    reason = why_not_frozen(model)
    if reason is not None:
        raise InvalidType("", "a UNet with its own layers", f"one where {reason}")
    return frozen_for(model, dtype, device, num_timesteps)


def unpacked_output(model: UNet, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
    """Return the output of a `UNet` as `freeze` reads it, in float32 on the CPU, by PyTorch's functions.

    Packed weights and tables over the timesteps would take longer than this one evaluation. No layer of torch.nn is called.
    """
    return FrozenUNet(model, torch.float32, torch.device("cpu"), 1, packed=False)(x, t.float(), class_labels)


def frozen_for(
    model: UNet, dtype: torch.dtype | None, device: torch.device | str | None, num_timesteps: int | None
) -> FrozenUNet:
    """Return the inference form of a U-Net that can be frozen."""
    weight = model.conv_in.weight
    device = torch.empty(0, device=computing_device(weight.device if device is None else device)).device
    dtype = sampling_dtype(weight.dtype, device) if dtype is None else dtype
    check_dtype("dtype", dtype)  # the weights may have another
    if num_timesteps is None:
        num_timesteps = model.config["num_train_timesteps"] or 1000
    check_int("num_timesteps", num_timesteps, 1, MAX_TIMESTEPS)
    return FrozenUNet(model, dtype, device, num_timesteps)


def sampling_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which a `UNet` of this dtype samples: its own on a CPU, bfloat16 or float16 for float32 on a GPU."""
    if dtype != torch.float32 or device.type != "cuda":
        return dtype
    with torch.cuda.device(device):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


class _Constants(nn.Module):
    """Holder of what torch.compile has to treat as constant.

    torch.compile(dynamic=True) makes integers and tensor sizes symbolic, except in the attributes of modules.
    """

    def __init__(self, config: UNetConfig, network: Network) -> None:
        super().__init__()
        self.config, self.network = config, network


class FrozenUNet:
    """Inference form of a `UNet`; see `freeze`. It is immutable.

    On a CPU, in float32 and bfloat16, convolutions and matrix products use this package's kernels:

    - Weights are packed at first use, for the method that suits the map's size. Those of Winograd's F(2x2, 3x3) need 16/9
      of the memory of 3x3 weights, and those of F(4x4, 3x3) 36/9. A layer keeps those of each method that it has used,
      besides a copy of the model's weights. On CPUs with AMX, bfloat16 has one method for all sizes, which needs as much.
    - Norms and activations are applied while a convolution reads its input.
    - Skip connections are read in place, and residuals are added while the output is written.

    On a GPU, and in other dtypes, weights are cast once and stored channels_last.

    In every case:

    - The projections of the time embedding become tables over the timesteps, computed in float64. A
      network with classes has such a table for the embedding, and one product for all projections.
    - Queries, keys and values are one product.
    - Biases and shortcuts are merged into neighbouring layers, and dropout is removed.
    - Norm parameters stay float32.

    For each input shape and number of threads it builds a program at the first call: a list of kernel calls with
    planned memory. It keeps the four programs used last. Threads that call it at once take turns on a CPU.

    It is no nn.Module. To change dtype, device or weights, freeze the model again. To save it, save the model.

    Attributes:
        config: The model's configuration.
        num_timesteps: T.
        dtype: Dtype of activations, and of weights but for those that are packed in float32 for bfloat16 activations.
        device: Device of weights and activations.
        digest: SHA-256 of the configuration and the weights from which it was made.
        why_not_packed: The reason why PyTorch computes the convolutions. None if this package's CPU kernels do.
    """

    def __init__(
        self, model: UNet, dtype: torch.dtype, device: torch.device, num_timesteps: int, *, packed: bool = True
    ) -> None:
        self.config: Mapping[str, Any] = MappingProxyType(dict(model.config))
        self.num_timesteps, self.dtype, self.device = num_timesteps, dtype, device
        self.digest = weights_digest(model)
        self.why_not_packed = conv_ops["direct"].why_not("native", device, dtype) if packed else "it is evaluated once"
        # Tensors of inference mode could not be used outside of it.
        with torch.inference_mode(False), torch.no_grad(), torch.device(device):
            self._layers = self._new_layers()
            network = read_network(model, dtype, device, num_timesteps, self._layers.stored)
        self._constants = _Constants(UNetConfig.from_dict(model.config), network)
        self._programs: OrderedDict[Hashable, NativeProgram | PythonProgram] = OrderedDict()  # the one used last is last
        self._turns = Turns("FrozenUNet")

    @public(traced=True)
    def __call__(self, x: Tensor, t: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """Evaluate the network as `UNet.forward` does.

        Args:
            x: x_t, [N, in_channels, H, W].
            t: Timesteps: a number, a 0-d tensor, or [N]. Integers are in 0..T-1. They are checked on the CPU. On a
                GPU a check would synchronize with the host, so the caller must keep them in range. Terms of floating
                timesteps are not looked up but computed, for schedulers that step between those of the training.
            class_labels: int64 [N], for networks with classes.

        Returns:
            [N, out_channels, H, W] in `dtype`, channels_last.

        Raises:
            ValueError: A shape or the device does not fit, a timestep or label is out of range, or x records gradients.
            TypeError: Timesteps are no numbers, or x belongs to a torch.func transform.
        """
        if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
            raise InvalidValue("x", "to record no gradients", "one that does: call the UNet, or use torch.no_grad()")
        with torch.no_grad():
            return self._evaluated(x, t, class_labels)

    def step(self, plan: SamplingPlan, state: StepState, guidance_scale: float | None) -> Callable[[], object]:
        """Return the program of a sampling step: network, guidance and `reverse_step`. It is called without autocast.

        A batch is split by image, so that feature maps stay in the CPU's cache. Both halves of guidance are evaluated together.
        CPU kernels read x_t and the condition as two maps. For PyTorch both lie in one map, to which a step writes x_t alone.

        Args:
            plan: The plan. Its timesteps are below T.
            state: The memory that steps read and write.
            guidance_scale: The scale of guidance. None: the state holds no second half.
        """
        builder, network, n = Builder(), self._constants.network, len(state.x_t)
        at_once = math.ceil(n / self._num_passes(state.copies * n, *state.x_t.shape[2:]))
        with self._turns.taken(), torch.inference_mode(False), torch.no_grad(), torch.device(self.device):
            timesteps, table = plan.timesteps.to(self.device), plan.table(self.device)
            for part in (slice(i, i + at_once) for i in range(0, n, at_once)):
                x_t, history = state.x_t[part], [each[part] for each in state.history]
                x_0 = [] if state.x_0 is None else [state.x_0[part]]
                labels = None if state.class_labels is None else state.class_labels[:, part]
                stacks = network.time_terms.append(builder, timesteps, state.step, state.copies * len(x_t), labels)
                inputs = self._step_inputs(builder, state, part)
                model_output = append_network(builder, network, self._layers, inputs, stacks)
                seeds, variance = state.seeds[part] if plan.is_random else None, VARIANCES.index(plan.variance)
                arguments = reverse_step_op.spec.Arguments(
                    *(x_t, model_output, table, state.step),
                    **dict(zip(("x_0_prev", "x_0_prev2"), history, strict=False)),
                    **{"seeds": seeds, "guidance_scale": guidance_scale, "variance": variance, "return_x_0": bool(x_0)},
                )
                builder.update(reverse_step_op, *arguments[:-1], out=(x_t, *x_0))
                if len(history) > 1:
                    # x_0_prev becomes x_0_prev2, then x_0^ becomes x_0_prev: copies in the same parallel region
                    for source, copy in ((history[0], history[1]), (x_0[0], history[0])):
                        builder.update(network_input_op, source, x_t.dtype, 1, False, out=(copy,))
            builder.update(count_step_op, state.step, out=(state.step,))
            return self._executor(builder.calls).run

    def _step_inputs(self, builder: Builder, state: StepState, images: slice) -> tuple[Value, ...]:
        """Append the calls that bring x_t of some images into the network's form. Return the maps that the network reads."""
        centered, dtype, x_t = self._constants.config.center_input_sample, self.dtype, state.x_t[images]
        if state.condition_channels and self.why_not_packed is not None:
            joint = state.condition(images, dtype, centered=centered, after_x_t=True)
            builder.update(partial(_write_x_t, x_t, centered), out=(joint,))
            return (joint,)
        x: Value = x_t
        if state.copies > 1 or centered or dtype != x_t.dtype:
            shape = (state.copies * len(x_t), *x_t.shape[1:])
            x = builder.call(network_input_op, x_t, dtype, state.copies, centered, shape=shape, dtype=dtype)
        return (x, state.condition(images, dtype, centered=centered)) if state.condition_channels else (x,)

    def _evaluated(self, x: Tensor, t: Tensor | float, class_labels: Tensor | None) -> Tensor:
        if isinstance(t, int) and not isinstance(t, bool) and not 0 <= t < self.num_timesteps:
            raise InvalidValue("t", f"in 0..{self.num_timesteps - 1}", t)
        t = checked_timesteps(self._constants.config, x, t, class_labels)
        for name, value in () if torch.compiler.is_compiling() else (("x", x), ("t", t), ("class_labels", class_labels)):
            if value is not None and is_transformed_tensor(value):
                raise InvalidType(name, "outside of torch.func transforms", "a tensor of one: call the UNet there")
        if not t.is_floating_point():
            t = t.to(torch.int64)
            if runs_eagerly(t):
                check_range("t", t, self.num_timesteps)
        if x.device != self.device:
            raise InvalidValue("x", f"on {self.device}", f"{x.device}: freeze the model for that device")
        x = centered(self._constants.config, x.to(self.dtype)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, enabled=False):  # every layer has its dtype
            at_once = max(math.ceil(len(x) / self._num_passes(len(x), *x.shape[2:])), 1)
            parts = [tensor.split(at_once) for tensor in (x, t, class_labels) if tensor is not None]
            outs = [self._part(x, t, *labels) for x, t, *labels in zip(*parts, strict=True)]
            return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _part(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        inputs = (x, *self._constants.network.time_terms.stacks(t, class_labels))
        if 0 in x.shape:
            return x.new_empty(x.shape[0], self._constants.config.out_channels, *x.shape[2:])
        if not runs_eagerly(*inputs):  # The calls are traced one by one. What is packed belongs to the trace.
            return self._executor(*self._built(self._new_layers(), inputs), traced=True)(inputs)
        key = (torch.get_num_threads(), *(each.shape for each in inputs))
        with self._turns.taken():
            program = self._program(key, inputs)
            if self.why_not_packed is None:
                return program(inputs)  # here, because the program's memory serves one call at a time
        return program(inputs)

    def _program(self, key: Hashable, inputs: Sequence[Tensor]) -> NativeProgram | PythonProgram:
        program = self._programs.pop(key, None)
        if program is None:
            if len(self._programs) == MAX_PROGRAMS:
                self._programs.popitem(last=False)
            with torch.inference_mode(False), torch.no_grad(), torch.device(self.device):
                program = self._executor(*self._built(self._layers, inputs))
        self._programs[key] = program
        return program

    def _executor(
        self, calls: Sequence[Call], inputs: Sequence[Buffer] = (), output: Buffer | None = None, *, traced: bool = False
    ) -> NativeProgram | PythonProgram:
        if traced or self.why_not_packed is not None:
            return PythonProgram(calls, inputs, output, "native" if self.why_not_packed is None else None)
        return NativeProgram(calls, inputs, output, threads=torch.get_num_threads())

    def _new_layers(self) -> Layers:
        return PackedLayers(self.dtype) if self.why_not_packed is None else PyTorchLayers(self.dtype)

    def _built(self, layers: Layers, inputs: Sequence[Tensor]) -> tuple[list[Call], list[Buffer], Buffer]:
        """Return the calls, the inputs and the output of a program for inputs of these shapes."""
        builder = Builder()
        x, *stacks = buffers = [builder.buffer(each.shape, each.dtype) for each in inputs]
        output = append_network(builder, self._constants.network, layers, (x,), stacks)
        return builder.calls, buffers, output

    def _num_passes(self, n: int, height: int, width: int) -> int:
        """Return the number of passes for n maps, chosen so that those of a pass stay in the CPU's cache."""
        if self.device.type != "cpu":
            return 1
        bytes_an_image = self._constants.config.block_out_channels[0] * height * width * self.dtype.itemsize
        return max(math.ceil(n * bytes_an_image / _CACHED_BYTES), 1)

    def __setattr__(self, name: str, value: Any) -> None:
        if "_turns" in vars(self):  # the last attribute of a new object
            raise AttributeError(f"FrozenUNet: {name} cannot be set, because it is immutable: freeze the model again")
        super().__setattr__(name, value)

    def __copy__(self) -> FrozenUNet:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenUNet:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("FrozenUNet: it cannot be pickled: save the UNet (save_pretrained), load it and freeze it again")

    def __getattr__(self, name: str) -> Any:
        """Raise an AttributeError, which says what to do in place of a method of nn.Module."""
        message = f"'FrozenUNet' object has no attribute {name!r}"
        if hasattr(nn.Module, name) or name in nn.Module.__annotations__:
            message += ": it is immutable and no nn.Module; change or save the UNet, then freeze it again"
        raise AttributeError(message)


def _write_x_t(x_t: Tensor, centered: bool, *, backend: str | None, out: tuple[Tensor]) -> None:
    """Write x_t to its channels of the network's input."""
    write_beside_condition(*out, x_t, centered=centered)
