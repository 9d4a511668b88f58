"""Captured sampling. Without a GPU a stand-in records the steps and replays them: all but the capture itself is exercised."""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib
import logging
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from small_unets import relative_error
from test_sampling import SCHEDULE, Recording, tiny_unet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast import SamplingPlan, ddim_plan, ddpm_plan, freeze, graph, sample, variational_bound
from ddpm_fast.loop import Loop
from ddpm_fast.nn import FrozenUNet


class Captures:
    """Counts captures and replays of steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
        self.made = self.replayed = 0
        if device.type == "cpu":
            monkeypatch.setattr(graph, "DEVICE_TYPES", ("cpu",))
        real = graph.capture if device.type == "cuda" else self._stand_in

        def capture(*arguments: Any) -> Callable[[], None]:
            replay = real(*arguments)
            self.made += 1

            def counted() -> None:
                self.replayed += 1
                replay()

            return counted

        monkeypatch.setattr(graph, "capture", capture)

    @staticmethod
    def _stand_in(rehearse: Callable[[], None], advance: Callable[[], None], *_: Any) -> Callable[[], None]:
        assert not torch.is_autocast_cache_enabled()  # what it keeps would not outlive the call
        rehearse()
        rehearse()
        return advance


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Captures:
    return Captures(monkeypatch, device)


def multistep_plan() -> SamplingPlan:
    plan = ddim_plan(SCHEDULE, 4)
    coefficients = plan.coefficients.clone()
    coefficients[:, 5] = 0.25  # k3, of x_0^ = 0 in the first step
    return dataclasses.replace(plan, coefficients=coefficients)


CASES: dict[str, tuple[dict[str, Any], SamplingPlan, dict[str, Any]]] = {
    "ddpm": ({}, ddpm_plan(SCHEDULE, 6), {}),
    "classes": ({"classes": 3}, ddpm_plan(SCHEDULE, 6), {"class_labels": [0, 1, 2, 0, 1]}),
    "guidance": ({"classes": 3}, ddim_plan(SCHEDULE, 4), {"class_labels": 1, "guidance_scale": 2.0}),
    "learned variance": ({"learned_variance": True}, ddpm_plan(SCHEDULE, 5, variance="learned_range"), {}),
    "multistep": ({}, multistep_plan(), {}),
    "one step": ({}, ddpm_plan(SCHEDULE, 1), {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_steps_give_the_bits_of_eager_ones(
    case: str, dtype: torch.dtype, captures: Captures, device: torch.device
) -> None:
    network, plan, arguments = CASES[case]
    model = tiny_unet(**network).to(device)
    arguments = arguments | {"batch_size": 2, "return_trajectory": 3, "progress": False, "dtype": dtype}
    eager = sample(model, plan, 5, cuda_graph=False, **arguments)
    assert (captures.made, captures.replayed) == (0, 0)
    for _ in range(2):
        images, states = sample(model, plan, 5, **arguments)
        assert torch.equal(images, eager[0])
        assert torch.equal(states, eager[1])
        assert images.device == device_of(model)
        assert (states.device.type, states.is_inference()) == ("cpu", False)
    assert captures.made == 2  # for batches of 2 and of the 1 that is left
    assert captures.replayed == 2 * 3 * plan.num_steps


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


# ------------------------------------------------------------------------------------------------------------------- cache


PLAN = ddpm_plan(SCHEDULE, 3)


def draw(model: nn.Module, n: int = 2, plan: SamplingPlan = PLAN, **arguments: Any) -> Tensor:
    return sample(model, plan, n, progress=False, **arguments)


def test_an_unchanged_model_is_captured_once_for_a_shape_and_sampler(captures: Captures, device: torch.device) -> None:
    model = tiny_unet().to(device)
    first = draw(model)
    assert torch.equal(draw(model, plan=ddpm_plan(SCHEDULE, 3)), first)  # an equal plan
    assert not torch.equal(draw(model, seed=1), first)
    assert captures.made == 1
    for made, changes in enumerate(({"n": 3}, {"plan": ddim_plan(SCHEDULE, 3)}, {"shape": (1, 16, 16)}), start=2):
        draw(model, **changes)
        assert captures.made == made
    assert torch.equal(draw(model), first)
    assert captures.made == 4
    draw(model, 5)  # one more than is kept: the batch of 3 goes, used longest ago
    draw(model)
    assert captures.made == 5
    draw(model, 3)
    assert captures.made == 6


def _in_place(model: nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)


def _behind_autograds_back(model: nn.Module) -> None:
    next(model.parameters()).data.mul_(1.5)


def _assigned(model: nn.Module) -> None:
    state = {name: 1.5 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


@pytest.mark.parametrize("change", [_in_place, _behind_autograds_back, _assigned])
def test_a_model_that_has_changed_is_captured_anew(
    change: Callable[[nn.Module], None], captures: Captures, device: torch.device
) -> None:
    model = tiny_unet().to(device)
    before = draw(model)
    change(model)
    after = draw(model)
    assert captures.made == 2
    assert not torch.equal(after, before)
    assert torch.equal(after, draw(model, cuda_graph=False))


def test_another_stream_gets_graphs_of_its_own(
    captures: Captures, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_unet().to(device)
    images = draw(model)
    if device.type == "cpu":
        monkeypatch.setattr(graph, "_stream", lambda _: "another")
        others = draw(model)
    else:
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            others = draw(model)
        torch.cuda.synchronize()
    assert captures.made == 2
    assert torch.equal(others, images)


def test_what_is_kept_goes_with_the_model_or_with_a_call_without_graphs(captures: Captures, device: torch.device) -> None:
    model = tiny_unet().to(device)
    draw(model)
    network = weakref.ref(graph._KEPT[model].network)
    draw(model, cuda_graph=False)
    gc.collect()
    assert model not in graph._KEPT
    assert network() is None

    draw(model)
    network, gone = weakref.ref(graph._KEPT[model].network), weakref.ref(model)
    del model
    gc.collect()
    assert (gone(), network()) == (None, None)


def test_a_call_in_progress_shares_nothing_with_another(captures: Captures, device: torch.device) -> None:
    model = tiny_unet().to(device)
    draw(model)
    arguments = (model, device_of(model), None, SCHEDULE.num_timesteps, None)
    with graph.session(*arguments) as first, graph.session(*arguments) as second:
        assert first.network is not second.network
    with graph.session(*arguments) as third:
        assert third in (first, second)


def test_a_call_that_fails_keeps_nothing(captures: Captures, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_unet().to(device)
    draw(model)
    monkeypatch.setattr(Loop, "start", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw(model)
    assert model not in graph._KEPT


# ------------------------------------------------------------------------------------------------- which models are captured


def test_the_inference_form_itself_is_captured(captures: Captures, device: torch.device) -> None:
    model = tiny_unet().to(device)
    dtype = torch.float32 if device.type == "cpu" else None  # in which `sample` freezes the model
    frozen = freeze(model, dtype, num_timesteps=20)
    assert torch.equal(draw(frozen), draw(model))
    assert captures.made == 2
    assert graph._KEPT[frozen].network is None  # it would keep its own key alive


def test_other_models_are_captured_only_on_demand(captures: Captures, device: torch.device) -> None:
    model = Recording().to(device)
    images = draw(model, shape=(1, 4, 4))
    assert (captures.made, len(model.calls)) == (0, 3)
    assert torch.equal(draw(model, shape=(1, 4, 4), cuda_graph=True), images)
    assert captures.made == 1


def test_labels_reach_a_model_without_a_config(captures: Captures, device: torch.device) -> None:
    class Labelled(Recording):
        def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
            return super().forward(x_t, t) * (1 if class_labels is None else class_labels[:, None, None, None] / 8)

    model = Labelled().to(device)
    for cuda_graph in (False, True):
        arguments: dict[str, Any] = {"shape": (1, 4, 4), "cuda_graph": cuda_graph}
        plain, labelled = (draw(model, class_labels=labels, **arguments) for labels in (None, [8, 4]))
        assert torch.equal(plain[0], labelled[0])
        assert not torch.equal(plain[1], labelled[1])
    assert captures.made == 2


def test_a_network_with_layers_of_another_make_runs_as_it_is(
    captures: Captures, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = tiny_unet().to(device)
    plain = draw(model, dtype=torch.float32)
    model.conv_out.__class__ = Doubled
    with caplog.at_level(logging.INFO):
        doubled = draw(model)
    assert "not frozen, as conv_out is a Doubled of another make" in caplog.text
    assert captures.made == 1
    assert not torch.allclose(doubled, plain, atol=1e-2)


def test_a_network_that_gets_hooks_is_captured_anew(captures: Captures, device: torch.device) -> None:
    model = tiny_unet().to(device)
    arguments: dict[str, Any] = {"dtype": torch.float32, "cuda_graph": True}
    plain = draw(model, **arguments)
    model.conv_out.register_forward_hook(lambda module, inputs, output: 2 * output)
    doubled = draw(model, **arguments)
    assert captures.made == 2
    assert not torch.allclose(doubled, plain, atol=1e-2)


def test_graphs_are_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="expected cuda_graph to be None or False on cpu, got True"):
        draw(tiny_unet(), cuda_graph=True)


def test_a_cpu_keeps_the_inference_form_in_the_models_dtype() -> None:
    model = tiny_unet()
    draw(model, cuda_graph=False)
    assert model not in graph._KEPT
    first = draw(model)
    frozen = graph._KEPT[model].network
    assert isinstance(frozen, FrozenUNet)
    assert frozen.dtype == torch.float32
    assert torch.equal(draw(model), first)
    assert graph._KEPT[model].network is frozen
    variational_bound(model, torch.zeros(1, 1, 8, 8), SCHEDULE, progress=False)
    assert graph._KEPT[model].network is frozen
    assert not graph._KEPT[model]._loops  # states of whole batches
    draw(model, dtype=torch.bfloat16)
    assert graph._KEPT[model].network is not frozen


# ------------------------------------------------------------------------------------------------------------------ failure


def test_steps_are_launched_one_by_one_where_a_capture_fails(
    captures: Captures, device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def fail(rehearse: Callable[[], None], *_: Any) -> None:
        tried.append(rehearse())
        raise graph.CaptureError("the moon is not full")

    monkeypatch.setattr(graph, "capture", fail)
    model = tiny_unet().to(device)
    for _ in range(2):
        assert torch.equal(draw(model), draw(copy.deepcopy(model), cuda_graph=False))
    assert len(tried) == 1  # and not again
    assert caplog.text.count("no CUDA graph: the moon is not full") == 1


def test_a_model_that_asks_the_host_falls_back(
    captures: Captures, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    if device.type == "cpu":
        pytest.skip("needs a GPU to wait for")

    class Asking(Recording):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            return super().forward(x_t, t) * float(t[0])

    model = Asking().to(device)
    images = draw(model, shape=(1, 4, 4), cuda_graph=True)
    assert "a step waits for the GPU" in caplog.text
    assert torch.equal(images, draw(model, shape=(1, 4, 4)))
    draw(tiny_unet().to(device))  # the next capture is none the worse for it
    assert captures.made == 1


def test_random_numbers_and_captures_go_on_where_cuda_gives_a_capture_up(
    captures: Captures, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    if device.type == "cpu":
        pytest.skip("needs a GPU that refuses")

    class Synchronising(Recording):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            torch.cuda.synchronize()
            return super().forward(x_t, t)

    model = Synchronising().to(device)
    images = draw(model, shape=(1, 4, 4), cuda_graph=True)
    assert "as there can be no CUDA graph" in caplog.text
    assert bool(torch.randn(4, device=device).isfinite().all())
    assert torch.equal(images, draw(model, shape=(1, 4, 4)))
    draw(tiny_unet().to(device))
    assert captures.made == 1


def test_nothing_in_the_steps_waits_for_the_gpu(captures: Captures, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("see the test that watches for host reads")
    for cuda_graph in (None, False):
        model = tiny_unet(classes=3).to(device)
        with graph.session(model, device_of(model), None, SCHEDULE.num_timesteps, cuda_graph) as session:
            arguments: dict[str, Any] = {"state_dtype": torch.float32, "memory_format": torch.channels_last}
            plan, network = ddpm_plan(SCHEDULE), session.network
            arguments |= {"network_dtype": network.conv_in.weight.dtype, "device": device_of(model)}
            make = lambda: Loop(plan, (2, 1, 8, 8), label=3, guidance_scale=2.0, **arguments)  # noqa: B023, E731
            loop = session.loop("key", make, network)
            seeds, labels = torch.zeros(2, dtype=torch.int64, device=device), torch.ones(2, dtype=torch.int64, device=device)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch calls this mode a prototype
                torch.cuda.set_sync_debug_mode("error")
            try:
                loop.start(seeds, labels)
                for _ in range(plan.num_steps):
                    loop.replay() if loop.replay else loop.advance(network)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert bool(loop.x_t.isfinite().all())


class NoHostReads(TorchDispatchMode):
    """On a GPU, any of these would wait for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES)
