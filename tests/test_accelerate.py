"""`accelerate`: a diffusers pipeline makes the same images with this package's network and scheduler in it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from small_unets import SMALL, VARIANTS, make_inputs, randomise, relative_error
from torch import Tensor, nn

from ddpm_fast import accelerate, fuse, restore

diffusers = pytest.importorskip("diffusers")
from ddpm_fast.integrations import diffusers as schedulers  # noqa: E402

Pipeline = Any
STEPS = 6
PIPELINES = ["DDPM", "DDIM"]


def make_unet(variant: str = "one-head-asymmetric", **changes: Any) -> Any:
    unet = diffusers.UNet2DModel(**(SMALL | {"out_channels": 2} | VARIANTS[variant] | changes)).eval()
    randomise(unet)
    return unet


def make(kind: str = "DDPM", *, unet: Any = None, **scheduler: Any) -> Pipeline:
    made = getattr(diffusers, f"{kind}Scheduler")(**scheduler)
    pipe = getattr(diffusers, f"{kind}Pipeline")(unet=make_unet() if unet is None else unet, scheduler=made)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(pipe: Pipeline, n: int = 2, **arguments: Any) -> Tensor:
    arguments = {"generator": generator(), "num_inference_steps": STEPS, "output_type": "pt"} | arguments
    return pipe(batch_size=n, **arguments).images


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """To the rounding of float32 networks of these sizes, over some steps, in [0, 1]."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("kind", PIPELINES)
def test_the_same_seed_gives_the_same_images(kind: str, freeze: bool) -> None:
    pipe = make(kind)
    arguments = {"eta": 0.7} if kind == "DDIM" else {}
    expected = images(pipe, 3, **arguments)
    assert accelerate(pipe, freeze=freeze) is pipe
    assert expected.std() > 0.1  # no picture of clipping
    assert_same(images(pipe, 3, **arguments), expected)


@pytest.mark.parametrize("clipped", [None, False, True])
def test_a_ddim_pipeline_derives_epsilon_again_only_if_asked(clipped: bool | None) -> None:
    pipe = make("DDIM")
    arguments = {} if clipped is None else {"use_clipped_model_output": clipped}
    expected, other = images(pipe, **arguments), images(pipe, use_clipped_model_output=not clipped)
    assert_same(images(accelerate(pipe), **arguments), expected)
    assert (other - expected).abs().max() > 1e-2  # the clip acts: the two ways differ


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "class-conditional"])
def test_any_network_that_the_package_knows(variant: str) -> None:
    pipe = make(unet=make_unet(variant))
    expected = images(pipe)
    assert_same(images(accelerate(pipe)), expected)


@pytest.mark.parametrize("settings", [{"variance_type": "fixed_large"}, {"prediction_type": "v_prediction"}], ids=str)
def test_the_scheduler_keeps_its_configuration(settings: dict[str, Any]) -> None:
    pipe = make(**settings)
    expected = images(pipe)
    accelerate(pipe)
    assert type(pipe.scheduler) is schedulers.DDPMScheduler
    assert_same(images(pipe), expected)


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDIMScheduler"])
def test_a_ddpm_pipeline_may_hold_either_scheduler(scheduler: str) -> None:
    pipe = make()
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    expected = images(pipe)
    assert_same(images(accelerate(pipe)), expected)
    assert type(pipe.scheduler) is getattr(schedulers, scheduler)


