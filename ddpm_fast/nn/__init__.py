"""ddpm_fast.nn."""
