"""Training: Algorithm 1 of Ho et al. 2020 as resumable runs."""
