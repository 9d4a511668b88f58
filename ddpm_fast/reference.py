"""Reference backend: every op as plain PyTorch. It specifies the kernels, and tests compare them with it.

Arithmetic is in float64 for float64 inputs and in float32 for all others. Results are rounded once, at
the end, to the input's dtype. Tables come from `NoiseSchedule.table` and `SamplingPlan.table`.
Equation numbers are those of the derivation in the documentation. Ho et al. 2020 is
https://arxiv.org/abs/2006.11239.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .dtypes import opmath

Map: TypeAlias = Tensor
"""A large tensor [N, ...]. All maps of an op have the memory format of its first one. Signatures declare the ops."""
Image: TypeAlias = Tensor
"""A map [N, C, H, W] that kernels read in channels_last."""

# Streams of the noise: the second word of the Philox counter. `reverse_step` draws with stream = its row of the plan.
STREAM_X_T: Final = 0xFFFFFFFF
"""Stream of `initial_noise`, the x_T of a sampler."""
STREAM_Q_SAMPLE: Final = 0xFFFFFFFE
"""Stream of the epsilon of `q_sample` and `denoising_loss`."""
STREAM_SEEDS: Final = 0xFFFFFFFD
"""Stream of `sample_seeds`."""
STREAM_KNOWN: Final = 0x80000000
"""First stream of the noise on the known region of `inpaint`: step i draws from STREAM_KNOWN + i."""
STREAM_DROPOUT: Final = 0xC0000000
"""First stream of a `UNet`'s dropout: its residual block i draws from STREAM_DROPOUT + i."""

# Kernels take the index of the variance of a reverse step.
VARIANCES: Final = ("fixed", "learned", "learned_range")


class PlanRow(NamedTuple):
    """A row of a sampling plan's table, see `reverse_step`. csrc/common/args.h has the same fields."""

    p: Tensor
    q: Tensor
    k0: Tensor
    k1: Tensor
    k2: Tensor
    k3: Tensor
    k4: Tensor
    sigma: Tensor
    log_beta: Tensor
    log_beta_tilde: Tensor
    clip: Tensor


# ---------------------------------------------------------------------------------------------------------------- noise


def philox(seeds: Tensor, stream: int | Tensor, first_block: int, num_blocks: int) -> Tensor:
    """Return random words of Philox4x32-10 (Salmon et al. 2011).

    Args:
        seeds: int64 [N]. The 64 bits of a seed are the key of its sample.
        stream: Second word of the counter, 0..2^32-1: an int, or int64 [N] or [1].
        first_block: Number of the first block, 0..2^63-1. Its low 32 bits are word 0 of the counter, its high bits word 2.
        num_blocks: Number B of consecutive blocks.

    Returns:
        int64 [4, N, B] with values 0..2^32-1. Blocks below 2^32 equal `tl.randint4x(seed, block + (stream << 32))`.
    """
    mask = 0xFFFFFFFF
    multipliers = torch.tensor([[[0xD2511F53]], [[0xCD9E8D57]]], device=seeds.device)
    increments = torch.tensor([[[0x9E3779B9]], [[0xBB67AE85]]], device=seeds.device)
    key = torch.stack([seeds, seeds >> 32])[..., None] & mask  # [2, N, 1]
    # Words 0 and 2 of the counter are multiplied, words 1 and 3 are added to.
    block = torch.arange(first_block, first_block + num_blocks, device=seeds.device)
    even = torch.stack([block & mask, block >> 32])[:, None]  # [2, 1, B]
    streams = stream if isinstance(stream, Tensor) else torch.full((1,), stream, device=seeds.device)
    odd = torch.stack([streams, torch.zeros_like(streams)])[..., None]  # [2, N or 1, 1]
    for _ in range(10):
        product = (multipliers * even).flip(0)  # wraps modulo 2^64, which keeps all the bits that are used
        even, odd = ((product >> 32) & mask) ^ odd ^ key, product & mask
        key = (key + increments) & mask
    return torch.stack([even, odd], dim=1).flatten(0, 1)