def test_no_step_reads_a_tensor_on_the_host(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, plan, arguments = CASES[case]
    monkeypatch.setattr(sys.modules["ddpm_fast.ops.reverse_step"], "check_range", lambda *_: None)  # it is for the CPU alone
    frozen = freeze(tiny_unet(**network), num_timesteps=20)
    labels = "class_labels" in arguments
    loop = Loop(
        plan,
        (2, 1, 8, 8),
        state_dtype=torch.float32,
        network_dtype=torch.float32,
        memory_format=torch.channels_last,
        device=torch.device("cpu"),
        label=3 if labels else None,
        guidance_scale=arguments.get("guidance_scale"),
    )
    loop.start(torch.arange(2), torch.zeros(2, dtype=torch.int64) if labels else None)
    with NoHostReads():
        for _ in range(plan.num_steps):
            loop.advance(frozen)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            float(loop.x_t.sum())


# ------------------------------------------------------------------------------------------------------------- the capture


@dataclasses.dataclass
class PretendStream:
    name: str
    log: list[str]

    def wait_stream(self, other: PretendStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class PretendCuda:
    """What `graph.capture` asks of torch.cuda, with a note of each call in `log`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.modes: list[tuple[bool, bool]] = []  # inference mode, gradients: of every rehearsal and capture
        self.mode: int | str = 0
        self.waits = self.refuses = False
        caller, self.streams = PretendStream("caller", self.log), 0
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: self.log.append("replay")))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: caller)
        monkeypatch.setattr(torch.cuda, "Stream", self.new_stream)
        monkeypatch.setattr(graph, "_CAPTURE_STREAMS", {})
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(self, "mode", mode))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *_: self.log.append("allocator ends"), raising=False)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: self.log.append("no workspaces"), raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *_: self.log.append("pool released"), raising=False)

    def new_stream(self, _: torch.device) -> PretendStream:
        self.streams += 1
        return PretendStream("side", self.log)

    @contextmanager
    def stream(self, stream: PretendStream) -> Iterator[None]:
        self.log.append(f"on {stream.name}")
        try:
            yield
        finally:
            self.log.append("on caller")

    @contextmanager
    def graph(self, *_: object, **__: object) -> Iterator[None]:
        self.log.append("begin")
        yield
        self.log.append("end")

    def rehearse(self) -> None:
        self.modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        self.log.append(f"rehearse in mode {self.mode}")
        if self.waits and self.mode == "warn":
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)

    def advance(self) -> None:
        self.modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        self.log.append("advance")
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing\nand a long story")

    def capture(self) -> Callable[[], None]:
        return graph.capture(self.rehearse, self.advance, torch.device("cuda", 0), pool="pool")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> PretendCuda:
    return PretendCuda(monkeypatch)


BEFORE = ["side waits for caller", "on side", "rehearse in mode 0", "rehearse in mode warn"]
AFTER = ["on caller", "caller waits for side"]


def test_a_capture_is_rehearsed_twice_on_its_own_stream(cuda: PretendCuda) -> None:
    replay = cuda.capture()
    # cuBLAS takes its workspaces during the capture, and leaves them to the graph.
    assert cuda.log == [*BEFORE, "no workspaces", "begin", "advance", "end", "no workspaces", *AFTER]
    replay()
    assert (cuda.log[-1], cuda.mode) == ("replay", 0)


def test_captures_share_a_stream_and_keep_no_inference_tensor(cuda: PretendCuda) -> None:
    """torch keeps a tensor for the random numbers of all graphs, which a capture outside of inference mode writes to."""
    with torch.inference_mode():
        cuda.capture()
    cuda.capture()
    assert cuda.streams == 1
    assert cuda.modes == 6 * [(False, False)]


def test_no_capture_begins_where_a_rehearsal_waits(cuda: PretendCuda) -> None:
    cuda.waits = True
    with pytest.raises(graph.CaptureError, match=r"a step waits for the GPU \(.*test_graph\.py:\d+\)"):
        cuda.capture()
    assert cuda.log == [*BEFORE, *AFTER]
    assert cuda.mode == 0


def test_a_capture_that_fails_is_ended_for_the_allocator_and_random_numbers_too(cuda: PretendCuda) -> None:
    cuda.refuses = True
    with pytest.raises(graph.CaptureError, match=r"^RuntimeError: operation not permitted when stream is capturing$"):
        cuda.capture()
    failed = ["no workspaces", "begin", "advance", "no workspaces", "allocator ends", "pool released"]
    assert cuda.log == [*BEFORE, *failed, "begin", "end", *AFTER]


def test_an_error_of_the_model_is_the_models_own(cuda: PretendCuda) -> None:
    def broken() -> None:
        raise IndexError("as without a graph")

    cuda.rehearse = broken  # type: ignore[method-assign]
    with pytest.raises(IndexError, match="as without a graph"):
        cuda.capture()
    assert cuda.log == [*BEFORE[:2], *AFTER]


@pytest.mark.parametrize("case", CASES)
def test_the_loop_runs_on_the_cuda_kernels(case: str, emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated ones, with PyTorch's convolutions and matrix products."""
    monkeypatch.setattr(
        importlib.import_module("ddpm_fast.nn.freeze"), "why_not_matrix_kernels", lambda *_: "a test wants PyTorch's"
    )
    network, plan, arguments = CASES[case]
    model, arguments = tiny_unet(**network), arguments | {"progress": False}
    networks = [freeze(model, dtype, num_timesteps=20) for dtype in (torch.float32, torch.bfloat16)]
    on_emulator = [sample(each, plan, 5, **arguments) for each in networks]
    monkeypatch.undo()
    exact = sample(model, plan, 5, dtype=torch.float64, **arguments)
    for images, each in zip(on_emulator, networks, strict=True):
        allowed = 2 * relative_error(sample(each, plan, 5, **arguments), exact)
        assert relative_error(images, exact) <= allowed
