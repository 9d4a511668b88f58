"""Labels and other arguments of calls that draw."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drawing import PLAN, tiny_unet
from refusals import by, refused
from torch import Tensor, nn

import ddpm_fast as d
from ddpm_fast.errors import InvalidValue
from ddpm_fast.options import options_of
from ddpm_fast.sampling.options import BatchOptions, DrawOptions, EditOptions


def seen_labels(config: dict[str, Any], no_label: int | None, **given: Any) -> list[int]:
    """Return the labels that a network gets in the only step of 12 images."""
    seen = list[Tensor]()

    class Network(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
            seen.append(class_labels)
            return x_t

    network = Network()
    network.config = {"in_channels": 1, "out_channels": 1, "sample_size": 4, **config}  # type: ignore[assignment]
    plan = d.ddim_plan(PLAN.schedule, 1)
    d.Sampler(network, plan, no_label=no_label)(12, progress=False, **given)
    return seen[0].tolist()


TEN, NAMED = {"num_class_embeds": 10}, {"class_names": [*"abcdefghij"]}
# The network's configuration, no_label of the Sampler, the label that then stands for no class.
UNLABELLED: dict[str, tuple[dict[str, Any], int | None, int | None]] = {
    "ten rows": (TEN, None, None),
    "ten names": (TEN | NAMED, None, None),
    "eleven rows": ({"num_class_embeds": 11}, None, None),
    "ten names of eleven rows": ({"num_class_embeds": 11} | NAMED, None, 10),
    "a key": ({"num_class_embeds": 11, "no_label": 0}, None, 0),
    "an argument": (TEN, 9, 9),
}
UNKNOWN_LABEL = (
    "nothing says which label is no class: pass no_label to the Sampler, or add "
    '"_ddpm_fast": {"no_label": NUMBER} to the config.json of the model, exported if it is a run'
)


@pytest.mark.parametrize("case", UNLABELLED)
def test_no_class_is_known_or_guidance_is_refused(case: str) -> None:
    """A network of another library may have classes alone. Its last class is then one like the others."""
    config, no_label, none = UNLABELLED[case]
    classes = [label for label in range(config["num_class_embeds"]) if label != none]
    assert seen_labels(config, no_label) == (classes * 2)[:12]
    assert seen_labels(config, no_label, class_labels=9) == [9] * 12
    guided = {"class_labels": 3, "guidance_scale": 3.0}
    if none is None:
        with refused(by("Sampler", InvalidValue("class_labels", f"to be labels of classes, as {UNKNOWN_LABEL}", "none"))):
            seen_labels(config, no_label, class_labels="none")
        with refused(by("Sampler", InvalidValue("guidance_scale", f"to be None or 1, as {UNKNOWN_LABEL}", 3.0))):
            seen_labels(config, no_label, **guided)
    else:
        assert seen_labels(config, no_label, class_labels="none") == [none] * 12
        assert sorted(seen_labels(config, no_label, **guided)) == sorted([3] * 12 + [none] * 12)


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
    meant = r"; did you mean 'callback'\?" if struct is DrawOptions else ""
    with pytest.raises(TypeError, match=f"^{caller}: expected arguments among {known}, got '{wrong}'{meant}$"):
        function(*arguments, **{wrong: None})


def test_labels_of_another_number_are_refused_with_their_shape() -> None:
    with refused(by("Sampler", InvalidValue("class_labels", "to be an int or 4 ints", "torch.int64 of shape (3,)"))):
        d.Sampler(tiny_unet(classes=7), PLAN)(4, class_labels=[3, 4, 5])
