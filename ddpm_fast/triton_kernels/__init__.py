"""Triton backend: one module per op, with its kernels and a launcher named like the op.

A launcher takes the results and the arguments of its op by name, as `ddpm_fast.ops.execution.Execution` prepares them: dense,
in one memory format, which it reads from the strides. Kernels use no inline assembly and no libdevice
call, so Triton's interpreter runs them too.
"""
