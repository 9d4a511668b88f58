"""Other libraries' interfaces on this package's kernels. Their libraries are imported on use only."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """Around imports: where a library is missing, the error names the extra that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        message = f"{error.name} is missing: install it with pip install 'ddpm_fast[{name}]'"
        raise ModuleNotFoundError(message, name=error.name) from error
