"""Errors of arguments: the text that their parts make, and their names for another caller."""

from __future__ import annotations

import copy
import pickle

import pytest
from refusals import refused

from ddpm_fast.errors import ArgumentError, InvalidType, InvalidValue, UnusablePath, expect, renaming

QUOTED = OSError(2, "No such file")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (InvalidValue("noise", "n", "to be positive", -1), "noise: expected n to be positive, got -1"),
        (InvalidType("", "dataset[3]", "to be an image", "int"), "expected dataset[3] to be an image, got int"),
        (InvalidValue("f", "", "exactly one of a and b", "both"), "f: expected exactly one of a and b, got both"),
        (UnusablePath("f", "out", "to be readable", QUOTED), "f: expected out to be readable, got: [Errno 2] No such file"),
        (
            InvalidValue("f", "unet.dropout", "to be a number", None, "a.json"),
            "f: expected unet.dropout to be a number, got None, in 'a.json'",
        ),
    ],
)
def test_parts_make_the_text(error: ArgumentError, text: str) -> None:
    assert str(error) == text
    for other in (copy.copy(error), pickle.loads(pickle.dumps(error))):  # as between processes
        assert type(other) is type(error)
        assert str(other) == text
        assert vars(other) == vars(error)


def test_a_renamed_error_leaves_the_first_as_it_is() -> None:
    error = InvalidValue("f", "x", "to be 1", 2)
    assert str(error.renamed(caller="g", name="--x")) == "g: expected --x to be 1, got 2"
    assert str(error) == "f: expected x to be 1, got 2"
    assert repr(error.renamed(name="y")) == "InvalidValue('f', 'y', 'to be 1', '2', None)"


def test_a_renamed_error_keeps_where_it_was_raised() -> None:
    with pytest.raises(InvalidValue) as error, renaming("g"):
        expect(False, "f", "x", "to be 1", 2)
    assert error.traceback[-1].name == "expect"


def test_a_caller_renames_what_its_body_raises() -> None:
    @renaming("load", {"x": "path"})
    def load(name: str) -> None:
        expect(not name, "f", name, "to be empty", name)

    load("")
    with refused(InvalidValue("load", "path", "to be empty", "x")):
        load("x")
    with refused(InvalidValue("load", "y", "to be empty", "y")):
        load("y")
    with pytest.raises(KeyError), renaming("load"):
        raise KeyError
