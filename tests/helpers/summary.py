"""The last lines of a run: which tests did not run, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

# Why the settings of a run leave out a test, in the words of its last lines.
SLOW = "slow: `make check-all` runs them"
DATA_SETS = "read a published data set: `make check-all` runs them"
CASES = "further cases of tests that ran: `make check-all` runs them"
PASSED = "passed before on the same tree: --skip-passed leaves them out"
CHOSEN = "left out by -k, -m or --deselect"
OTHERS = "for {} other reasons: the option -rs lists them"


def lines(left_out: Mapping[str, int], skipped: Mapping[str, int], most: int = 9, width: int = 100) -> list[str]:
    """Return one line for each reason, the most frequent first.

    Args:
        left_out: Numbers of tests that the run's settings leave out, by reason.
        skipped: Numbers of tests that skipped themselves, by reason.
        most: The largest number of lines. If there are more reasons for skipping, the rarest share the last line.
        width: The largest number of characters in a line.
    """
    reasons = Counter(skipped).most_common()
    room = most - len(left_out)
    if len(reasons) > room:
        rare = reasons[room - 1 :]
        reasons[room - 1 :] = [(OTHERS.format(len(rare)), sum(count for _, count in rare))]
    rows = [("not run", *row) for row in Counter(left_out).most_common()] + [("skipped", *row) for row in reasons]
    texts = (f"{what} {count:6}  {' '.join(reason.split())}" for what, reason, count in rows)
    return [text if len(text) <= width else f"{text[: width - 3]}..." for text in texts]
