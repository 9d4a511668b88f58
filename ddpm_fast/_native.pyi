"""The compiled module. Tensors cross as addresses (`Tensor.data_ptr()`; 0: absent), unchecked: `ddpm_fast.ops` checks them.

dtype codes: 0 float32, 1 float64, 2 float16, 3 bfloat16, 4 uint8. A tensor is dense, logically [n, c, hw]; with channels_last
its memory is [n, hw, c]. run_on: on the CPU a number of threads, on CUDA a stream. The structs of csrc/common/args.h say what
each argument is.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    isa: str  # the instruction set in use
    isas: list[str]  # those compiled, worst first
    amx_bf16: bool  # whether the CPU has matrix units for bfloat16
    cuda_archs: list[str]
    cuda_why_not: str  # empty where cuda_archs is not
    openmp: bool

def build_info() -> BuildInfo: ...
def philox4x32(counter: Sequence[int], key: Sequence[int], /) -> list[int]: ...
def philox(seed: int, stream: int, first_block: int, n_blocks: int, out: int, /) -> None: ...

class Kernels(Protocol):
    def noise(
        self, dtype: int, out: int, seeds: int, stream: int, n: int, c: int, hw: int, channels_last: int, run_on: int, /
    ) -> None: ...
    def q_sample(
        self,
        dtype: int,
        out: int,
        x_0: int,
        x_0_dtype: int,
        t: int,
        table: int,
        noise: int,
        seeds: int,
        n: int,
        c: int,
        hw: int,
        channels_last: int,
        run_on: int,
        /,
    ) -> None: ...
    def reverse_step(
        self,
        dtype: int,
        model_dtype: int,
        out: int,
        x_0_out: int,
        x_t: int,
        model_output: int,
        table: int,
        steps: int,
        step_stride: int,
        noise: int,
        seeds: int,
        x_0_prev: int,
        guidance: int,
        guidance_scale: float,
        variance: int,
        n: int,
        c: int,
        hw: int,
        channels_last: int,
        run_on: int,
        /,
    ) -> None: ...
    def denoising_loss(
        self,
        dtype: int,
        loss: int,
        model_output: int,
        x_0: int,
        t: int,
        table: int,
        noise: int,
        seeds: int,
        prediction: int,
        n: int,
        c: int,
        hw: int,
        channels_last: int,
        workspace: int,
        run_on: int,
        /,
    ) -> None: ...
    def denoising_loss_backward(
        self,
        dtype: int,
        grad_model_output: int,
        grad_loss: int,
        model_output: int,
        x_0: int,
        t: int,
        table: int,
        noise: int,
        seeds: int,
        prediction: int,
        n: int,
        c: int,
        hw: int,
        channels_last: int,
        run_on: int,
        /,
    ) -> None: ...
    def group_norm_silu(
        self,
        dtype: int,
        y: int,
        mean: int,
        rstd: int,
        x: int,
        weight: int,
        weight_dtype: int,
        bias: int,
        bias_dtype: int,
        shift: int,
        shift_dtype: int,
        scale: int,
        scale_dtype: int,
        scale_shift: int,
        scale_shift_dtype: int,
        n: int,
        c: int,
        hw: int,
        groups: int,
        eps: float,
        silu: int,
        channels_last: int,
        workspace: int,
        run_on: int,
        /,
    ) -> None: ...
    def group_norm_silu_backward(
        self,
        dtype: int,
        dx: int,
        dweight: int,
        dbias: int,
        dshift: int,
        dscale: int,
        dscale_shift: int,
        dy: int,
        x: int,
        mean: int,
        rstd: int,
        weight: int,
        weight_dtype: int,
        bias: int,
        bias_dtype: int,
        shift: int,
        shift_dtype: int,
        scale: int,
        scale_dtype: int,
        scale_shift: int,
        scale_shift_dtype: int,
        n: int,
        c: int,
        hw: int,
        groups: int,
        silu: int,
        channels_last: int,
        workspace: int,
        run_on: int,
        /,
    ) -> None: ...

class Calls(Protocol):
    """Recorded calls of kernels; to call is to make them again."""

    def __call__(self) -> None: ...
    def __len__(self) -> int: ...

class Convolution(Protocol):
    def __call__(
        self,
        dtype: int,
        y: int,
        x: int,
        skip: int,
        lines: int,
        silu: int,
        weights: int,
        bias: int,
        added: int,
        divisor: float,
        n: int,
        height: int,
        width: int,
        channels: int,
        skip_channels: int,
        out_height: int,
        out_width: int,
        out_channels: int,
        kernel: int,
        stride: int,
        padding: int,
        upsample: int,
        run_on: int,
        /,
    ) -> None: ...

class CpuKernels(Kernels, Protocol):
    def record(self, function: Callable[[], None], /) -> Calls: ...  # of the kernels up to `attention`, on this thread

    panel: int  # output channels of a panel of packed weights
    def group_norm_lines(
        self,
        dtype: int,
        lines: int,
        x: int,
        skip: int,
        weight: int,
        weight_dtype: int,
        bias: int,
        bias_dtype: int,
        shift: int,
        shift_dtype: int,
        scale: int,
        scale_dtype: int,
        scale_shift: int,
        scale_shift_dtype: int,
        n: int,
        channels: int,
        skip_channels: int,
        hw: int,
        groups: int,
        eps: float,
        silu: int,
        run_on: int,
        /,
    ) -> None: ...
    conv_direct: Convolution
    conv_winograd: Convolution
    conv_winograd_upsampled_gradient: Convolution
    def attention(
        self,
        dtype: int,
        y: int,
        softmax: int,
        qkv: int,
        n: int,
        heads: int,
        pixels: int,
        channels: int,
        scale: float,
        run_on: int,
        /,
    ) -> None: ...
    def attention_backward(
        self,
        dtype: int,
        dqkv: int,
        dy: int,
        y: int,
        softmax: int,
        qkv: int,
        n: int,
        heads: int,
        pixels: int,
        channels: int,
        scale: float,
        run_on: int,
        /,
    ) -> None: ...
    def pack_winograd(
        self,
        dtype: int,
        packed: int,
        weights: int,
        out_channels: int,
        channels: int,
        out_stride: int,
        stride: int,
        row_stride: int,
        column_stride: int,
        upsample: int,
        run_on: int,
        /,
    ) -> None: ...
    def conv_winograd_weights(
        self,
        dtype: int,
        dweight: int,
        dbias: int,
        x: int,
        dy: int,
        n: int,
        height: int,
        width: int,
        channels: int,
        out_channels: int,
        upsample: int,
        run_on: int,
        /,
    ) -> None: ...

class CudaKernels(Kernels, Protocol):
    # Bytes of scratch memory that the op of that name wants.
    def denoising_loss_workspace(self, n: int, c: int, hw: int, /) -> int: ...
    def group_norm_silu_workspace(self, dtype: int, n: int, c: int, hw: int, groups: int, channels_last: int, /) -> int: ...
    def group_norm_silu_backward_workspace(
        self, dtype: int, n: int, c: int, hw: int, groups: int, channels_last: int, /
    ) -> int: ...
    def why_not(self) -> str: ...  # why they cannot run on the current device; empty where they can

cpu: CpuKernels
cuda: CudaKernels  # absent where build_info()["cuda_archs"] is empty
