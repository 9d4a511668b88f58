"""Data sets: items of an image, a label and a condition, read by index."""
