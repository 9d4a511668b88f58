"""The Triton family: one module an op, with its kernels and a launcher of the op's name that `ddpm_fast.ops` calls.

Launchers take preallocated, dense outputs and read the layout (contiguous or channels_last) off the strides. They check nothing
that `ddpm_fast.ops` has checked. Kernels use no inline assembly and no libdevice, so that Triton's interpreter runs them too.
"""
