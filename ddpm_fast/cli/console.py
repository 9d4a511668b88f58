"""The group of commands: streams that fail, Ctrl-C, and errors on one line."""

from __future__ import annotations

import io
import os
import signal
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO, cast

import click


class Refused(click.ClickException):
    """A refusal of a command, shown on one line as click shows a bad argument."""

    exit_code = 2


class Stopped(click.ClickException):
    """The end of a command by Ctrl-C, with what has become of its work."""

    exit_code = 128 + signal.SIGINT

    def show(self, file: Any = None) -> None:
        """Print the message without "Error: " before it."""
        click.echo(self.format_message(), err=True)


class _LossyStream:
    """A text stream that drops what it cannot write. Work must not be lost for a progress bar on a closed terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Commands(click.Group):
    """The group of commands. Its streams may be closed or full, and Ctrl-C may come at any time.

    The context's object is the list of the files that the command has written.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command with streams that may fail."""
        written = kwargs.setdefault("obj", [])
        for number in range(3):
            try:
                os.fstat(number)
            except OSError:  # a closed stream: the next file that is opened would receive what is meant for it
                os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        with ExitStack() as stack:
            null = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            if sys.stdout is None:
                stack.enter_context(redirect_stdout(null))
            stack.enter_context(redirect_stderr(cast("TextIO", _LossyStream(sys.stderr or null))))
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
            try:
                return super().main(*args, **kwargs)
            except OSError as error:
                if not kwargs.get("standalone_mode", True):
                    raise
                # Files are written within `refusing`, so this is standard output.
                click.echo(f"Error: standard output: {error}. {files_written(written)}", err=True)
                with suppress(OSError, ValueError):
                    os.dup2(null.fileno(), sys.stdout.fileno())  # or Python would try to write the rest when it ends
                sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command, and say at Ctrl-C what it has written."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Stopped(f"Stopped by Ctrl-C. {files_written(ctx.obj)}") from None


def files_written(written: list[Path]) -> str:
    """Return a sentence that names the files."""
    return f"Written: {', '.join(map(str, written))}." if written else "Nothing was written."
