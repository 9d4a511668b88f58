"""ddpm_fast.ops."""
