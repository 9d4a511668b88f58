"""Other libraries' interfaces on this package's kernels. Their libraries are imported on use only."""

from typing import Any


def require_diffusers() -> Any:
    """The library.

    Raises:
        ModuleNotFoundError: it is not installed; says how to.
    """
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name} is missing: install it with pip install 'ddpm_fast[diffusers]'") from error
    return diffusers
