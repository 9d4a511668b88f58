"""The sources of the native module, compared with those that it was built from."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def why_old(root: Path = ROOT) -> str | None:
    """Return that the sources changed since the native module was built, or None."""
    from ddpm_fast.ops import backend  # after `environment`, whose variables it reads

    now: str = runpy.run_path(str(root / "csrc" / "digest.py"))["digest"]()
    is_old = bool(backend.BUILD) and backend.BUILD.get("sources") != now  # without a module there is nothing to say
    return "csrc or CMakeLists.txt has changed" if is_old else None
