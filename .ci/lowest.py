"""Print the lowest versions that pyproject.toml allows, as requirements for pip: python3 .ci/lowest.py [EXTRA ...].

Tools that only check the sources, or build, are left out: they are no part of what a user runs.
"""

import re
import sys
import tomllib
from pathlib import Path

TOOLS = ("ruff", "mypy", "clang-format", "setuptools", "cmake", "ninja", "pybind11", "pre-commit")


def main() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted, names = list(project["dependencies"]), sys.argv[1:]
    while names:
        for requirement in extras[names.pop()]:
            own = re.fullmatch(r"ddpm_fast\[(.+)\]", requirement)
            if own:
                names += own[1].split(",")
            else:
                wanted.append(requirement)
    for requirement in sorted(set(wanted)):
        name, version = re.match(r"([\w.-]+)(?:>=([\w.]+))?", requirement).groups()
        if name not in TOOLS and version:
            print(f"{name}=={version}")


if __name__ == "__main__":
    main()