def _fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """Return a * b + c of finite numbers in float32 with one rounding, like a fused multiply-add instruction.

    The product is exact in float64. The sum is rounded to odd there, and TwoSum gives its error. Rounding
    it to float32 afterwards therefore rounds the exact value (Boldo and Melquiond 2008).
    """
    product, addend = a.double() * _widened(b), _widened(c)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(torch.int64) - (error * total < 0).long()  # rounded towards 0
    return (bits | (error != 0)).view(torch.float64).float()  # the last bit says that something was lost


def _widened(x: Tensor | float) -> Tensor | float:
    """Return a float32 value in float64. A constant is rounded to float32 first."""
    return x.double() if isinstance(x, Tensor) else float(np.float32(x))


def _normal_pair(w0: Tensor, w1: Tensor) -> tuple[Tensor, Tensor]:
    """Return two float32 normals from two random words by Box-Muller.

    The words are int64 in 0..2^32-1. The radius comes from w0, the angle from w1. Every line is one
    correctly rounded float32 operation per value, and every kernel repeats these operations in this order.
    All backends therefore agree to the last bit. The polynomials are minimax fits with a relative error
    of 4e-8.
    """
    # u in (0, 1]: 32 random bits; the half step keeps it off 0.
    u = _fma(w0.float(), 2.0**-32, 2.0**-33)
    # ln u = e ln 2 + ln(1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
    bits = u.view(torch.int32)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).view(torch.float32) - 1.0
    p = _fma(f, 0.08700401, -0.14266932)
    p = _fma(p, f, 0.14914508)
    p = _fma(p, f, -0.16577652)
    p = _fma(p, f, 0.199631)
    p = _fma(p, f, -0.25001335)
    p = _fma(p, f, 0.3333391)
    p = _fma(p, f, -0.5)
    ln_u = _fma(e.float(), 0.6931472, _fma(f * f, p, f))
    radius = torch.sqrt((-2.0 * ln_u).double()).float()  # via float64: correctly rounded on every device
    # Angle = (quadrant + g) quarter turns with g in [-1/2, 1/2).
    quadrant = ((w1 + 0x20000000) & 0xFFFFFFFF) >> 30
    g = (w1 - (quadrant << 30)).to(torch.int32).float() * 2.0**-30
    g2 = g * g
    s = _fma(g2, -0.004685972, 0.079712525)
    s = _fma(s, g2, -0.64596665)
    s = _fma(s, g2, 1.5707964) * g  # sin(pi/2 g)
    c = _fma(g2, -0.02041453, 0.2536024)
    c = _fma(c, g2, -1.2336977)
    c = _fma(c, g2, 1.0)  # cos(pi/2 g)
    odd = quadrant % 2 == 1
    cosine, sine = torch.where(odd, s, c), torch.where(odd, c, s)
    cosine = torch.where((quadrant == 1) | (quadrant == 2), -cosine, cosine)
    sine = torch.where(quadrant >= 2, -sine, sine)
    return radius * cosine, radius * sine


def sample_seeds(seed: int, n: int, start: int = 0) -> Tensor:
    """Return the seeds of samples start .. start + n - 1.

    Args:
        seed: Seed of the run, -2^63 .. 2^64 - 1.
        n: Number of seeds.
        start: Index of the first sample.

    Returns:
        int64 [n]. Element i is words 0 and 1 of Philox block `start + i` under the key `seed`.
    """
    key = torch.tensor([seed - (1 << 64) if seed >= 1 << 63 else seed])
    words = philox(key, STREAM_SEEDS, start, n)[:, 0]  # [4, n]
    return words[0] | (words[1] << 32)