@pytest.mark.parametrize("kind", PIPELINES)
def test_the_call_and_its_results_stay_the_same(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain = make(kind, unet=make_unet(in_channels=3, out_channels=3))
    pipe = accelerate(copy.deepcopy(plain))
    for output_type in ("pil", "np", "pt"):
        got, expected = (p(2, generator(), num_inference_steps=2, output_type=output_type) for p in (pipe, plain))
        assert type(got) is type(expected)
        assert type(got.images) is type(expected.images)
        both = [np.stack([np.asarray(image, dtype=np.float64) for image in result.images]) for result in (got, expected)]
        np.testing.assert_allclose(*both, rtol=0, atol=1 if output_type == "pil" else 2e-5)
    generators = [generator(3), generator(4)]
    (got,) = pipe(2, [g.clone_state() for g in generators], num_inference_steps=2, output_type="pt", return_dict=False)
    assert_same(got, plain(2, generators, num_inference_steps=2, output_type="pt").images)
    pipe.set_progress_bar_config(disable=False)
    images(pipe)
    assert f"{STEPS}/{STEPS}" in capsys.readouterr().err
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        pipe(steps=3)


def test_a_bfloat16_network_in_a_float32_pipeline() -> None:
    """The state stays float32: the error is that of the network, and no worse than with diffusers in bfloat16 altogether."""
    exact = images(make(unet=make_unet()), num_inference_steps=50)
    half = make().to(dtype=torch.bfloat16)
    allowed = relative_error(images(half, num_inference_steps=50).float(), exact)
    pipe = accelerate(make(), dtype=torch.bfloat16)
    assert pipe.unet.dtype == pipe.dtype == torch.float32
    seen = []
    pipe.unet.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.sample.dtype)))
    got = images(pipe, num_inference_steps=50)
    assert set(seen) == {(torch.float32, torch.float32)}
    assert 0 < relative_error(got, exact) <= allowed


def test_a_pipeline_in_bfloat16() -> None:
    pipe = make().to(dtype=torch.bfloat16)
    exact = images(make())
    allowed = relative_error(images(pipe).float(), exact)
    accelerate(pipe)
    got = images(pipe)
    assert got.dtype == torch.bfloat16
    assert relative_error(got.float(), exact) <= 2 * allowed


def test_the_network_has_the_same_parameters() -> None:
    pipe = make()
    unet = pipe.unet
    accelerate(pipe)
    assert isinstance(pipe.unet, diffusers.UNet2DModel)
    assert [(name, id(p)) for name, p in pipe.unet.named_parameters()] == [(name, id(p)) for name, p in unet.named_parameters()]
    assert pipe.unet.config == unet.config
    assert list(pipe.unet.state_dict()) == list(unet.state_dict())


@pytest.mark.parametrize("freeze", [True, False])
def test_an_accelerated_network_trains(freeze: bool) -> None:
    """Where gradients are recorded, in the network and in its input, it is no inference form."""
    unet = make_unet().double()
    gradients = []
    for network in (unet, accelerate(make(unet=unet), freeze=freeze).unet):
        x = torch.linspace(-1, 1, 1024, dtype=torch.float64).reshape(2, 2, 16, 16).requires_grad_()
        unet.zero_grad()
        network(x, 3).sample.square().mean().backward()
        gradients.append([x.grad, *(parameter.grad.clone() for parameter in unet.parameters())])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


def test_pipelines_may_share_an_accelerated_network() -> None:
    first = accelerate(make("DDPM"))
    shared = first.unet
    second = diffusers.DDIMPipeline(**first.components)
    expected = images(second)
    assert_same(images(accelerate(second)), expected)
    assert restore(second).unet is shared
    assert first.unet is shared


def test_timesteps_between_those_of_the_schedule() -> None:
    pipe = make()
    x, t = torch.ones(2, 2, 16, 16), torch.tensor([3.5, 700.25])
    with torch.no_grad():
        expected = pipe.unet(x, t).sample
        assert_same(accelerate(pipe).unet(x, t).sample, expected)


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("write", ["optimizer", "data", "replaced", "load_state_dict"])
def test_what_happens_to_the_weights_later_counts(write: str, freeze: bool) -> None:
    pipe = make()
    unet = pipe.unet
    accelerate(pipe, freeze=freeze)
    before = images(pipe)
    if write == "optimizer":
        optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
        unet(torch.ones(1, 2, 16, 16), 3).sample.square().mean().backward()
        optimizer.step()
    elif write == "data":  # as diffusers' EMAModel does it
        for parameter in unet.parameters():
            parameter.data.copy_(parameter.data * 0.9)
    elif write == "replaced":
        unet.conv_out.weight = nn.Parameter(unet.conv_out.weight.detach() * 0.9)
    else:
        unet.load_state_dict({name: value * 0.9 for name, value in unet.state_dict().items()})
    after = images(pipe)
    assert relative_error(after, before) > 1e-3
    assert_same(after, images(restore(pipe)))


