"""Class labels by number or by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drawing import PLAN, tiny_unet
from refusals import refused

import ddpm_fast as d
from ddpm_fast.errors import InvalidValue
from ddpm_fast.inference import Interface
from ddpm_fast.options import options_of
from ddpm_fast.sampling.arguments import labels_of
from ddpm_fast.sampling.options import BatchOptions, DrawOptions, EditOptions

NAMES = ("T-shirt", "ankle boot", "BAG", "bag")


@pytest.mark.parametrize("names", [NAMES, ()])
@pytest.mark.parametrize("labels", [None, 3, -1, [0, 1], (2, 2), [], range(2), torch.tensor([1, 0]), 1.5])
def test_numbers_and_tensors_are_unchanged(names: tuple[str, ...], labels: Any) -> None:
    assert labels_of("sample", names, labels) is labels


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("t-SHIRT", 0),
        ("bag", 3),
        ("BAG", 2),
        ("Bag", 2),  # the first
        (["ankle boot", 7, "T-shirt"], [1, 7, 0]),
        (("Ankle Boot",), [1]),
    ],
)
def test_names_become_numbers(labels: Any, expected: Any) -> None:
    assert labels_of("sample", NAMES, labels) == expected


UNKNOWN = InvalidValue("sample", "class_labels", "to be integers or names among T-shirt, ankle boot, BAG, bag", "'hat'")
NAMELESS = InvalidValue("sample", "class_labels", "to be integers, as the model has no class names", "'bag'")


@pytest.mark.parametrize(
    ("config", "labels", "error"),
    [
        ({"class_names": NAMES}, "hat", UNKNOWN),
        ({"class_names": NAMES}, [0, "hat"], UNKNOWN),
        ({}, ["bag"], NAMELESS),
        ({"num_class_embeds": 3}, ["bag"], NAMELESS),
        ({"class_names": None}, ["bag"], NAMELESS),
    ],
)
def test_unknown_names_are_errors_that_list_the_known(config: dict[str, Any], labels: Any, error: InvalidValue) -> None:
    with refused(error):
        labels_of("sample", Interface.from_config(config, halves=False).class_names, labels)


SAMPLER, IMAGES = d.Sampler(tiny_unet(), PLAN), torch.zeros(2, 1, 8, 8)
INVERSE = SAMPLER.with_plan(d.ddim_inversion_plan(PLAN.schedule, 3))
# Functions that draw, their options, and arguments without options.
CALLS: dict[str, tuple[Callable[..., Any], type, tuple[Any, ...]]] = {
    "sample": (d.sample, DrawOptions, (tiny_unet(), PLAN, 2)),
    "Sampler": (SAMPLER.__call__, DrawOptions, (2,)),
    "Sampler.trajectory": (SAMPLER.trajectory, DrawOptions, (2,)),
    "vary": (d.vary, EditOptions, (SAMPLER, IMAGES)),
    "interpolate": (d.interpolate, EditOptions, (SAMPLER, IMAGES, IMAGES)),
    "invert": (d.invert, BatchOptions, (INVERSE, IMAGES)),
    "inpaint": (d.inpaint, EditOptions, (SAMPLER, IMAGES, IMAGES[:1])),
    "write_samples": (d.write_samples, EditOptions, ("nowhere", SAMPLER, 2)),
}


@pytest.mark.parametrize("caller", CALLS)
def test_signatures_show_the_options(caller: str) -> None:
    function, struct, _ = CALLS[caller]
    parameters = inspect.signature(function).parameters
    options = {each.name: each for each in options_of(struct)}
    assert [*parameters][-len(options) :] == [*options]
    for name, declared in options.items():
        assert parameters[name].kind == inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == declared.default
        assert declared.option.help in (struct.__doc__ or "")


@pytest.mark.parametrize("caller", CALLS)
def test_unknown_options_are_type_errors_that_list_the_known(caller: str) -> None:
    function, struct, arguments = CALLS[caller]
    known = ", ".join(each.name for each in options_of(struct))
    wrong = "callbacks" if struct is DrawOptions else "x_T"
    with pytest.raises(TypeError, match=f"^{caller}: expected arguments among {known}, got '{wrong}'$"):
        function(*arguments, **{wrong: None})
