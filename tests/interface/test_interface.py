"""`Interface`: what networks say that they read and give."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from drawing import PLAN, SCHEDULE, tiny_unet
from refusals import refused
from small_unets import SMALL
from torch import nn

from ddpm_fast import Sampler, ddpm_plan, freeze
from ddpm_fast.errors import InvalidValue
from ddpm_fast.inference import interface_of
from ddpm_fast.interface import Condition, Interface, Labels
from ddpm_fast.nn import UNet

BASE = SMALL | {"sample_size": [8, 16], "in_channels": 3, "out_channels": 3}
PLAIN = Interface(
    channels=3,
    read_channels=3,
    predicted_channels=3,
    predicts_variance=False,
    size=(8, 16),
    multiple=4,
    labels=Labels(),
    condition=Condition(),
)


def plain(**changes: Any) -> Interface:
    return Interface(**{**vars(PLAIN), **changes})


CASES: dict[str, tuple[dict[str, Any], bool | None, Interface]] = {
    "plain": ({}, None, PLAIN),
    "one size": ({"sample_size": 16}, None, plain(size=(16, 16))),
    "no size": ({"sample_size": None}, None, plain(size=None)),
    "condition": ({"in_channels": 5}, None, plain(read_channels=5, condition=Condition(2))),
    "classes": (
        {"num_class_embeds": 3, "class_names": ["cat", "dog"]},
        None,
        plain(labels=Labels(3, 2, ("cat", "dog"))),
    ),
    "variance of the configuration": (
        {"out_channels": 6, "variance": "learned_range"},
        None,
        plain(predicted_channels=6, predicts_variance=True),
    ),
    "variance of the plan": ({"out_channels": 6}, True, plain(predicted_channels=6, predicts_variance=True)),
    "variance that nobody asks for": ({"out_channels": 6}, False, plain(predicted_channels=6)),
    "variance and a condition": (
        {"in_channels": 5, "out_channels": 6, "variance": "learned", "condition": "images", "condition_range": [[0, 2]]},
        None,
        plain(
            read_channels=5,
            predicted_channels=6,
            predicts_variance=True,
            condition=Condition(2, "images"),
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_unet_and_its_inference_form_have_the_interface_of_the_configuration(case: str) -> None:
    changes, predicts_variance, wanted = CASES[case]
    model = UNet(**BASE | changes)
    for each in (model, freeze(model), SimpleNamespace(frozen_unet=freeze(model))):
        assert interface_of(each, predicts_variance=predicts_variance) == wanted  # type: ignore[arg-type]
    assert wanted.shape == (None if wanted.size is None else (3, *wanted.size))


def test_a_foreign_network_says_what_it_knows() -> None:
    unknown = plain(
        **dict.fromkeys(("channels", "read_channels", "predicted_channels", "size")),
        multiple=1,
        labels=Labels(None),
        condition=Condition(None),
    )
    assert interface_of(lambda x_t, t: x_t) == interface_of(nn.Identity()) == unknown
    assert (unknown.shape, unknown.labels.classes) == (None, None)
    assert interface_of(nn.Identity(), no_label=4) == Interface(**{**vars(unknown), "labels": Labels(None, 4)})
    unknown.check_images("shape", (5, 7, 9))
    model = nn.Identity()
    model.config = {"in_channels": 1, "sample_size": 9, "num_class_embeds": 11, "no_label": 10}  # type: ignore[assignment]
    found = interface_of(model)
    assert (found.shape, found.labels, found.multiple) == ((1, 9, 9), Labels(11, 10), 1)
    assert found.condition.channels is None  # nothing says how many channels it returns
    assert interface_of(model, no_label=4).labels.none == 4


def test_images_have_to_fit() -> None:
    plain, narrow = interface_of(UNet(**BASE)), interface_of(UNet(**BASE | {"in_channels": 2}))
    learned = interface_of(UNet(**BASE), predicts_variance=True)
    plain.check_images("shape", (3, 4, 20))
    for found, shape, error in (
        (plain, (2, 8, 16), InvalidValue("", "a model with 2 output channels, as images have 2", "3")),
        (plain, (3, 8, 6), InvalidValue("shape", "to have H and W that are multiples of 4", "8x6")),
        (
            narrow,
            (3, 8, 8),
            InvalidValue("shape", "to be (C, H, W) with C at most 2, which the model reads", (3, 8, 8)),
        ),
        (
            learned,
            (3, 8, 8),
            InvalidValue("", "a model with 6 output channels, as images have 3 and it predicts their variance", "3"),
        ),
    ):
        with refused(error):
            found.check_images("shape", shape)


def test_a_sampler_has_the_interface_of_its_plan() -> None:
    assert not Sampler(tiny_unet(), PLAN).interface.predicts_variance
    learned = Sampler(tiny_unet(classes=2, learned_variance=True), ddpm_plan(SCHEDULE, 3, variance="learned_range"))
    assert learned.interface.predicts_variance
    assert (learned.shape, learned.interface.labels.classes) == ((1, 8, 8), [0, 1])


@pytest.mark.parametrize("no_label", [0, 1, 2])
def test_a_model_of_this_package_keeps_its_labels_in_diffusers(no_label: int, tmp_path: Path) -> None:
    """It keeps the keys that it does not know, also in a frozen network."""
    diffusers = pytest.importorskip("diffusers")
    names = ["cat", "dog"] if no_label == 2 else ["cat", "dog", "cow"]
    model = UNet(**BASE | {"num_class_embeds": 3, "class_names": names, "no_label": no_label})
    model.save_pretrained(tmp_path)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path).eval()
    for each in (theirs, freeze(theirs)):
        assert interface_of(each).labels == Labels(3, no_label, tuple(names))
    assert Interface.from_config({"num_class_embeds": 3, "no_label": 7}).labels.none is None
