"""Fused kernels for denoising diffusion probabilistic models (Ho et al. 2020) in PyTorch.

The public names of `__init__.pyi` are imported when they are first used, so that `ddpm-fast --help` need not wait for PyTorch.
"""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from .version import __version__ as __version__

# Each name of the stub, which type checkers read, and its module.
_STUB = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_MODULE_BY_NAME = {name: module for module, name in re.findall(r"^from \.(\S+) import ([A-Za-z]\w*) as ", _STUB, re.MULTILINE)}

__all__ = sorted(_MODULE_BY_NAME)


def __getattr__(name: str) -> Any:
    """Import a public name, or a submodule, when it is first used."""
    if name in _MODULE_BY_NAME:
        value = getattr(import_module(f".{_MODULE_BY_NAME[name]}", __name__), name)
        globals()[name] = value
        return value
    if not name.isidentifier() or name.startswith("__"):  # such as __path__, or __main__, which runs the command line
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return __all__
