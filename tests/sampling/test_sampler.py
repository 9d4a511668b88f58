"""`Sampler`: what it keeps between calls, and captured steps.

Without a GPU a stand-in records the steps and replays them: all but the capture itself is exercised.
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from drawing import CASES, PLAN, SCHEDULE, Recording, draw, tiny_unet
from fixtures import leave_matrices_to_pytorch
from refusals import by, refused
from small_unets import relative_error
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpm_fast import (
    NoiseSchedule,
    Sampler,
    ddim_plan,
    ddpm_plan,
    freeze,
    load_builtin,
    sample,
    sample_seeds,
)
from ddpm_fast.errors import ArgumentError, InvalidType, InvalidValue
from ddpm_fast.inference import cuda_graph
from ddpm_fast.sampling.sampler import MAX_LOOPS


class Captures:
    """Counts captures and replays of steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
        self.made = self.replayed = 0
        if device.type == "cpu":
            monkeypatch.setattr(cuda_graph, "DEVICE_TYPES", ("cpu",))
        real = cuda_graph.capture if device.type == "cuda" else self._stand_in

        def capture(*arguments: Any) -> Callable[[], None]:
            replay = real(*arguments)
            self.made += 1

            def counted() -> None:
                self.replayed += 1
                replay()

            return counted

        monkeypatch.setattr(cuda_graph, "capture", capture)

    @staticmethod
    def _stand_in(rehearse: Callable[[], None], advance: Callable[[], None], *_: Any) -> Callable[[], None]:
        assert not torch.is_autocast_cache_enabled()  # what it keeps would not outlive the call
        rehearse()
        rehearse()
        return advance


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Captures:
    return Captures(monkeypatch, device)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_steps_give_the_bits_of_eager_ones(
    case: str, dtype: torch.dtype, captures: Captures, device: torch.device
) -> None:
    network, plan, arguments = CASES[case]
    model = tiny_unet(**network).to(device)
    arguments = arguments | {"batch_size": 2, "num_frames": 3, "progress": False}
    eager = Sampler(model, plan, dtype=dtype, cuda_graph=False).trajectory(5, **arguments)
    assert (captures.made, captures.replayed) == (0, 0)
    sampler = Sampler(model, plan, dtype=dtype)
    for _ in range(2):
        images, states = sampler.trajectory(5, **arguments)
        torch.testing.assert_close((images, states), eager, rtol=0, atol=0)
        assert images.device == next(model.parameters()).device
        assert (states.device.type, states.is_inference()) == ("cpu", False)
    assert captures.made == 2  # for batches of 2 and of the 1 that is left
    assert captures.replayed == 2 * 3 * plan.num_steps


# ----------------------------------------------------------------------------------------------------- what a Sampler keeps


