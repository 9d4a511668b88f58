"""Print a digest of what the native module is compiled from. The module has that of its build: `build_info()["sources"]`."""

import hashlib
from pathlib import Path

HERE = Path(__file__).resolve().parent


def digest() -> str:
    """Return the digest of CMakeLists.txt and of the sources in this folder, of their names and contents."""
    files = [path for path in HERE.rglob("*") if path.suffix in {".h", ".cpp", ".cu"}]
    contents = hashlib.sha256()
    for path in sorted([*files, HERE.parent / "CMakeLists.txt"]):
        data = path.read_bytes()
        contents.update(f"{path.relative_to(HERE.parent).as_posix()} {len(data)}\n".encode() + data)
    return contents.hexdigest()


if __name__ == "__main__":
    print(digest())
