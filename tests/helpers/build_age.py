"""The age of the native module, compared with its sources."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def why_old(root: Path = ROOT) -> str | None:
    """Return which source has changed since the native module was built, or None."""
    modules = [path.stat().st_mtime for path in (root / "ddpm_fast").glob("_native*.so")]
    sources = [root / "CMakeLists.txt", *(path for path in (root / "csrc").rglob("*") if path.is_file())]
    newest = max(sources, key=lambda path: path.stat().st_mtime)
    is_old = bool(modules) and newest.stat().st_mtime > max(modules)
    return f"{newest.relative_to(root)} is newer than the module" if is_old else None
