"""Other people's objects with methods of ours: an object's class is exchanged for one derived from it, and back.

An object that is patched instead (`block.forward = ...`) takes its method along where it should not go: replicas call the
original's, and pickles cannot hold it. A class has none of that, and leaves nothing in the object.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, cast


class Swapped:
    """The first base of a class that `swap` makes; the object's own class is the second, and lends it its name.

    Names stay because libraries go by them: for adapters, for offloading, for what they write to configurations.
    """

    swapped_from: type

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Of pickle and deepcopy: the object as its own class makes it, then swapped. No module has the swapped class."""
        make, arguments, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        mixin, own, swapped = type(self).__mro__[1], self.swapped_from, type(self)
        return (_remake, (mixin, make, tuple(own if argument is swapped else argument for argument in arguments)), *state)


def swap(thing: Any, mixin: type[Swapped]) -> None:
    """Has `mixin`'s methods go before those of the object's class."""
    thing.__class__ = _swapped_class(mixin, type(thing))


def unswap(thing: Any) -> None:
    """Gives an object that `swap` has changed its own class back."""
    thing.__class__ = thing.swapped_from


def own_class(thing: Any) -> type:
    """The object's class, whether `swap` has changed it or not."""
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
