"""Drawing images: `Sampler` and `sample`, editing, and many images as files."""
