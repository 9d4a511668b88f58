"""Reasons to stop a run: signals, and an agreement of all processes."""

from __future__ import annotations

import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Final

from ..distributed import Processes, ProcessLost


class StopSignals:
    """A context that records the first SIGINT, SIGTERM or SIGHUP.

    Later ones are ignored, as launchers repeat them while a checkpoint is written. Only the main thread receives signals.
    A SIGHUP that is ignored, as under nohup, stays so.

    Args:
        once: Let a SIGINT after the first signal act as usual.
    """

    def __init__(self, *, once: bool) -> None:
        self.received: str | None = None
        self._once = once
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            hangup = getattr(signal, "SIGHUP", None)  # a terminal that is closed; Windows has none
            for number in (signal.SIGINT, signal.SIGTERM, hangup):
                if number is not None and not (number == hangup and signal.getsignal(number) is signal.SIG_IGN):
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number).name
            if self._once:
                signal.signal(signal.SIGINT, self._previous.pop(signal.SIGINT))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


class Stops:
    """An agreement of all processes to stop after the same step, which is the one after a process has a reason."""

    _REASONS: Final[tuple[str | None, ...]] = (None, "max_minutes", "SIGHUP", "SIGTERM", "SIGINT")

    def __init__(self, team: Processes) -> None:
        self._team = team
        self._largest = team.largest(0)

    def agreed(self, reason: str | None) -> str | None:
        """Tell the others this process's reason to stop. Return the reason of all, of the step before."""
        if self._team.size == 1:
            return reason
        agreed = self._REASONS[self._largest()]
        self._largest = self._team.largest(self._REASONS.index(reason))
        return agreed

    def close(self) -> None:
        """Wait for what is under way."""
        with suppress(ProcessLost):  # the error that ends the run is raised already, or all steps are done
            self._largest()
