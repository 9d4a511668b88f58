"""The group of commands: streams that fail, Ctrl-C, and errors on one line."""

from __future__ import annotations

import io
import os
import signal
import sys
from contextlib import redirect_stderr, suppress
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


# Options whose smaller values need less memory.
_SIZES = ("num_samples", "num", "batch_size", "micro_batch_size", "image_size", "channels", "data_memory")


class _Unfailing:
    """Standard error that drops what cannot be written, so that training goes on under a closed terminal or on a full disk."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Command(click.Command):
    """A command that prints an error which a user can mend as one line, with the names of its options. Others are bugs."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, with log lines above its progress bars."""
        from tqdm.contrib.logging import logging_redirect_tqdm

        options = {each.name: each.opts[0] for each in self.params if isinstance(each, click.Option)}
        names: dict[str, str] = {name: options.get(name, name.upper()) for name in ctx.params}
        try:
            with logging_redirect_tqdm():
                return super().invoke(ctx)
        except ArgumentError as error:
            name = error.name if error.file else names.get(error.name, error.name)  # a file has its own names
            raise Refused(_noted(error, error.renamed(caller=self.name or "", name=name))) from error
        except BrokenPipeError:  # a reader that has left, such as `head`
            raise
        except (ValueError, TypeError, ImportError, OSError) as error:
            raise Refused(_noted(error)) from error
        except FloatingPointError as error:
            raise click.ClickException(str(error)) from error
        except (MemoryError, RuntimeError) as error:
            import torch  # the command has loaded it

            from ..distributed import FirstFailed, ProcessLost

            if isinstance(error, FirstFailed):  # rank 0 says why
                ctx.exit(1)
            if isinstance(error, ProcessLost):
                raise click.ClickException(_noted(error)) from error
            _, host, reason = str(error).rpartition("DefaultCPUAllocator: ")  # a RuntimeError without a type of its own
            if not host and not isinstance(error, MemoryError | torch.OutOfMemoryError):
                raise
            smaller = " or ".join(names[name] for name in _SIZES if name in names)
            hint = f"; a smaller {smaller} needs less" if smaller else ""
            said = f"out of memory{hint}: {reason.partition(chr(10))[0] or 'no reason given'}"
            raise Refused(_noted(error, said)) from error


def _noted(error: Exception, text: object = None) -> str:
    """Return an error, or another text for it, with the notes that were added on its way."""
    return "; ".join([str(error if text is None else text), *getattr(error, "__notes__", ())])


class Commands(click.Group):
    """The group of commands. Its streams may be closed, and Ctrl-C may come at any time.

    The context's object is the list of the files that the command has written.
    """

    command_class = Command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command with streams that may be closed."""
        kwargs.setdefault("obj", [])
        for number in range(3):
            try:
                os.fstat(number)
            except OSError:  # a closed stream: the next file that is opened would receive what is meant for it
                os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
        with (
            open(os.devnull, "w", encoding="utf-8") as null,
            redirect_stderr(cast("TextIO", _Unfailing(sys.stderr or null))),
        ):
            return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command, and say at Ctrl-C what it has written."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            written = f"Written: {', '.join(map(str, ctx.obj))}." if ctx.obj else "Nothing was written."
            raise Stopped(f"Stopped by Ctrl-C. {written}") from None