def test_the_frozen_network_is_kept_from_call_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from ddpm_fast import graph

    frozen = []

    def freeze(*args: Any, **kwargs: Any) -> Any:
        frozen.append(real(*args, **kwargs))
        return frozen[-1]

    real = graph.freeze
    monkeypatch.setattr(graph, "freeze", freeze)
    pipe = accelerate(make())
    first = images(pipe)
    assert torch.equal(images(pipe), first)
    assert len(frozen) == 1
    pipe.unet.conv_out.weight.data.mul_(2)
    images(pipe)
    assert len(frozen) == 2


@torch.no_grad()
def test_the_network_may_be_called_by_itself() -> None:
    """In a loop of the user's own, with class labels, and without an object around the result."""
    unet = make_unet("class-conditional")
    x, t, labels = make_inputs(unet.config, 2)
    expected = unet(x, t, labels).sample
    pipe = accelerate(make(unet=unet))
    assert_same(pipe.unet(x, t, class_labels=labels).sample, expected)
    assert_same(pipe.unet(x, t, labels, return_dict=False)[0], expected)


def test_dropout_goes_by_the_mode_of_the_network_that_is_not_frozen() -> None:
    pipe = accelerate(make(unet=make_unet(dropout=0.5)), freeze=False)
    unet = pipe.parts.own["unet"]
    expected = images(pipe)
    unet.train()
    torch.manual_seed(0)
    assert relative_error(images(pipe), expected) > 1e-2
    unet.eval()
    assert torch.equal(images(pipe), expected)


def test_a_copy_is_accelerated_and_apart() -> None:
    pipe = accelerate(make())
    expected = images(pipe)
    twin = copy.deepcopy(pipe)
    for parameter in pipe.unet.parameters():
        parameter.data.zero_()
    assert torch.equal(images(twin), expected)
    assert_same(images(restore(twin)), expected)


def test_restore_undoes_it() -> None:
    pipe = make()
    unet, scheduler, kind, state, names = pipe.unet, pipe.scheduler, type(pipe), set(vars(pipe)), set(vars(pipe.unet))
    expected = images(pipe)
    accelerate(pipe)
    images(pipe)
    assert restore(pipe) is pipe
    assert (pipe.unet, pipe.scheduler, type(pipe)) == (unet, scheduler, kind)
    assert set(vars(pipe)) == state
    assert set(vars(unet)) == names
    assert torch.equal(images(pipe), expected)
    assert restore(pipe) is pipe  # nothing to undo


def test_restore_keeps_what_somebody_else_has_put_in() -> None:
    pipe = accelerate(make())
    unet = pipe.parts.own["unet"]
    pipe.scheduler = other = diffusers.DDIMScheduler()
    restore(pipe)
    assert pipe.scheduler is other
    assert pipe.unet is unet


def test_accelerating_again_starts_anew() -> None:
    pipe = make()
    unet = pipe.unet
    expected = images(pipe)
    accelerate(pipe, dtype=torch.bfloat16)
    accelerate(pipe)
    assert_same(images(pipe), expected)
    restore(pipe)
    assert pipe.unet is unet


def test_a_fused_network_is_taken() -> None:
    pipe = make()
    expected = images(pipe)
    fuse(pipe.unet)
    assert_same(images(accelerate(pipe)), expected)


# -------------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", PIPELINES)
def test_what_is_saved_is_diffusers_own(kind: str, tmp_path: Path) -> None:
    pipe = make(kind)
    pipe.save_pretrained(tmp_path / "plain")
    accelerate(pipe).save_pretrained(tmp_path / "ours")
    files = sorted(path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*") if path.is_file())
    assert len(files) == 4
    for file in files:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    assert type(pipe.scheduler).__module__ == "ddpm_fast.integrations.diffusers"  # accelerated still
    again = type(make(kind)).from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler).__module__.startswith("diffusers.")
    assert_same(images(pipe), images(again))