def test_a_shape_guidance_and_stream_are_captured_once(
    captures: Captures, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = Sampler(tiny_unet(classes=3).to(device), PLAN)
    calls: list[dict[str, Any]] = [
        {"num_samples": 2},
        {"num_samples": 3},
        {"num_samples": 2, "class_labels": 1, "guidance_scale": 2.0},
        {"num_samples": 2, "class_labels": 1, "guidance_scale": 3.0},
    ]
    first = [sampler(progress=False, **arguments) for arguments in calls]
    assert captures.made == 4
    for arguments, images in zip(calls, first, strict=True):
        assert torch.equal(sampler(progress=False, **arguments), images)
        assert not torch.equal(sampler(progress=False, seed=1, **arguments), images)
    assert captures.made == 4
    sampler(5, progress=False)  # one more than is kept: the batch of 2 goes, used longest ago
    sampler(2, progress=False)
    assert captures.made == 6
    sampler(2, progress=False)
    assert captures.made == 6
    monkeypatch.setattr(cuda_graph, "settings", lambda: "others")  # such as autocast
    sampler(2, progress=False)
    assert captures.made == 7


CHANGES: dict[str, Callable[[Any], object]] = {
    "in place": lambda model: nn.init.constant_(next(model.parameters()), 0.5),
    "behind autograd's back": lambda model: next(model.parameters()).data.mul_(1.5),
    "assigned": lambda model: model.load_state_dict({k: 1.5 * value for k, value in model.state_dict().items()}, assign=True),
    "attribute": lambda model: setattr(model.conv_norm_out, "eps", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*this UNet is not frozen, because conv_norm_out.eps is 0.5:RuntimeWarning")
def test_a_sampler_has_the_model_as_it_was_and_sample_as_it_is(change: str, captures: Captures, device: torch.device) -> None:
    model = tiny_unet().to(device)
    sampler = Sampler(model, PLAN)
    before = sampler(2, progress=False)
    assert torch.equal(draw(model), before)
    CHANGES[change](model)
    assert torch.equal(sampler(2, progress=False), before)
    after = draw(model)
    assert not torch.equal(after, before)
    assert torch.equal(after, draw(model, cuda_graph=False))


def test_nothing_outlives_a_sampler(captures: Captures, device: torch.device) -> None:
    model = tiny_unet().to(device)
    sampler = Sampler(model, PLAN)
    sampler(2, progress=False)
    gone = [weakref.ref(each) for each in (model, sampler, sampler.network)]
    del model, sampler
    gc.collect()
    assert [each() for each in gone] == [None] * 3


def test_a_call_that_fails_leaves_the_sampler_usable(captures: Captures, device: torch.device) -> None:
    sampler = Sampler(tiny_unet().to(device), PLAN)
    images = sampler(2, progress=False)
    with pytest.raises(KeyboardInterrupt):
        sampler(2, progress=False, callback=Mock(side_effect=[None, KeyboardInterrupt]))
    assert torch.equal(sampler(2, progress=False), images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_call_in_a_dispatch_mode_leaves_the_sampler_usable(dtype: torch.dtype) -> None:
    sampler = Sampler(tiny_unet(), PLAN, dtype=dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), suppress(Exception):
        sampler(2, progress=False)
    assert torch.equal(sampler(2, progress=False), draw(tiny_unet(), dtype=dtype))


def test_captured_steps_own_what_they_read(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph has addresses, and holds no tensor."""
    if device.type == "cpu":
        monkeypatch.setattr(cuda_graph, "DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(cuda_graph, "capture", lambda rehearse, *_: (rehearse(), lambda: None)[1])
    sampler = Sampler(tiny_unet().to(device), PLAN, dtype=torch.float64)  # PyTorch's layers, as on a GPU
    sampler(1, progress=False)
    (loop,) = sampler._loops.values()
    advance, _ = loop.held
    tensors = [value for call, _ in advance.__self__._calls for value in call.arguments if isinstance(value, Tensor)]
    read = [weakref.ref(value if value._base is None else value._base) for value in tensors]
    assert len(read) > 10
    del advance, tensors
    gc.collect()
    assert all(each() is not None for each in read)


def test_each_stream_has_its_own_loop_and_memory(
    captures: Captures, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu":
        pytest.skip("a CPU has no streams")
    sampler = Sampler(tiny_unet().to(device), PLAN)
    images = sampler(2, progress=False)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        others = sampler(2, progress=False)
    torch.cuda.synchronize()
    assert torch.equal(others, images)
    assert (captures.made, len(sampler._pools)) == (2, 2)


def test_the_default_device_does_not_matter() -> None:
    sampler, seeds = Sampler(tiny_unet(), PLAN), sample_seeds(0, 2)
    with torch.device("meta"):
        drawn = sampler.trajectory(2, seed=seeds, progress=False)
    torch.testing.assert_close(drawn, sampler.trajectory(2, progress=False), rtol=0, atol=0)


def test_threads_that_share_a_sampler_take_turns(captures: Captures, device: torch.device) -> None:
    sampler = Sampler(tiny_unet().to(device), PLAN)
    expected = [sampler(2, seed=seed, progress=False) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda seed: sampler(2, seed=seed, progress=False), range(4)))
    assert torch.equal(torch.cat(drawn), torch.cat(expected))


def test_another_plan_takes_effect_and_shares_the_network() -> None:
    model = tiny_unet(classes=3)
    sampler = Sampler(model, ddim_plan(SCHEDULE, 2))
    with pytest.raises(AttributeError):
        sampler.plan = PLAN  # type: ignore[misc]
    images = sampler(2, progress=False)
    for plan in (ddim_plan(SCHEDULE, 9), ddim_plan(SCHEDULE, 9, eta=1.0), ddim_plan(SCHEDULE, 2)):
        other = sampler.with_plan(plan)
        assert other.plan is plan
        for name in ("network", "shape", "device", "dtype", "interface"):
            assert getattr(other, name) == getattr(sampler, name)
        assert torch.equal(other(2, progress=False), draw(model, plan=plan))
        assert other.digest() == sampler.digest() == Sampler(model, plan).digest()
    assert torch.equal(sampler(2, progress=False), images)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_without_parameters_has_the_dtype_that_is_asked_for(dtype: torch.dtype) -> None:
    assert Sampler(lambda x_t, t: x_t / 2, PLAN, shape=(1, 4, 4)).dtype == torch.float32
    seen = []
    module = nn.Tanh()
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    module.forward = lambda x_t, t: x_t.tanh()  # type: ignore[method-assign, assignment]
    sampler = Sampler(module, PLAN, shape=(1, 4, 4), dtype=dtype)
    assert sampler(1, progress=False).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert {sampler.dtype, *seen} == {dtype}


def test_one_sampler_serves_any_number_of_threads() -> None:
    sampler = Sampler(tiny_unet(), PLAN)
    before, images = torch.get_num_threads(), sampler(2, progress=False)
    try:
        for threads in (1, 2, 3, 4, 5, 1):
            torch.set_num_threads(threads)
            assert torch.equal(sampler(2, progress=False), images)
            assert len(sampler._loops) <= MAX_LOOPS
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the operating system has no fork")
def test_a_forked_child_draws_the_same_images() -> None:
    """Before and while another thread of the parent draws. From a callback the error is the parent's."""
    script = """
import os, signal, threading, torch
from ddpm_fast import NoiseSchedule, Sampler, UNet, ddpm_plan, dpm_solver_plan, fit_plan
schedule = NoiseSchedule.linear(8)
model = UNet(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1, norm_num_groups=2,
             down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), num_class_embeds=3)
torch.nn.init.normal_(model.conv_out.weight)
sampler = Sampler(model, ddpm_plan(schedule))
images = sampler(2, progress=False)

def child(draws):
    pid = os.fork()
    if pid == 0:
        status = 1
        signal.alarm(60)
        try:
            status = int(not draws())
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

same = lambda: torch.equal(sampler(2, progress=False), images)
child(same)
inside, go_on = threading.Event(), threading.Event()
def wait(step, *_):
    inside.set()
    go_on.wait()
thread = threading.Thread(target=lambda: sampler(2, progress=False, callback=wait))
thread.start()
inside.wait()
child(same)
go_on.set()
thread.join()
def refused():
    try:
        sampler(1, progress=False)
    except RuntimeError as error:
        return "got one from its callback" in str(error)
sampler(2, progress=False, callback=lambda step, *_: child(refused) if step == 3 else None)
assert same()

# So large that PyTorch starts threads, for which it would wait in the child.
torch.set_num_threads(2)
large = torch.nn.Conv2d(3, 3, 3, padding=1).eval()
others = Sampler(lambda x, t: large(x), ddpm_plan(schedule), shape=(3, 64, 64))
drawn = others(8, progress=False)
def large_ones():
    again, threads = others(8, progress=False), torch.get_num_threads()
    torch.set_num_threads(1)  # for torch.equal
    return torch.equal(again, drawn) and threads == 2
child(large_ones)
few, teacher = (others.with_plan(dpm_solver_plan(schedule, steps)) for steps in (3, 6))
fits = lambda: fit_plan(few, teacher=teacher.plan, num_images=2, rounds=1, progress=False).fit is not None
assert fits()
child(fits)
print("same")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (result.stdout, result.returncode) == ("same\n", 0), result.stderr


# ------------------------------------------------------------------------------------------------- which models are captured


def test_the_inference_form_itself_is_captured(captures: Captures, device: torch.device) -> None:
    model = tiny_unet().to(device)
    dtype = torch.float32 if device.type == "cpu" else None  # in which `sample` freezes the model
    frozen = freeze(model, dtype, num_timesteps=20)
    assert torch.equal(draw(frozen), draw(model))
    assert captures.made == 2


def test_other_models_are_captured_only_on_demand(captures: Captures, device: torch.device) -> None:
    model = Recording().to(device)
    images = draw(model, shape=(1, 4, 4))
    assert (captures.made, len(model.calls)) == (0, 3)
    assert torch.equal(draw(model, shape=(1, 4, 4), cuda_graph=True), images)
    assert captures.made == 1


def test_a_captured_model_keeps_the_memory_of_its_weights(captures: Captures, device: torch.device) -> None:
    """A replay reads the addresses of the capture, also if the model has got other weights since."""
    model = Recording().to(device)
    sampler = Sampler(model, PLAN, shape=(1, 4, 4), cuda_graph=True)
    sampler(2, progress=False)
    weight = weakref.ref(model.weight)
    model.weight = nn.Parameter(torch.tensor(0.5, device=device))
    gc.collect()
    assert weight() is not None


def test_a_network_with_layers_of_another_make_runs_as_it_is(captures: Captures, device: torch.device) -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = tiny_unet().to(device)
    plain = draw(model, dtype=torch.float32)
    model.conv_out.__class__ = Doubled
    with pytest.warns(
        RuntimeWarning,
        match="not frozen, because conv_out is a layer of class Doubled, by its configuration it is a layer of class Conv3x3",
    ) as warned:
        sampler = Sampler(model, PLAN)
    assert [each.filename for each in warned] == [__file__]
    assert not torch.allclose(sampler(2, progress=False), plain, atol=1e-2)
    assert captures.made == 1


# ------------------------------------------------------------------------------------------------------------------ failure


def test_steps_are_launched_one_by_one_where_a_capture_fails(
    captures: Captures, device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def fail(rehearse: Callable[[], None], *_: Any) -> None:
        tried.append(rehearse())
        raise cuda_graph.CaptureError("the moon is not full")

    monkeypatch.setattr(cuda_graph, "capture", fail)
    model = tiny_unet().to(device)
    sampler = Sampler(model, PLAN)
    for _ in range(2):
        assert torch.equal(sampler(2, progress=False), draw(model, cuda_graph=False))
    assert len(tried) == 1  # and not again
    assert caplog.text.count("no CUDA graph: the moon is not full") == 1


WAITS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "a value": (float, "a step waits for the GPU"),
    "synchronising": (lambda _: torch.cuda.synchronize(), "as there can be no CUDA graph"),
}


@pytest.mark.parametrize("wait", WAITS)
def test_a_model_that_waits_falls_back_and_harms_no_other(
    wait: str, captures: Captures, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    if device.type == "cpu":
        pytest.skip("needs a GPU to wait for")

    class Waiting(Recording):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            WAITS[wait][0](t[0])
            return super().forward(x_t, t)

    model = Waiting().to(device)
    images = draw(model, shape=(1, 4, 4), cuda_graph=True)
    assert WAITS[wait][1] in caplog.text
    assert bool(torch.randn(4, device=device).isfinite().all())
    assert torch.equal(images, draw(model, shape=(1, 4, 4)))
    draw(tiny_unet().to(device))  # the next capture is none the worse for it
    assert captures.made == 1


def test_nothing_in_the_steps_waits_for_the_gpu(captures: Captures, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("see the test that watches for host reads")
    for captured in (None, False):
        sampler = Sampler(tiny_unet(classes=3).to(device), ddpm_plan(SCHEDULE), cuda_graph=captured)
        loop = sampler._loop(2, sampler.request(2, {"class_labels": 1, "guidance_scale": 2.0}))
        seeds, labels = torch.zeros(2, dtype=torch.int64, device=device), torch.ones(2, dtype=torch.int64, device=device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls this mode a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            loop.state.start(seeds, labels)
            for _ in range(sampler.plan.num_steps):
                loop.advance()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert bool(loop.state.x_t.isfinite().all())


@pytest.mark.parametrize("case", CASES)
def test_the_loop_runs_on_the_cuda_kernels(case: str, emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated ones, with PyTorch's convolutions and matrix products."""
    leave_matrices_to_pytorch(monkeypatch)
    network, plan, arguments = CASES[case]
    model, arguments = tiny_unet(**network), arguments | {"progress": False}
    networks = [freeze(model, dtype, num_timesteps=20) for dtype in (torch.float32, torch.bfloat16)]
    on_emulator = [sample(each, plan, 5, **arguments) for each in networks]
    monkeypatch.undo()
    exact = sample(model, plan, 5, dtype=torch.float64, **arguments)
    for images, each in zip(on_emulator, networks, strict=True):
        allowed = 2 * relative_error(sample(each, plan, 5, **arguments), exact)
        assert relative_error(images, exact) <= allowed


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_sampler_cannot_be_copied(duplicate: Callable[[Sampler], object]) -> None:
    with pytest.raises(TypeError, match="Sampler: it cannot be copied or pickled: make a new one"):
        duplicate(Sampler(tiny_unet(), ddpm_plan(SCHEDULE)))


def _fitted() -> Sampler:
    return Sampler(freeze(tiny_unet(), num_timesteps=20), PLAN)


LEARNED = ddpm_plan(SCHEDULE, variance="learned_range")
NETWORK = "to be a network, called as model(x_t, t)"
REFUSED: list[tuple[Callable[[], object], ArgumentError]] = [
    (
        lambda: _fitted().with_plan(ddim_plan(NoiseSchedule.linear(), 2, spacing="trailing")),
        by("Sampler.with_plan", InvalidValue("plan", "to have timesteps below 20", "999")),
    ),
    (
        lambda: _fitted().with_plan(LEARNED),
        by(
            "Sampler.with_plan",
            InvalidValue("", "a model with 2 output channels, as images have 1 and it predicts their variance", "1"),
        ),
    ),
    (
        lambda: Sampler(tiny_unet(learned_variance=True), LEARNED).with_plan(PLAN),
        by("Sampler.with_plan", InvalidValue("", "a model with 1 output channels, as images have 1", "2")),
    ),
    (
        lambda: _fitted().with_plan(SCHEDULE),  # type: ignore[arg-type]
        by("Sampler.with_plan", InvalidType("plan", "to be a SamplingPlan", "NoiseSchedule")),
    ),
    (
        lambda: draw(tiny_unet(), cuda_graph=True),
        by("sample", InvalidValue("cuda_graph", "to be None or False on cpu", "True")),
    ),
    (
        lambda: Sampler((tiny_unet(), SCHEDULE), PLAN),  # type: ignore[arg-type]
        by("Sampler", InvalidType("model", "to be an nn.Module or another callable object", "a tuple")),
    ),
    (
        lambda: Sampler(_fitted(), PLAN),
        by("Sampler", InvalidType("model", NETWORK, "a Sampler x: pass x.network, or call x itself")),
    ),
    (
        lambda: Sampler(load_builtin(), PLAN),  # type: ignore[arg-type]
        by("Sampler", InvalidType("model", NETWORK, "a Pretrained x: pass x.model, or call x.sampler()")),
    ),
    *(
        (
            lambda device=device: Sampler(tiny_unet().to("meta"), PLAN, device=device),  # type: ignore[misc]
            by("Sampler", InvalidValue("model", "to have weights", "some on the meta device")),
        )
        for device in (None, "cpu")
    ),
]


@pytest.mark.parametrize(("call", "error"), REFUSED)
def test_models_and_plans_that_do_not_fit_are_refused(call: Callable[[], object], error: ArgumentError) -> None:
    with refused(error):
        call()
