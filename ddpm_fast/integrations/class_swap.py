"""Methods for other libraries' objects: an object's class is replaced by a subclass, and restored.

A patched method (`block.forward = ...`) is copied to places where it does not belong. Replicas would
call the original's method, and pickle cannot store it. A class has neither problem and leaves nothing
in the object.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, cast


class Swapped:
    """First base of a class made by `swap`. The object's own class is the second base and gives the name.

    Names stay the same, because libraries depend on them for adapters, offloading and configurations.
    """

    swapped_from: type

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and copy the object as its own class does, then swap the copy.

        The swapped class is in no module, so pickle cannot find it.
        """
        make, arguments, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        mixin, own, swapped = type(self).__mro__[1], self.swapped_from, type(self)
        return (_remake, (mixin, make, tuple(own if argument is swapped else argument for argument in arguments)), *state)


def swap(thing: Any, mixin: type[Swapped]) -> None:
    """Give `mixin`'s methods priority over those of the object's class."""
    thing.__class__ = _swapped_class(mixin, type(thing))


def unswap(thing: Any) -> None:
    """Restore the class of an object that `swap` has changed."""
    thing.__class__ = thing.swapped_from


def own_class(thing: Any) -> type:
    """Return the object's class before `swap`."""
    return thing.swapped_from if isinstance(thing, Swapped) else type(thing)


_CLASSES: dict[tuple[type, type], type] = {}  # one of a kind, so that compiled code finds the class it was compiled for


def _swapped_class(mixin: type[Swapped], own: type) -> type:
    if (mixin, own) not in _CLASSES:
        names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__, "swapped_from": own}
        _CLASSES[mixin, own] = types.new_class(own.__name__, (mixin, own), exec_body=lambda body: body.update(names))
    return _CLASSES[mixin, own]


def _remake(mixin: type[Swapped], make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    thing = make(*arguments)
    swap(thing, mixin)
    return thing