def write_google_folder(folder: Path) -> None:
    """As Google's DDPMs are stored: everything at the root, and attention's weights under their old names."""
    unet = make_unet(attention_head_dim=None)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, tensor in unet.state_dict().items():
        for new_name, old_name in old.items():
            name = name.replace(f".{new_name}.", f".{old_name}.")
        weights[name] = tensor.contiguous()
    folder.mkdir()
    config = dict(unet.config) | {"_class_name": "UNet2DModel", "_diffusers_version": "0.0.4"}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "_use_default_values"}))
    safetensors.torch.save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    diffusers.DDPMScheduler(variance_type="fixed_large").save_config(folder)
    index = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    index |= {"_class_name": "DDPMPipeline", "_diffusers_version": "0.0.4"}  # type: ignore[dict-item]
    (folder / "model_index.json").write_text(json.dumps(index))


def test_a_folder_in_googles_layout(tmp_path: Path) -> None:
    folder = tmp_path / "ddpm"
    write_google_folder(folder)
    pipe = diffusers.DDPMPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    expected = images(pipe)
    assert_same(images(make(unet=make_unet(attention_head_dim=None), variance_type="fixed_large")), expected)
    assert_same(images(accelerate(pipe)), expected)


# ------------------------------------------------------------------------------------------------------------------- philox


@pytest.mark.parametrize("kind", PIPELINES)
def test_with_philox_an_image_is_the_same_in_any_batch(kind: str) -> None:
    pipe = accelerate(make(kind), noise="philox")
    arguments = {"eta": 1.0} if kind == "DDIM" else {}
    four = images(pipe, 4, **arguments)
    assert_same(images(pipe, 1, **arguments), four[:1])
    assert_same(images(pipe, 3, **arguments), four[:3])
    one, two = images(pipe, generator=[generator(5), generator(6)], **arguments)
    assert_same(images(pipe, generator=[generator(6), generator(5)], **arguments), torch.stack([two, one]))
    assert relative_error(one, two) > 0.1
    assert pipe.scheduler.seeds is None


def test_with_philox_a_generator_goes_on() -> None:
    pipe = accelerate(make(), noise="philox")
    g = generator()
    first, second = images(pipe, generator=g), images(pipe, generator=g)
    assert relative_error(first, second) > 0.1
    torch.manual_seed(1)
    first = images(pipe, generator=None)
    torch.manual_seed(1)
    assert torch.equal(images(pipe, generator=None), first)


# ------------------------------------------------------------------------------------------------------------------- errors


class Custom(diffusers.DDPMPipeline):  # type: ignore[misc, name-defined]
    def __call__(self, count: int) -> Any:
        return super().__call__(count)


def changed(change: Callable[[Any], Any]) -> Callable[[], Pipeline]:
    def make_changed() -> Pipeline:
        pipe = make()
        change(pipe)
        return pipe

    return make_changed


def part(name: str, value: Callable[[Any], Any]) -> Callable[[], Pipeline]:
    return changed(lambda pipe: setattr(pipe, name, value(pipe)))


def _offloaded(pipe: Pipeline) -> None:
    pipe.unet.mid_block.forward = pipe.unet.mid_block.forward


