"""Recorded calls, replayed, compute what the calls themselves compute, for every input, network and mode."""

from __future__ import annotations

import copy
import pickle
import threading
from importlib import import_module
from typing import Any

import pytest
import torch
from small_unets import SMALL, VARIANTS, make_inputs, randomise
from torch import Tensor

from ddpm_fast import freeze
from ddpm_fast.nn import UNet, replay
from ddpm_fast.nn.freeze import FrozenUNet
from ddpm_fast.nn.packed import run_kernel
from ddpm_fast.ops.backend import why_not_matrix_kernels

conv3x3 = import_module("ddpm_fast.ops.conv3x3")  # the attribute of this name is the op
pytestmark = pytest.mark.skipif(
    why_not_matrix_kernels(torch.device("cpu"), torch.float32) is not None, reason="there are no kernels to record"
)


def make(variant: str = "heads", dtype: torch.dtype = torch.float32) -> tuple[FrozenUNet, dict[str, Any]]:
    config = SMALL | VARIANTS[variant]
    model = UNet(**config).eval()
    randomise(model)
    return freeze(model, dtype), config


def without(frozen: FrozenUNet) -> FrozenUNet:
    """The same network, which records nothing."""
    plain = copy.deepcopy(frozen)
    plain._recordings.run = lambda function, inputs, state: function(*inputs)  # type: ignore[method-assign]
    return plain


def counted(frozen: FrozenUNet) -> int:
    return len(frozen._recordings._recordings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_replayed_is_what_is_computed(variant: str, dtype: torch.dtype) -> None:
    if why_not_matrix_kernels(torch.device("cpu"), dtype) is not None:
        pytest.skip("no kernels of this dtype")
    frozen, config = make(variant, dtype)
    plain = without(frozen)
    x, t, labels = make_inputs(config, 6)
    outs = []
    for part in (slice(0, 2), slice(2, 4), slice(0, 2), slice(5, 6), slice(4, 6)):
        inputs = [tensor if tensor is None else tensor[part] for tensor in (x, t, labels)]
        outs.append((frozen(*inputs), plain(*inputs)))
    for out, expected in outs:  # at the end: no call wrote into what another had returned
        assert torch.equal(out, expected)
        assert out.stride() == expected.stride()
    assert counted(frozen) == 2


def test_memory_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def empty(self: replay.Recording, *arguments: Any, empty: Any = replay.Recording.empty) -> Tensor:
        asked.append((tensor := empty(self, *arguments)).nbytes)
        return tensor

    monkeypatch.setattr(replay.Recording, "empty", empty)
    frozen, config = make()
    frozen(*make_inputs(config, 4))
    (recording,) = frozen._recordings._recordings.values()
    kept = {tensor.data_ptr(): tensor.nbytes for tensor in recording.held if tensor is not None and tensor.dtype == torch.uint8}
    assert sum(kept.values()) < sum(asked) / 2  # the skip connections are a good part of all, and needed at once


def test_a_view_keeps_its_memory() -> None:
    weights = conv3x3.pack_weights(torch.eye(4)[:, :, None, None], "direct", torch.float32)

    def copied(x: Tensor) -> Tensor:
        arguments = (x, None, None, False, weights, None, None, 1.0, False, 4, 2, 3, 1, 1, 0)
        return run_kernel(conv3x3.conv_kernels["direct"], arguments, tuple(x.shape), x.dtype, constants=(weights,))

    def function(x: Tensor) -> Tensor:
        first = copied(x)
        view = first[:]
        del first
        second = copied(x)
        assert second.data_ptr() != view.data_ptr()
        address = second.data_ptr()
        del second
        third = copied(view)
        assert third.data_ptr() == address
        return third

    x = torch.randn(1, 4, 2, 3).contiguous(memory_format=torch.channels_last)
    recording = replay.Recording()
    assert torch.equal(recording.record(function, [x]), x)
    assert torch.equal(recording.replay([2 * x]), 2 * x)


def test_packing_is_not_recorded() -> None:
    frozen, config = make()
    inputs = make_inputs(config, 2)
    frozen(*inputs)
    (recording,) = frozen._recordings._recordings.values()
    fresh = replay.Recording()
    fresh.record(frozen._layers, recording._inputs)  # everything is packed by now
    assert len(fresh._calls) == len(recording._calls) > 0


def test_inference_mode_and_others_take_turns() -> None:
    frozen, config = make()
    inputs = make_inputs(config, 2)
    expected = without(frozen)(*inputs)
    for first in (True, False):
        network = copy.deepcopy(frozen)
        for mode in (first, not first):
            with torch.inference_mode(mode):
                out = network(*inputs)
                assert out.is_inference() == mode
                assert torch.equal(out, expected)
        assert counted(network) == 1


def test_weights_that_are_loaded_are_used() -> None:
    frozen, config = make()
    inputs = make_inputs(config, 2)
    frozen(*inputs)
    other = copy.deepcopy(frozen)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    frozen.load_state_dict(other.state_dict())
    assert torch.equal(frozen(*inputs), without(other)(*inputs))


def test_threads_that_meet_do_not_disturb_each_other() -> None:
    frozen, config = make()
    plain = without(frozen)
    jobs = [make_inputs(config, n) for n in (2, 2, 3, 2)]
    jobs = [(x + i, t, labels) for i, (x, t, labels) in enumerate(jobs)]
    expected = [plain(*inputs) for inputs in jobs]
    wrong: list[int] = []
    gate = threading.Barrier(len(jobs))

    def work(i: int) -> None:
        gate.wait()
        wrong.extend(i for _ in range(20) if not torch.equal(frozen(*jobs[i]), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_copies_record_for_themselves_and_few_recordings_are_kept() -> None:
    frozen, config = make()
    for n in range(1, replay.MAX_RECORDINGS + 3):
        frozen(*make_inputs(config, n))
    assert counted(frozen) == replay.MAX_RECORDINGS
    inputs = make_inputs(config, 2)
    for twin in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert counted(twin) == 0
        assert torch.equal(twin(*inputs), frozen(*inputs))


def test_a_failure_leaves_no_recording() -> None:
    frozen, config = make()
    inputs = make_inputs(config, 2)
    layers = frozen._layers

    def fail(*stacks: Tensor) -> Tensor:
        layers(*stacks)
        raise ZeroDivisionError

    frozen._layers = fail  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        frozen(*inputs)
    frozen._layers = layers  # type: ignore[method-assign]
    assert counted(frozen) == 0
    assert torch.equal(frozen(*inputs), without(frozen)(*inputs))
