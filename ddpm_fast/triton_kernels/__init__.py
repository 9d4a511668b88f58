"""ddpm_fast.triton_kernels."""
