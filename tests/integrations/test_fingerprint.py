"""Fingerprints: a hash of weights sees every write, and names the tensors that it cannot read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("xxhash")
from ddpm_fast.integrations.fingerprint import attributes_digest, weights_hash


def make() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight.data[0, 0] = 0.0
    return model


WRITES: dict[str, Callable[[Any], Any]] = {
    "a value": lambda model: model[2].weight.data[3, 3].add_(1e-7),
    "sign of zero": lambda model: model[2].weight.data[0, 0].neg_(),
    "permuted": lambda model: model[2].weight.data.copy_(model[2].weight.data.flip(-1)),
    "a buffer": lambda model: model[1].running_mean.add_(1),
    "a counter": lambda model: model[1].num_batches_tracked.add_(1),
    "a view": lambda model: setattr(model[2].weight, "data", model[2].weight.data.T),
    "dtype": lambda model: model[2].double(),
    "shape": lambda model: setattr(model[2].weight, "data", model[2].weight.data.reshape(2, 8)),
    "name": lambda model: setattr(model[2], "weight_2", model[2]._parameters.pop("weight")),
    "absent": lambda model: setattr(model[2], "bias", None),
    "tied": lambda model: setattr(model[2], "weight", model[3].weight),
    "swapped": lambda model: model._modules.update({"2": model[3], "3": model[2]}),
    "expanded": lambda model: setattr(model[2].bias, "data", torch.ones(1).expand(4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("write", WRITES)
def test_the_hash_sees(write: str, dtype: torch.dtype) -> None:
    model = make()
    if dtype != torch.float32:
        model[0].to(dtype, memory_format=torch.channels_last)
    before = weights_hash(model)
    assert weights_hash(copy.deepcopy(model)) == before  # not the place
    WRITES[write](model)
    assert weights_hash(model) != before


class Other(Tensor):
    pass


def freed() -> Tensor:
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    return tensor


UNREADABLE: dict[str, tuple[Callable[[], Tensor], str]] = {
    "meta": (lambda: torch.ones(4, device="meta"), r"0\.extra has no memory"),
    "freed": (freed, r"0\.extra has no memory"),
    "zero tensor": (lambda: torch._efficientzerotensor((4,)), r"0\.extra has no memory"),
    "sparse": (lambda: torch.ones(4).to_sparse(), r"0\.extra is sparse"),
    "subclass": (lambda: torch.ones(4).as_subclass(Other), r"0\.extra is a Other"),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_the_hash_cannot_read_is_named(what: str) -> None:
    made, message = UNREADABLE[what]
    model = make()
    model[0].register_buffer("extra", made())
    with pytest.raises(TypeError, match=f"^{message}$"):
        weights_hash(model)


def test_conjugate_and_negative_views() -> None:
    model = make()
    values = torch.view_as_complex(torch.ones(4, 2))
    hashes = []
    for tensor in (values, values.conj(), values.imag, values.conj().imag):
        model[0].register_buffer("extra", tensor)
        hashes.append(weights_hash(model))
    assert len(set(hashes)) == 4


def test_the_digest_sees_attributes_and_no_values() -> None:
    model = make()
    before = attributes_digest(model)
    model[2].weight.data.neg_()
    assert attributes_digest(model) == before
    model[1].eps = 0.5
    changed = attributes_digest(model)
    assert changed != before
    model[1].settings = {"a": [1, 2]}
    deeper = attributes_digest(model)
    model[1].settings["a"][1] = 3
    assert attributes_digest(model) != deeper != changed
    hook = model[3].register_forward_hook(lambda *args: None)
    hooked = attributes_digest(model)
    hook.remove()
    model[3].register_forward_hook(lambda *args: None)
    assert attributes_digest(model) != hooked
