"""Errors of arguments: the text that their parts make, and how public functions and commands name them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

import pytest
from refusals import by, refused

from ddpm_fast.errors import (
    ArgumentError,
    InvalidType,
    InvalidValue,
    UnusablePath,
    expect,
    public,
    public_methods,
    renaming,
)

Function = TypeVar("Function", bound=Callable[..., Any])

QUOTED = OSError(2, "No such file")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (by("noise", InvalidValue("n", "to be positive", -1)), "noise: expected n to be positive, got -1"),
        (InvalidType("dataset[3]", "to be an image", "int"), "expected dataset[3] to be an image, got int"),
        (by("f", InvalidValue("", "exactly one of a and b", "both")), "f: expected exactly one of a and b, got both"),
        (by("f", UnusablePath("out", "to be readable", QUOTED)), "f: expected out to be readable, got: [Errno 2] No such file"),
        (
            by("f", InvalidValue("unet.dropout", "to be a number", None, "a.json")),
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


def test_a_new_error_names_no_caller() -> None:
    error = InvalidValue("x", "to be 1", 2)
    assert error.caller == ""
    assert str(error) == "expected x to be 1, got 2"


def test_a_renamed_error_leaves_the_first_as_it_is() -> None:
    error = by("f", InvalidValue("x", "to be 1", 2))
    assert str(error.renamed(caller="g", name="--x")) == "g: expected --x to be 1, got 2"
    assert str(error.renamed(name="y")) == "f: expected y to be 1, got 2"
    assert str(error) == "f: expected x to be 1, got 2"
    assert repr(error.renamed(name="y")) == "InvalidValue('y', 'to be 1', '2', None)"


def test_a_renamed_error_keeps_where_it_was_raised() -> None:
    with pytest.raises(InvalidValue) as error, renaming({"x": "y"}):
        expect(False, "x", "to be 1", 2)
    assert error.traceback[-1].name == "expect"


def test_a_function_renames_what_its_body_raises() -> None:
    @renaming({"x": "path"})
    def load(name: str, caller: str = "") -> None:
        if name:
            raise by(caller, InvalidValue(name, "to be empty", name, "a.json"))

    load("")
    with refused(InvalidValue("path", "to be empty", "x", "a.json")):
        load("x")
    with refused(InvalidValue("y", "to be empty", "y", "a.json")):
        load("y")
    with refused(by("read", InvalidValue("path", "to be empty", "x", "a.json"))):
        load("x", "read")
    with pytest.raises(KeyError), renaming({"x": "path"}):
        raise KeyError


def test_a_renamed_error_has_the_cause_of_the_first() -> None:
    with pytest.raises(InvalidValue) as error, renaming({"x": "path"}):
        raise InvalidValue("x", "to be readable", QUOTED) from QUOTED
    assert error.value.__cause__ is QUOTED


# ------------------------------------------------------------------------------------------------------- public functions

WRONG = InvalidValue("x", "to be 1", 2)


def packaged(function: Function) -> Function:
    """Return a function as a module of the package has it, which `public` knows by the name in its globals."""
    scope = globals() | {"__name__": "ddpm_fast.x"}
    made: Any = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    made.__qualname__ = function.__qualname__
    return made


def check(x: int = 2) -> None:
    """Raise the error `WRONG`, which names no caller."""
    expect(x == 1, "x", "to be 1", x)


@public()
@packaged
def inner(x: int = 2) -> int:
    """Check x, with a name of its own."""
    check(x)
    return x


@public()
@packaged
def outer() -> int:
    """Call a public function from the package."""
    return inner()


@public(traced=True)
@packaged
def op() -> None:
    """Raise the error, also where torch.compile traces it."""
    check()


@public()
@packaged
def drawing() -> None:
    """Call an op from the package."""
    op()


@public("UNet")
def forward() -> None:
    """Raise the error by the name of a class."""
    check()


@public()
@packaged
def calling(callback: Callable[[], Any]) -> Any:
    """Call what the user gives."""
    return callback()


def test_the_public_function_that_the_user_calls_is_named() -> None:
    assert inner(1) == 1
    assert (inner.__name__, inner.__doc__) == ("inner", "Check x, with a name of its own.")
    with refused(WRONG):
        check()
    with refused(by("inner", WRONG.renamed())):
        inner()
    with refused(by("outer", WRONG.renamed())):
        outer()


def test_a_function_of_the_package_names_no_public_one_that_it_calls() -> None:
    with refused(WRONG):
        packaged(lambda: inner())()


@pytest.mark.parametrize("name", ["ddpm_fast", "ddpm_fast_extensions.x", "__main__", ""])
def test_modules_of_other_names_are_the_users(name: str) -> None:
    call: Any = FunctionType((lambda: inner()).__code__, globals() | {"__name__": name})
    with refused(by("inner", WRONG.renamed())):
        call()


def test_a_users_callback_names_what_it_calls() -> None:
    with refused(by("inner", WRONG.renamed())):
        calling(lambda: inner())
    with refused(by("outer", WRONG.renamed())):
        calling(lambda: outer())
    with refused(by("calling", WRONG.renamed())):  # no public function is called
        calling(lambda: check())


def test_a_traced_function_is_named_whoever_calls() -> None:
    for call in (op, packaged(lambda: op()), drawing):
        with refused(by("op", WRONG.renamed())):
            call()


def test_a_public_function_may_have_another_name() -> None:
    with refused(by("UNet", WRONG.renamed())):
        forward()


def test_other_errors_pass_as_they_are() -> None:
    error = KeyError("x")

    def fail() -> None:
        raise error

    with pytest.raises(KeyError) as caught:
        calling(fail)
    assert caught.value is error
    assert not hasattr(error, "caller")


def test_a_named_error_is_the_one_that_was_raised() -> None:
    error = InvalidValue("x", "to be 1", 2)

    def fail() -> None:
        raise error

    with pytest.raises(InvalidValue) as caught:
        calling(fail)
    assert caught.value is error
    assert caught.traceback[-1].name == "fail"


# --------------------------------------------------------------------------------------------------------- public classes


class Sampler:
    """A class with methods of all kinds."""

    def __init__(self, x: int = 1) -> None:
        check(x)

    def __call__(self, x: int = 2) -> None:
        check(x)

    def __getitem__(self, x: int) -> None:
        check(x)

    def __len__(self) -> int:
        check()
        return 1

    def draw(self) -> None:
        """Raise the error."""
        check()

    @classmethod
    @packaged
    def load(cls, x: int = 2) -> Sampler:
        """Make an object, as the package does."""
        return cls(x)

    @classmethod
    def made(cls) -> type[Sampler]:
        """Return the class."""
        check(1)
        return cls

    @property
    def size(self) -> int:
        """Raise the error."""
        check()
        return 1

    @public("Sampler.other")
    def named(self) -> None:
        """Raise the error."""
        check()

    def _draw(self) -> None:
        check()

    def __eq__(self, other: object) -> bool:
        check()
        return True

    __hash__ = None  # type: ignore[assignment]


before = dict(vars(Sampler))
assert public_methods(Sampler) is Sampler


@pytest.mark.parametrize(
    ("call", "caller"),
    [
        (lambda: Sampler(2), "Sampler"),
        (lambda: Sampler()(), "Sampler"),
        (lambda: Sampler()[2], "Sampler"),
        (lambda: Sampler().draw(), "Sampler.draw"),
        (lambda: Sampler().named(), "Sampler.other"),
        (lambda: Sampler()._draw(), ""),
        (lambda: len(Sampler()), ""),
        (lambda: Sampler() == 1, ""),
        (lambda: Sampler().size, ""),
    ],
)
def test_a_method_is_named_with_its_class(call: Callable[[], object], caller: str) -> None:
    with refused(by(caller, WRONG.renamed())):
        call()


def test_a_class_method_is_named_with_its_class() -> None:
    class Child(Sampler):
        """A class that inherits it."""

    assert isinstance(vars(Sampler)["made"], classmethod)
    assert Sampler.made() is Sampler
    assert Child.made() is Child
    assert type(Child.load(1)) is Child
    for kind in (Sampler, Child):
        with refused(by("Sampler.load", WRONG.renamed())):
            kind.load()


def test_methods_that_are_not_public_stay_the_same_functions() -> None:
    changed = {name for name, member in vars(Sampler).items() if before.get(name) is not member}
    assert changed == {"__init__", "__call__", "__getitem__", "draw", "load", "made"}


def test_a_class_of_the_package_names_what_the_user_calls() -> None:
    with refused(by("calling", WRONG.renamed())):
        calling(packaged(lambda: Sampler(2)))
    with refused(by("calling", WRONG.renamed())):
        calling(packaged(lambda: Sampler().draw()))
    with refused(by("Sampler.draw", WRONG.renamed())):
        calling(lambda: Sampler().draw())
