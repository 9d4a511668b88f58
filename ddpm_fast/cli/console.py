"""The group of commands: streams that fail, Ctrl-C, and errors on one line."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO, cast

import click

from ..errors import ArgumentError


class Refused(click.ClickException):
    """A refusal of a command, shown on one line as click shows a bad argument."""

    exit_code = 2


class Stopped(click.ClickException):
    """Raised when Ctrl-C ends a command. The text says what has become of its work."""

    exit_code = 128 + signal.SIGINT

    def show(self, file: Any = None) -> None:
        """Print the message without "Error: " before it."""
        click.echo(self.format_message(), err=True)


# Options by the names that the package's functions have for them.
_ALIASES = {
    "num_samples": "num",
    "num_steps": "steps",
    "jump_num_sample": "jump_samples",
    "class_labels": "classes",
    "guidance_scale": "guidance",
    "name": "data",
}
# Options whose smaller values need less memory.
_SIZES = ("num", "batch_size", "micro_batch_size", "image_size", "channels", "data_memory")


class _Stream:
    """A text stream of this process.

    Args:
        stream: The stream.
        fails: A function to call with the error if text cannot be written. If it returns, the text is dropped.
    """

    def __init__(self, stream: TextIO, fails: Callable[[Exception], None]) -> None:
        self._stream, self._fails = stream, fails

    def write(self, text: str) -> int:
        try:
            return 0 if text == "" else self._stream.write(text)  # click writes "" as a trial, and catches errors
        except (OSError, ValueError) as error:
            self._fails(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._fails(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _OutputFails(Exception):
    """Raised if standard output, and no other file, cannot be written."""


def _raise_output_fails(error: Exception) -> None:
    raise _OutputFails(str(error)) from error


class Command(click.Command):
    """A command that prints an error which a user can mend as one line, with the names of its options. Others are bugs."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, with log lines above its progress bars."""
        from tqdm.contrib.logging import logging_redirect_tqdm

        options = {each.name: each.opts[0] for each in self.params if isinstance(each, click.Option)}
        names: dict[str, str] = {name: options.get(name, name.upper()) for name in ctx.params}
        names = {alias: names[name] for alias, name in _ALIASES.items() if name in names} | names
        try:
            with logging_redirect_tqdm():
                return super().invoke(ctx)
        except ArgumentError as error:
            name = error.name if error.file else names.get(error.name, error.name)  # a file has its own names
            raise Refused(str(error.renamed(caller=self.name or "", name=name))) from error
        except (ValueError, TypeError, ImportError, OSError) as error:
            raise Refused(str(error)) from error
        except FloatingPointError as error:
            raise click.ClickException(str(error)) from error
        except (MemoryError, RuntimeError) as error:
            import torch  # the command has loaded it

            from ..distributed import FirstFailed, ProcessLost

            if isinstance(error, FirstFailed):  # rank 0 says why
                ctx.exit(1)
            if isinstance(error, ProcessLost):
                raise click.ClickException(str(error)) from error
            _, host, reason = str(error).rpartition("DefaultCPUAllocator: ")  # a RuntimeError without a type of its own
            if not host and not isinstance(error, MemoryError | torch.OutOfMemoryError):
                raise
            smaller = " or ".join(names[name] for name in _SIZES if name in names)
            hint = f"; a smaller {smaller} needs less" if smaller else ""
            raise Refused(f"out of memory{hint}: {reason.partition(chr(10))[0] or 'no reason given'}") from error


class Commands(click.Group):
    """The group of commands. Its streams may be closed or full, and Ctrl-C may come at any time.

    The context's object is the list of the files that the command has written.
    """

    command_class = Command

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
            stack.enter_context(redirect_stderr(cast("TextIO", _Stream(sys.stderr or null, lambda error: None))))
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
            stack.enter_context(redirect_stdout(cast("TextIO", _Stream(sys.stdout or null, _raise_output_fails))))
            try:
                return super().main(*args, **kwargs)
            except (OSError, _OutputFails) as error:  # an OSError is of bytes, such as those of shell completion
                if not kwargs.get("standalone_mode", True):
                    raise
                with suppress(OSError, ValueError):
                    os.dup2(null.fileno(), sys.stdout.fileno())  # or Python would try to write the rest when it ends
                if not isinstance(error.__cause__ or error, BrokenPipeError):  # a reader that has left, such as `head`
                    click.echo(f"Error: standard output: {error}. {files_written(written)}", err=True)
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
