"""Other libraries' interfaces on this package's kernels. Their libraries are imported on use only."""
