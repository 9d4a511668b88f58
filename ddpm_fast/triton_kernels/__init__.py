"""Triton backend: one module per op, with its kernels and a launcher named like the op.

Launchers expect preallocated dense outputs and read the memory format (contiguous or channels_last) from
the strides. `ddpm_fast.ops` has checked their arguments. Kernels use no inline assembly and no libdevice
call, so Triton's interpreter runs them too.
"""
