"""Copy the working tree, as git would commit it, to a folder: python3 .ci/copy_tree.py FOLDER.

Files that are new, changed or gone are copied or removed; what was built in the folder stays. Files keep their times, so an
unchanged source is not compiled again. FOLDER/build/copied.json lists the files with their times and sizes. It is the same in
two copies of the same tree.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def state(path: Path) -> list[int]:
    return [path.stat().st_mtime_ns, path.stat().st_size]


def main() -> None:
    target = Path(sys.argv[1])
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.split("\0")
    wanted = {name for name in names if name and (ROOT / name).is_file()}
    record = target / "build" / "copied.json"  # what the last copy had
    before = set(json.loads(record.read_text())) if record.exists() else set()
    for name in before - wanted:
        (target / name).unlink(missing_ok=True)
        for folder in (target / name).parents:
            if folder == target or not folder.is_dir() or any(folder.iterdir()):
                break
            folder.rmdir()
    for name in wanted:
        source, copy = ROOT / name, target / name
        if not copy.exists() or state(copy) != state(source):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({name: state(target / name) for name in sorted(wanted)}, indent=0))


if __name__ == "__main__":
    main()
