"""Drop-ins for other libraries. Each library is imported only when it is used."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """Wrap imports, so that a ModuleNotFoundError names the extra that installs the library.

    Args:
        name: Name of the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        message = f"{error.name} is missing: install it with pip install 'ddpm_fast[{name}]'"
        raise ModuleNotFoundError(message, name=error.name) from error