def noise(shape: Sequence[int], seeds: Tensor, stream: int | Tensor, dtype: torch.dtype) -> Tensor:
    """Draw standard normals. Sample i is a function of (seeds[i], stream) alone.

    Args:
        shape: [N, ...] with N the number of seeds.
        seeds: int64 [N].
        stream: 0..2^32-1: an int, or int64 [N] or [1].
        dtype: A floating dtype. The float32 values are rounded to it.

    Returns:
        Contiguous [N, ...]. Element k of a sample, in C, H, W order, comes from word k % 4 of
        block k // 4.
    """
    numel = 1
    for size in shape[1:]:
        numel *= size
    words = philox(seeds, stream, 0, -(-numel // 4))  # [4, N, B]
    normals = torch.stack(_normal_pair(words[::2], words[1::2]), dim=-1)  # [2, N, B, 2]
    return normals.permute(1, 2, 0, 3).flatten(1)[:, :numel].reshape(tuple(shape)).to(dtype)


# -------------------------------------------------------------------------------------------------- forward process, loss


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Return `values`, one per sample, shaped to broadcast over `like`.

    Args:
        values: [N] or a scalar.
        like: [N, ...].

    Returns:
        [N, 1, ...] in the dtype of intermediate results.
    """
    return values.reshape(-1, *[1] * (like.dim() - 1)).to(opmath(like.dtype))


def _epsilon(like: Tensor, noise_: Tensor | None, seeds: Tensor | None, stream: int | Tensor) -> Tensor:
    """Return the given noise or draw it from the seeds, in the dtype of intermediate results."""
    if noise_ is not None:
        return noise_.to(opmath(like.dtype))
    assert seeds is not None
    return noise(like.shape, seeds, stream, opmath(like.dtype))


def q_sample(
    x_0: Map,
    t: Tensor,
    table: Tensor,
    noise: Map | None,
    seeds: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Draw x_t ~ q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) (eq. 3, Ho et al. eq. 4).

    Args:
        x_0: [N, ...], floating, or uint8 with 0..255 for -1..1.
        t: int64 [N].
        table: float32 [T, 2]: sqrt(abar_t) and sqrt(1 - abar_t).
        noise: epsilon, shaped like x_0. None: drawn from `seeds`.
        seeds: int64 [N], used with stream STREAM_Q_SAMPLE.
        dtype: Dtype of x_t: that of x_0, or any for a uint8 x_0.

    Returns:
        x_t, shaped like x_0.
    """
    if x_0.dtype == torch.uint8:
        x_0 = x_0.to(opmath(dtype)) * (2 / 255) - 1
    signal, sigma = (per_sample(table[t, column], x_0) for column in (0, 1))
    epsilon = _epsilon(x_0, noise, seeds, STREAM_Q_SAMPLE)
    return (signal * x_0 + sigma * epsilon).to(dtype)


def denoising_loss(
    model_output: Map,
    x_0: Map | None,
    t: Tensor,
    table: Tensor,
    noise: Map | None,
    seeds: Tensor | None,
) -> Tensor:
    """Return the mean squared error of each sample's prediction (eq. 12, Ho et al. eq. 14).

        || model_output - (a x_0 + b epsilon) ||^2 / number of elements

    Args:
        model_output: [N, ...].
        x_0: [N, ...]. None: a is 0 at every timestep.
        t: int64 [N].
        table: float32 [T, 2]: a and b.
        noise: epsilon, shaped like model_output.
        seeds: int64 [N]. They draw epsilon with stream STREAM_Q_SAMPLE. `noise` and `seeds` are both None if b is 0 at every
            timestep.

    Returns:
        [N] in the dtype of intermediate results.
    """
    a, b = (per_sample(table[t, column], model_output) for column in (0, 1))
    target = 0 if x_0 is None else a * x_0
    if noise is not None or seeds is not None:
        target = target + b * _epsilon(model_output, noise, seeds, STREAM_Q_SAMPLE)
    squares = (model_output.to(opmath(model_output.dtype)) - target).square()
    return squares.flatten(1).mean(dim=1) if squares.dim() > 1 else squares


# ------------------------------------------------------------------------------------------------------- reverse process


def plan_row(table: Tensor, steps: Tensor, like: Tensor) -> PlanRow:
    """Return the row of each sample's step, its columns shaped to broadcast over `like`.

    Args:
        table: float32 [S, 11], with the columns of `PlanRow`.
        steps: int64, [N] or one element.
        like: [N, ...].
    """
    rows = table[steps.reshape(-1)].to(opmath(like.dtype))
    return PlanRow(*rows.reshape(*rows.shape, *[1] * (like.dim() - 1)).unbind(1))


def reverse_step(
    x_t: Map,
    model_output: Map,
    table: Tensor,
    steps: Tensor,
    noise: Map | None,
    seeds: Tensor | None,
    x_0_prev: Map | None,
    x_0_prev2: Map | None,
    guidance_scale: float | None,
    variance: int,
    return_x_0: bool,
) -> tuple[Tensor, Tensor | None]:
    """Advance x_t by one step of any sampler.

    With one row (p, q, k0, k1, k2, k3, k4, sigma, log beta, log beta~, clip) of the plan's table:

        x_0^    = clip(p x_t + q m)
        x_{t-1} = k0 x_0^ + k1 x_t + k2 m + k3 x_0_prev + k4 x_0_prev2 + std z

    For a plan of `ddpm_plan` without a clip this is eq. 13 (Ho et al. eq. 11, Algorithm 2).

    Args:
        x_t: [N, C, ...].
        model_output: m, shaped like x_t. With learned variance it has twice the channels, the
            prediction first. With guidance it has twice the samples, the conditional half first, and
            m = m_u + guidance_scale (m_c - m_u) (Ho and Salimans 2022).
        table: float32 [S, 11], with the columns of `PlanRow`.
        steps: int64, [N] or one element.
        noise: z, shaped like x_t.
        seeds: int64 [N]. They draw z with stream = step. `noise` and `seeds` may both be None if every
            sigma is 0.
        x_0_prev: x_0^ of the previous step, for multistep samplers.
        x_0_prev2: x_0^ of the step before that.
        guidance_scale: None: no guidance.
        variance: Index into VARIANCES. "fixed": std = sigma. "learned": std = sigma exp(v / 2), with v
            the second half of the channels. "learned_range": with f = (v + 1) / 2,
            std = sigma exp((f log beta + (1 - f) log beta~) / 2) (Nichol and Dhariwal 2021, eq. 15).
        return_x_0: Also return x_0^.

    Returns:
        x_{t-1} and x_0^ (or None), both in x_t's dtype.
    """
    wide, row = opmath(x_t.dtype), plan_row(table, steps, x_t)
    x = x_t.to(wide)
    m, log_variance = prediction_and_variance(model_output.to(wide), row, guidance_scale, variance)
    std = row.sigma if log_variance is None else row.sigma * torch.exp(0.5 * log_variance)
    x_0 = torch.clamp(row.p * x + row.q * m, -row.clip, row.clip)
    x_prev = row.k0 * x_0 + row.k1 * x + row.k2 * m
    if x_0_prev is not None:
        x_prev = x_prev + row.k3 * x_0_prev.to(wide)
    if x_0_prev2 is not None:
        x_prev = x_prev + row.k4 * x_0_prev2.to(wide)
    if noise is not None or seeds is not None:
        x_prev = x_prev + std * _epsilon(x, noise, seeds, steps.reshape(-1))
    return x_prev.to(x_t.dtype), x_0.to(x_t.dtype) if return_x_0 else None


def prediction_and_variance(
    model_output: Tensor, row: PlanRow, guidance_scale: float | None, variance: int
) -> tuple[Tensor, Tensor | None]:
    """Return m after guidance, and the logarithm of the learned variance of the conditional half, or None.

    The arguments are those of `reverse_step`, in the dtype of intermediate results.
    """
    m = model_output
    if guidance_scale is not None:
        conditional, unconditional = m.chunk(2)
        m = unconditional + guidance_scale * (conditional - unconditional)
    if VARIANCES[variance] == "fixed":
        return m, None
    m, v = m.chunk(2, dim=1)
    if guidance_scale is not None:
        v = conditional.chunk(2, dim=1)[1]
    if VARIANCES[variance] == "learned_range":
        v = ranged_log_variance(v, row.log_beta, row.log_beta_tilde)
    return m, v


def time_terms(table: Tensor, timesteps: Tensor, step: Tensor, samples: int) -> Tensor:
    """Return the time terms of a step of a plan, [tables, samples, width], the same for each sample.

    Args:
        table: [tables, T, width].
        timesteps: The t of each step, int64 [S].
        step: int64 of one element.
        samples: Number of samples.
    """
    return table.index_select(1, timesteps[step].expand(samples))


def network_input(x_t: Tensor, dtype: torch.dtype, copies: int, centered: bool) -> Tensor:
    """Return x_t as a network reads it, [copies N, C, H, W], channels_last.

    Args:
        x_t: [N, C, H, W].
        dtype: Dtype of the network.
        copies: 2 with guidance, else 1.
        centered: Return 2 x - 1, as networks with `center_input_sample` read it.
    """
    x = x_t.to(dtype)
    x = 2 * x - 1 if centered else x
    return (x if copies == 1 else torch.cat([x] * copies)).contiguous(memory_format=torch.channels_last)


def count_step(step: Tensor) -> Tensor:
    """Return step + 1."""
    return step + 1


def ranged_log_variance(v: Tensor, log_beta: Tensor, log_beta_tilde: Tensor) -> Tensor:
    """Return the log variance between log beta~ and log beta that a model's output v in [-1, 1] selects.

    Source: Nichol and Dhariwal 2021, eq. 15.
    """
    f = (v + 1) / 2
    return f * log_beta + (1 - f) * log_beta_tilde


# ------------------------------------------------------------------------------------------------------------ group norm


def group_norm_silu(
    x: Map,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    shift: Tensor | None,
    scale: Tensor | None,
    scale_shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return act(GroupNorm(x + shift) (1 + scale) + scale_shift), with act SiLU or the identity.

    Sources: Wu and He 2018; Dhariwal and Nichol 2021.

    Args:
        x: [N, C, ...].
        num_groups: Number of groups G, a divisor of C.
        weight: [C] or None.
        bias: [C] or None.
        eps: Added to the variance.
        shift: [N, C] or None, added before the statistics.
        scale: [N, C] or None.
        scale_shift: [N, C] or None, added after the scale.
        silu: Apply SiLU.

    Returns:
        y, shaped like x in its dtype; the mean; and 1 / sqrt(variance + eps). The last two are [N, G] in
        the dtype of intermediate results.
    """
    n, channels = x.shape[:2]
    wide = opmath(x.dtype)

    def over_channels(value: Tensor) -> Tensor:  # [C] or [N, C] -> broadcastable over [N, C, ...]
        return value.to(wide).reshape(-1, channels, *[1] * (x.dim() - 2))

    h = x.to(wide)
    if shift is not None:
        h = h + over_channels(shift)
    grouped = h.reshape(n, num_groups, channels // num_groups, -1).flatten(2) if n else h.reshape(0, num_groups, 1)
    mean = grouped.mean(dim=2)
    variance = (grouped - mean[..., None]).square().mean(dim=2)
    rstd = torch.rsqrt(variance + eps)
    y = ((grouped - mean[..., None]) * rstd[..., None]).reshape(x.shape)
    if weight is not None:
        y = y * over_channels(weight)
    if bias is not None:
        y = y + over_channels(bias)
    if scale is not None:
        y = y * (1 + over_channels(scale))
    if scale_shift is not None:
        y = y + over_channels(scale_shift)
    if silu:
        y = torch.nn.functional.silu(y)
    return y.to(x.dtype), mean, rstd


def group_norm_affine(
    x: Image,
    skip: Image | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    shift: Tensor | None,
    scale: Tensor | None,
    scale_shift: Tensor | None,
) -> Tensor:
    """Return the group norm of x and skip as an affine map of each channel.

        GroupNorm(cat(x, skip) + shift) (1 + scale) + scale_shift = (cat(x, skip) - center) slope + intercept

    Args:
        x: [N, C, H, W].
        skip: Further channels [N, S, H, W], or None.
        num_groups: Number of groups, a divisor of C + S.
        weight: [C + S] or None.
        bias: [C + S] or None.
        eps: Added to the variance.
        shift: [N, C + S] or None.
        scale: [N, C + S] or None.
        scale_shift: [N, C + S] or None.

    Returns:
        [N, 3, C + S] in the dtype of intermediate results: center, slope and intercept.
    """
    if skip is not None:
        x = torch.cat((x, skip), dim=1)
    channels, wide = x.shape[1], opmath(x.dtype)
    _, mean, rstd = group_norm_silu(x, num_groups, None, None, eps, shift, None, None, False)
    center, slope = (value.repeat_interleave(channels // num_groups, dim=1) for value in (mean, rstd))  # [N, C + S]
    intercept = torch.zeros_like(slope)
    if shift is not None:
        center = center - shift.to(wide)
    if weight is not None:
        slope = slope * weight.to(wide)
    if bias is not None:
        intercept = intercept + bias.to(wide)
    if scale is not None:
        slope, intercept = slope * (1 + scale.to(wide)), intercept * (1 + scale.to(wide))
    if scale_shift is not None:
        intercept = intercept + scale_shift.to(wide)
    return torch.stack((center, slope, intercept), dim=1)


# ------------------------------------------------------------------------------------------------ convolution, attention


def resample(x: Image, affine: Tensor | None, silu: bool, up: bool) -> Tensor:
    """Return act((x - center) slope + intercept), resampled by 2.

    Args:
        x: [N, C, H, W]. H and W are even unless `up`.
        affine: [N, 3, C]: center, slope and intercept. None: neither an affine map nor SiLU.
        silu: Apply SiLU after the affine map.
        up: Repeat each pixel in both directions. Otherwise take the mean of each 2x2 square.

    Returns:
        [N, C, 2 H, 2 W] or [N, C, H / 2, W / 2], in x's dtype.
    """
    h = x.to(opmath(x.dtype))
    if affine is not None:
        center, slope, intercept = affine[..., None, None].unbind(1)
        h = (h - center) * slope + intercept
        h = torch.nn.functional.silu(h) if silu else h
    h = torch.nn.functional.interpolate(h, scale_factor=2.0, mode="nearest") if up else torch.nn.functional.avg_pool2d(h, 2)
    return h.to(x.dtype)


def conv3x3(
    x: Map,
    weight: Tensor,
    bias: Tensor | None,
    skip: Map | None,
    affine: Tensor | None,
    silu: bool,
    residual: Map | None,
    divisor: float,
    upsample: bool,
) -> Tensor:
    """Return (conv(up(act((cat(x, skip) - center) slope + intercept))) + bias + residual) / divisor.

    Args:
        x: [N, C, H, W].
        weight: [out, C + S, 3, 3].
        bias: [out] or None.
        skip: Further input channels [N, S, H, W], or None.
        affine: [N, 3, C + S]: center, slope and intercept. None: no affine map.
        silu: Apply SiLU before the convolution.
        residual: Added to the output, shaped like it, or None.
        divisor: Divides the sum.
        upsample: Upsample by 2 (nearest neighbour) before the convolution.

    Returns:
        [N, out, H, W], or twice as high and wide with `upsample`, in x's dtype.
    """
    dtype = x.dtype
    if skip is not None:
        x = torch.cat((x, skip), dim=1)
    if affine is not None or silu:
        h = x.to(opmath(dtype))
        if affine is not None:
            center, slope, intercept = affine[..., None, None].unbind(1)
            h = (h - center) * slope + intercept
        x = (torch.nn.functional.silu(h) if silu else h).to(dtype)
    if upsample:
        x = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
    bias = None if bias is None else bias.to(dtype)
    y = torch.nn.functional.conv2d(x, weight.to(dtype), bias, padding=1)
    if residual is not None:
        y = y + residual
    return y if divisor == 1 else y / divisor


def attention(qkv: Tensor, num_heads: int, scale: float, *, fused: bool = True) -> Tensor:
    """Return softmax(q k^T scale) v over all pixels.

    Args:
        qkv: [N, L, 3 C]: q, k and v in this order, the heads of each one after another.
        num_heads: Number of heads, a divisor of C.
        scale: Factor of the scores.
        fused: Use PyTorch's fused attention. Without it every step is differentiable any number of times.

    Returns:
        [N, L, C] in the dtype of qkv.
    """
    n, pixels, channels = qkv.shape
    parts = qkv.reshape(n, pixels, 3, num_heads, channels // (3 * num_heads))
    q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)  # each [N, heads, L, C / heads]
    if fused:
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        y = (q @ k.transpose(2, 3) * scale).softmax(3) @ v
    return y.transpose(1, 2).flatten(2)