NOT_FOR_UNET = "accelerate: expected pipe.unet to be one that ddpm_fast.UNet can stand for, got: "
ERRORS: list[tuple[str, Callable[[], Any], dict[str, Any], type[Exception], str]] = [
    (
        "no pipeline",
        make_unet,
        {},
        TypeError,
        "accelerate: expected pipe to be a DDPMPipeline or a DDIMPipeline, got UNet2DModel",
    ),
    ("noise", make, {"noise": "cuda"}, ValueError, 'accelerate: expected noise to be "torch" or "philox", got \'cuda\''),
    ("freeze", make, {"freeze": 1}, TypeError, "accelerate: expected freeze to be a bool, got int"),
    (
        "dtype",
        make,
        {"dtype": torch.int32},
        ValueError,
        "accelerate: expected dtype to be None or a floating dtype, got torch.int32",
    ),
    (
        "dtype, not frozen",
        make,
        {"dtype": torch.bfloat16, "freeze": False},
        ValueError,
        "accelerate: expected dtype to be None or the network's, torch.float32, with freeze=False, which shares its weights, "
        "got torch.bfloat16",
    ),
    (
        "call",
        lambda: Custom(unet=make_unet(), scheduler=diffusers.DDPMScheduler()),
        {"noise": "philox"},
        ValueError,
        'accelerate: expected the call of pipe to have batch_size and generator for noise="philox", got a Custom without',
    ),
    (
        "compiled",
        part("unet", lambda pipe: torch.compile(pipe.unet, backend="eager")),
        {},
        TypeError,
        "accelerate: expected pipe.unet to be a UNet2DModel, got OptimizedModule; ddpm_fast.fuse takes any",
    ),
    (
        "configuration",
        part("unet", lambda pipe: make_unet(act_fn="gelu")),
        {},
        ValueError,
        f"{NOT_FOR_UNET}UNet: expected act_fn to be 'silu' or 'swish', got 'gelu'",
    ),
    (
        "layer",
        changed(lambda pipe: setattr(pipe.unet, "conv_in", nn.Sequential(pipe.unet.conv_in))),
        {},
        ValueError,
        f"{NOT_FOR_UNET}conv_in is a Sequential",
    ),
    (
        "hook",
        changed(lambda pipe: pipe.unet.conv_out.register_forward_hook(lambda *args: None)),
        {},
        ValueError,
        f"{NOT_FOR_UNET}conv_out has forward hooks",
    ),
    ("patch", changed(_offloaded), {}, ValueError, f"{NOT_FOR_UNET}mid_block has a patched forward (offloading does that)"),
    (
        "processor",
        changed(lambda pipe: setattr(pipe.unet.mid_block.attentions[0], "processor", nn.Identity())),
        {},
        ValueError,
        f"{NOT_FOR_UNET}mid_block.attentions.0 has a Identity",
    ),
    (
        "scheduler",
        part("scheduler", lambda pipe: diffusers.PNDMScheduler()),
        {},
        TypeError,
        "accelerate: expected pipe.scheduler to be a DDPMScheduler or a DDIMScheduler, got PNDMScheduler",
    ),
    (
        "scheduler's configuration",
        part("scheduler", lambda pipe: diffusers.DDPMScheduler(beta_end=3.0)),
        {},
        ValueError,
        "accelerate: expected pipe.scheduler to have a supported configuration, got: ",
    ),
]


@pytest.mark.parametrize(("what", "pipe", "arguments", "error", "message"), ERRORS, ids=[case[0] for case in ERRORS])
def test_what_it_cannot_take_is_named(
    what: str, pipe: Callable[[], Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    made = pipe()
    state = dict(vars(made))
    with pytest.raises(error, match="^" + re.escape(message)) as raised:
        accelerate(made, **arguments)
    assert what == "scheduler's configuration" or str(raised.value) == message
    assert {name: value for name, value in vars(made).items() if name in state} == state  # left as it was


def test_restore_takes_pipelines_only() -> None:
    with pytest.raises(TypeError, match=r"^restore: expected pipe to be a DDPMPipeline or a DDIMPipeline, got dict$"):
        restore({})


def test_what_is_put_into_the_network_later_is_noticed() -> None:
    pipe = accelerate(make())
    pipe.unet.conv_out.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="conv_out has forward hooks"):
        images(pipe)
    images(restore(pipe))


def test_philox_with_a_list_of_generators_of_another_length() -> None:
    pipe = accelerate(make(), noise="philox")
    assert torch.equal(images(pipe, generator=[generator()]), images(pipe))  # as diffusers takes a list of one
    with pytest.raises(ValueError, match=r"^the accelerated pipeline: expected generator to be a list of 3, got 2$"):
        images(pipe, 3, generator=[generator(), generator()])
