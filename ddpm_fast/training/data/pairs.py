"""Pairs: the item of a condition that belongs to each item of a data set.

| items of the data set | items of the condition | belong together by |
|---|---|---|
| files of a folder or an archive | files of a folder or an archive | their paths without endings, `cat/1.png` and `cat/1.npy` |
| rows of an array or a table | rows of an array or a table | their numbers |
| files | rows | nothing: this is an error, as the order of files is that of their names as text, 0, 1, 10, 11, 2 |
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from ...checks import listed
from ...errors import InvalidValue, expect
from .arrays import Arrays
from .image_files import ImageFiles


def partners(source: ImageFiles | Arrays, paired: ImageFiles | Arrays) -> Sequence[int]:
    """Return the number of the item of `paired` that belongs to each item of `source`, as the module's table says.

    Raises:
        ValueError: The items cannot be matched, one has no partner, or two have one name. The message names both sources.
    """
    count, number = len(source.labels), len(paired.labels)
    if source.numbered and paired.numbered:
        expect(
            count == number,
            "load_dataset",
            "condition",
            f"to have {count} rows, as {source.root}",
            f"{number} in {paired.root}",
        )
        return range(count)
    if source.numbered or paired.numbered:
        wanted = "one array file or one table" if source.numbered else "a folder or an archive with files of the same names"
        got = f"{paired.root}, whose items are {'rows' if paired.numbered else 'files'}"
        raise InvalidValue("load_dataset", "condition", f"to be {wanted}, as {source.root} is", got)
    names, others = ([os.path.splitext(file)[0] for file in each.names] for each in (source, paired))
    for stems, root in ((names, source.root), (others, paired.root)):
        twice = [name for name, times in Counter(stems).items() if times > 1]
        got = f"several in {root} that differ in their endings alone: {listed(twice)}"
        expect(not twice, "load_dataset", "condition", f"to have one file of each name, as must {source.root}", got)
    for missing, root in ((set(names) - set(others), paired.root), (set(others) - set(names), source.root)):
        wanted = f"to have files of the same names as {source.root}"
        expect(not missing, "load_dataset", "condition", wanted, f"none named {listed(missing)} in {root}")
    numbers = {name: number for number, name in enumerate(others)}
    return [numbers[name] for name in names]
