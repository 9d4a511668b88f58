"""Philox4x32-10 words and Box-Muller normals for kernels.

`normal_pair` repeats `ddpm_fast.reference._normal_pair` operation by operation. It uses only operations
that are exact everywhere: integers, fma and a correctly rounded square root. It needs no transcendental
function and no libdevice call. Normals are therefore bit-identical on every GPU and in the interpreter.
Launch kernels that draw noise with `enable_fp_fusion=False`. Otherwise the compiler contracts a * b + c.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(seed, stream, block):
    """Return the four words (uint32) of each block of a stream.

    They equal `tl.randint4x(seed, block + (stream << 32))` bit for bit. 64-bit products compile to one
    instruction each (IMAD.WIDE.U32), those of `tl.philox` to two.
    """
    key = seed.to(tl.uint64)
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    c0 = block.to(tl.uint32)
    c1 = (c0 * 0 + stream).to(tl.uint32)
    c2 = c0 * 0
    c3 = c0 * 0
    for _ in tl.static_range(10):
        product_0 = c0.to(tl.uint64) * 0xD2511F53
        product_1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product_1.to(tl.uint32)
        c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product_0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def normal_pair(w0, w1):
    """Return two float32 normals from two words (uint32) by Box-Muller: radius from w0, angle from w1.

    Some values are scaled by powers of two, compared with the reference. This changes no rounding and saves
    operations.
    """
    u = w0.to(tl.float32) + 0.5  # 2^32 u, u in (0, 1]
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x4F3504F3) & -0x800000  # 2^23 e: ln u = e ln 2 + ln(1 + f), 1 + f in [sqrt(1/2), sqrt(2))
    f = (bits - e - 0xF800000).to(tl.float32, bitcast=True) - 2.0  # 2 f
    p = tl.fma(f, 0.08700401 / 256, -0.14266932 / 128)
    p = tl.fma(p, f, 0.14914508 / 64)
    p = tl.fma(p, f, -0.16577652 / 32)
    p = tl.fma(p, f, 0.199631 / 16)
    p = tl.fma(p, f, -0.25001335 / 8)
    p = tl.fma(p, f, 0.3333391 / 4)
    p = tl.fma(p, f, -0.5 / 2)
    twice_ln_u = tl.fma(e.to(tl.float32), 0.6931472 / 4194304, tl.fma(f * f, p, f))
    radius = tl.sqrt_rn(-twice_ln_u)
    # The angle is (quadrant + g) quarter turns, g in [-1/2, 1/2): the low 30 bits as a signed number.
    g = (w1 << 2).to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10  # 2^-32
    g2 = g * g
    s = tl.fma(g2, -0.004685972, 0.079712525)
    s = tl.fma(s, g2, -0.64596665)
    s = tl.fma(s, g2, 1.5707964) * g
    c = tl.fma(g2, -0.02041453, 0.2536024)
    c = tl.fma(c, g2, -1.2336977)
    c = tl.fma(c, g2, 1.0)
    # A quarter turn takes (c, s) to (-s, c), a half turn changes both signs.
    quarter = ((w1 << 1) + 0x40000000).to(tl.int32, bitcast=True) < 0
    half = (w1 + 0x20000000) & 0x80000000
    radius = (radius.to(tl.uint32, bitcast=True) ^ half).to(tl.float32, bitcast=True)
    return radius * tl.where(quarter, -s, c), radius * tl.where(quarter, c, s)


@triton.jit
def normal_quad(seed, stream, block):
    """Return the four normals of each Philox block. They belong to four neighbouring elements of the sample."""
    w0, w1, w2, w3 = philox(seed, stream, block)
    z0, z1 = normal_pair(w0, w1)
    z2, z3 = normal_pair(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def normal_at(seed, stream, index):
    """Return the normals of single elements, for tiles that do not hold whole blocks.

    This is four times the work of `normal_quad`.
    """
    w0, w1, w2, w3 = philox(seed, stream, index >> 2)
    second = (index & 2) != 0
    even, odd = normal_pair(tl.where(second, w2, w0), tl.where(second, w3, w1))
    return tl.where((index & 1) != 0, odd, even)
