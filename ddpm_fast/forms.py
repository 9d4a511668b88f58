"""Options whose value has a form of its own. A command has it as text, and Python as text, numbers or lists."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any, Protocol

from .errors import InvalidType, expect

Pairs = tuple[tuple[float, float], ...]
"""(low, high) of values: one pair for all channels, or one per channel."""


class Form(Protocol):
    """The form of an option's value."""

    @staticmethod
    def parse(name: str, value: Any) -> Any:
        """Return the value in its plain form.

        Args:
            name: Name of the option.
            value: What was given.

        Raises:
            TypeError: It has another type.
            ValueError: It has another form.
        """


class Bytes:
    """A number of bytes: an int, or text with a unit such as 2GiB."""

    @staticmethod
    def parse(name: str, value: Any) -> int:
        """Return the number. See `Form`."""
        match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?) ?(?:([KMGT]?)(i?)B)?", str(value).strip(), re.I | re.A)
        wanted = "to be a number of bytes or text such as 200MiB, 2GiB or 500MB"
        if not (isinstance(value, str) or _is_int(value)):
            raise InvalidType(name, wanted, repr(value))
        expect(match is not None and (match[2] or not match[3]), name, wanted, repr(value))
        assert match is not None
        power = " KMGT".index((match[2] or " ").upper())
        return int(Decimal(match[1]) * (1024 if match[3] else 1000) ** power)


class Size:
    """(height, width), one number for both, or text such as 48x32, which is width x height."""

    @staticmethod
    def parse(name: str, value: Any) -> int | tuple[int, int]:
        """Return the pair, or the number. See `Form`."""
        if isinstance(value, str):
            match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", value.lower(), re.ASCII)
            expect(match is not None, name, "to be a width and height such as 64 or 48x32", repr(value))
            assert match is not None
            width, height = match.groups()
            return int(width) if height is None else (int(height), int(width))
        sides = value if isinstance(value, (list, tuple)) else [value] * 2
        if len(sides) != 2 or not all(map(_is_int, sides)):
            raise InvalidType(name, "to be a pair of integers, or one", repr(value))
        return tuple(value) if sides is value else value


class Numbers:
    """Integers: a list, or text such as "16,8", or "none"."""

    @staticmethod
    def parse(name: str, value: Any) -> tuple[int, ...]:
        """Return the numbers. See `Form`."""
        if isinstance(value, str):
            parts = [] if value == "none" else value.split(",")
            whole = all(re.fullmatch(r" *-?[0-9]{1,18} *", part, re.ASCII) for part in parts)
            expect(whole, name, "to be whole numbers separated by commas", repr(value))
            return tuple(map(int, parts))
        if not isinstance(value, (list, tuple)) or not all(map(_is_int, value)):
            raise InvalidType(name, "to be a list of integers", repr(value))
        return tuple(value)


class Texts:
    """A list of texts. One text is a list of its letters to Python, so it is refused."""

    @staticmethod
    def parse(name: str, value: Any) -> tuple[str, ...]:
        """Return the texts. See `Form`."""
        if not isinstance(value, (list, tuple)) or any(not isinstance(each, str) for each in value):
            raise InvalidType(name, "to be a list of strings", repr(value))
        return tuple(value)


class Ranges:
    """(low, high) of values, for all channels, or a pair for each channel."""

    @staticmethod
    def parse(name: str, value: Any) -> Pairs:
        """Return the pairs, one or one for each channel. In each, float32 must have 256 values. See `Form`."""
        from .checks import check_number

        pairs = value if isinstance(value, (list, tuple)) and value and isinstance(value[0], (list, tuple)) else (value,)
        for pair in pairs:
            expect(isinstance(pair, (list, tuple)) and len(pair) == 2, name, "to be two numbers, or two a channel", repr(value))
            for bound in pair:
                check_number(name, bound, finite=True)
            low, high = pair
            largest = max(abs(low), abs(high))
            expect(low < high, name, "to have the lower number first", pair)
            resolved = largest < 2.0**128 and high - low >= max(2.0**-126, 2.0**-15 * largest)
            expect(resolved, name, "to hold at least 256 values of float32", f"{pair}; subtract an offset or scale the values")
        return tuple((float(low), float(high)) for low, high in pairs)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
