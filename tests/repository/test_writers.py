"""Every file that the package replaces goes through files/writing.py. The exceptions are listed here."""

from __future__ import annotations

import ast
from pathlib import Path

import ddpm_fast

PACKAGE = Path(ddpm_fast.__file__).parent
WRITING = frozenset(
    {
        *("write_text", "write_bytes", "touch", "rename", "symlink_to", "hardlink_to", "truncate", "ftruncate", "tofile"),
        *("save", "save_file", "savefig", "savez", "dump", "copyfile", "copy2", "copytree", "move", "SummaryWriter"),
        *("NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory", "mkstemp", "mkdtemp", "fdopen"),
    }
)
# (file, function, call) -> why it may.
ALLOWED = {
    ("cli/console.py", "main", "open"): "the null device",
    ("cli/console.py", "main", "os.open"): "the null device",
    ("cli/outputs.py", "check_output", "tempfile.TemporaryFile"): "a trial without a name",
    ("cli/outputs.py", "write", "save"): "a function that is given, which replaces a file",
    ("publishing.py", "push_to_hub", "tempfile.TemporaryDirectory"): "what is uploaded",
    ("files/images.py", "image_format", "Image.new(mode, (2, 2)).save"): "into memory",
    ("files/images.py", "_write", "first.save"): "into the file of `replacing`",
    ("sampling/sample_formats.py", "_npy", "np.save"): "into memory",
    ("sampling/sample_formats.py", "_png", "picture.save"): "into memory",
    ("sampling/sample_formats.py", "_pack", "archive.open"): "a member of an archive that `replacing` writes",
    ("sampling/sample_formats.py", "_pack", "whole.replace"): "an archive that is whole",
    ("training/log.py", "__init__", "SummaryWriter"): "TensorBoard writes its own event files",
    ("training/checkpoint.py", "_point_to", "link.replace"): "a link",
    ("training/checkpoint.py", "_point_to", "link.symlink_to"): "a link",
    ("training/log.py", "row", "open"): "a row is appended",
    ("training/log.py", "_open_itself", "os.open"): "a row is appended",
    ("training/checkpoint.py", "_remove", "checkpoint.rename"): "a folder that is removed",
    ("training/checkpoint.py", "add", "temporary.rename"): "a folder that is whole",
}


def _writes(call: ast.Call) -> bool:
    """Return whether a call may create, change or name a file."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name == "replace":  # Path.replace has one argument, str.replace has two
        return isinstance(call.func, ast.Attribute) and len(call.args) == 1 and not call.keywords
    if name == "open":
        texts = [node.value for node in ast.walk(call) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        is_mode = any(set(text) <= set("rwaxbt+") and set(text) & set("wax+") for text in texts)
        return is_mode or (ast.unparse(call.func) == "os.open" and "os.O_RDONLY" not in ast.unparse(call))
    return name in WRITING and (
        isinstance(call.func, ast.Attribute) or name not in ("write_bytes", "write_text", "write_tensors")
    )


def writers(source: str, file: str) -> set[tuple[str, str, str]]:
    return {
        (file, function.name, ast.unparse(call.func))
        for function in ast.walk(ast.parse(source))
        if isinstance(function, ast.FunctionDef)
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and _writes(call)
    }


def test_every_file_is_replaced_by_one_module() -> None:
    files = [file for file in PACKAGE.rglob("*.py") if file.name != "writing.py"]
    found = [writers(file.read_text(encoding="utf-8"), str(file.relative_to(PACKAGE))) for file in files]
    assert set().union(*found) == set(ALLOWED)


def test_the_search_sees_each_way_to_write() -> None:
    source = """
def f(path, x, flags):
    path.open("w"); open(path, "ab"); open(path); path.open("rb"); os.open(path, flags); os.open(path, os.O_RDONLY)
    path.write_text(x); path.replace(x); x.replace("a", "b"); torch.save(x, path); write_text(path, x); path.rename(x)
"""
    assert sorted(call for _, _, call in writers(source, "")) == [
        *("open", "os.open", "path.open", "path.rename", "path.replace", "path.write_text", "torch.save"),
    ]
