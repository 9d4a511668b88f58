"""The compiled module. Tensors cross as addresses (`Tensor.data_ptr()`; 0: absent), unchecked: `ddpm_fast.ops` checks them.

dtype codes: 0 float32, 1 float64, 2 float16, 3 bfloat16. A tensor is dense, logically [n, c, hw]; with channels_last its memory
is [n, hw, c]. The structs of csrc/common/args.h say what each argument is.
"""

from collections.abc import Sequence
from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    isa: str  # the instruction set in use
    isas: list[str]  # those compiled, worst first
    cuda_archs: list[str]
    cuda_why_not: str  # empty where cuda_archs is not
    openmp: bool

def build_info() -> BuildInfo: ...
def philox4x32(counter: Sequence[int], key: Sequence[int], /) -> list[int]: ...
def philox(seed: int, stream: int, first_block: int, n_blocks: int, out: int, /) -> None: ...
def noise(
    dtype: int, out: int, seeds: int, stream: int, n: int, c: int, hw: int, channels_last: int, threads: int, /
) -> None: ...
def q_sample(
    dtype: int,
    out: int,
    x_0: int,
    t: int,
    table: int,
    noise: int,
    seeds: int,
    n: int,
    c: int,
    hw: int,
    channels_last: int,
    threads: int,
    /,
) -> None: ...
def reverse_step(
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
    threads: int,
    /,
) -> None: ...
def denoising_loss(
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
    threads: int,
    /,
) -> None: ...
def denoising_loss_backward(
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
    threads: int,
    /,
) -> None: ...
def group_norm_silu(
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
    threads: int,
    /,
) -> None: ...
def group_norm_silu_backward(
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
    threads: int,
    /,
) -> None: ...
