"""A step of a `Sampler` as one program: its bits, its calls, and what it costs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from drawing import CASES, PLAN, draw, tiny_unet
from small_unets import relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast import FrozenUNet, Sampler, ddpm_plan, freeze, load_builtin
from ddpm_fast.inference import StepState
from ddpm_fast.inference import frozen as frozen_module
from ddpm_fast.inference.frozen_step import FrozenAdapter
from ddpm_fast.ops import backend

needs_kernels = pytest.mark.skipif(backend.native_error() is not None, reason="there is no compiled module")


class Called:
    """A frozen network behind a call, so that a Sampler takes the step of any network."""

    def __init__(self, network: FrozenUNet) -> None:
        self.network, self.device, self.dtype, self.config = network, network.device, network.dtype, network.config

    def __call__(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.network(x_t, t, class_labels)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_program_gives_the_bits_of_the_network_and_reverse_step(case: str, dtype: torch.dtype) -> None:
    network, plan, arguments = CASES[case]
    frozen = freeze(tiny_unet(**network), dtype, num_timesteps=20)
    images = draw(frozen, 5, plan, **arguments)
    assert torch.equal(images, draw(Called(frozen), 5, plan, shape=(1, 8, 8), **arguments))


@needs_kernels
@pytest.mark.usefixtures("matrix_kernels")
def test_a_step_passes_few_functions() -> None:
    """With guidance, a callback, frames and a progress bar."""
    files: list[str] = []

    def count(frame: Any, event: str, _: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and "ddpm_fast" in Path(name).parts:
            files.append(name)

    def callback(step: int, timestep: int, x_t: Tensor) -> None:
        if step == 0:
            files.clear()
        sys.setprofile(count if step < 4 else None)

    garments = load_builtin()
    sampler = garments.sampler(ddpm_plan(garments.objective, 5))
    for _ in range(2):
        try:
            sampler.trajectory(16, class_labels=1, guidance_scale=2.0, num_frames=3, callback=callback)
        finally:
            sys.setprofile(None)
    assert len(files) <= 4 * 10  # steps 1 to 4
    assert 3 <= len(set(files)) <= 5


@needs_kernels
@pytest.mark.usefixtures("matrix_kernels")
@pytest.mark.parametrize(
    ("classes", "arguments", "calls"), [(None, {}, 1), (3, {"class_labels": [0, 1, 2, 0, 1], "guidance_scale": 2.0}, 3)]
)
def test_a_split_batch_is_one_program(classes: int | None, arguments: Any, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_unet(classes=classes)
    whole = draw(model, 5, **arguments)
    monkeypatch.setattr(frozen_module, "_CACHED_BYTES", 3 * 8 * 8 * 8 * 4)  # a pass of fewer images
    sampler = Sampler(model, PLAN)
    split = sampler(5, progress=False, **arguments)
    (loop,) = sampler._loops.values()
    stages = [type(stage).__name__ for stage in loop.advance.__self__._stages]  # type: ignore[attr-defined]
    assert (stages.count("Program"), stages[-1]) == (calls, "Program")
    # PyTorch's product for the classes has other bits for other numbers of rows.
    assert relative_error(split, whole) < 1e-5 if classes else torch.equal(split, whole)


class NoHostReads(TorchDispatchMode):
    """On a GPU, any of these would wait for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES)
def test_no_step_reads_a_tensor_on_the_host(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, plan, arguments = CASES[case]
    for module in ("reverse_step", "step_parts"):  # the check is for the CPU alone
        monkeypatch.setattr(sys.modules[f"ddpm_fast.ops.{module}"], "check_range", lambda *_: None)
    frozen = freeze(tiny_unet(**network), torch.float64, num_timesteps=20)  # with PyTorch's layers, as on a GPU
    labels = "class_labels" in arguments
    scale = arguments.get("guidance_scale")
    state = StepState(
        plan,
        (2, 1, 8, 8),
        dtype=torch.float64,
        memory_format=torch.channels_last,
        device=torch.device("cpu"),
        no_label=torch.tensor([3]) if labels else None,
        guided=scale is not None,
    )
    advance = FrozenAdapter(frozen).bind(plan, state, scale)
    state.start(torch.arange(2), torch.zeros(2, dtype=torch.int64) if labels else None)
    with NoHostReads():
        for _ in range(plan.num_steps):
            advance()
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            float(state.x_t.sum())
