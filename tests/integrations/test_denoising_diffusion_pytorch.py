"""denoising-diffusion-pytorch: its process on a `UNet`, frozen, as a plan, and the files of its Trainer."""

from __future__ import annotations

import argparse
import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pairwise import pairwise
from small_unets import randomise
from torch import Tensor, nn

from ddpm_fast import UNet, ddim_plan, freeze, plan_of, reverse_step, sample
from ddpm_fast.integrations.denoising_diffusion_pytorch import load_checkpoint

theirs = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
GaussianDiffusion = theirs.GaussianDiffusion

OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")
SCHEDULES = ("linear", "cosine", "sigmoid")
T = 40
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def unet(**changes: Any) -> UNet:
    model = UNet(**(SMALL | changes))
    randomise(model)
    return model


def make(model: Any = None, **options: Any) -> Any:
    return GaussianDiffusion(unet() if model is None else model, **{"image_size": 8, "timesteps": T, **options})


class Reweighted(GaussianDiffusion):  # type: ignore[misc, valid-type]
    pass


def drawn(process: Any, n: int = 2) -> Tensor:
    torch.manual_seed(0)
    images: Tensor = process.sample(n)
    return images


SAMPLERS: list[dict[str, Any]] = [
    {},
    {"sampling_timesteps": 7},
    {"sampling_timesteps": 7, "ddim_sampling_eta": 0.7},
]


def drawn_in_float64(process: Any, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Return what a process draws in float64 from the same noise."""
    exact, in_float32 = copy.deepcopy(process).double(), torch.randn_like
    exact.model.register_forward_pre_hook(lambda model, inputs: (inputs[0].double(), *inputs[1:]))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "randn_like", lambda x: in_float32(x.float()).to(x.dtype))
        return drawn(exact)


@pairwise(objective=OBJECTIVES, schedule=SCHEDULES, sampler=SAMPLERS)
def test_a_frozen_process_draws_the_same_images(
    objective: str, schedule: str, sampler: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared in float64, because untrained weights amplify the original's own rounding to 1.6e-4."""
    process = make(objective=objective, beta_schedule=schedule, **sampler).eval()
    frozen = freeze(process)
    expected = drawn_in_float64(process, monkeypatch)
    assert type(frozen) is type(process)
    assert expected.dtype == torch.float64
    assert expected.std() > 0.1
    torch.testing.assert_close(drawn(frozen).double(), expected, rtol=0, atol=2e-4)


def assert_plan_follows(process: Any) -> None:
    """Each step begins at the original's state, as an untrained network amplifies rounding from step to step."""
    states: list[Tensor] = []
    hook = process.model.register_forward_pre_hook(lambda model, inputs: states.append(inputs[0].clone()))
    torch.manual_seed(0)
    states.append(process.sample(2) * 2 - 1)
    hook.remove()
    plan = plan_of(process)
    assert len(states) == plan.num_steps + 1
    torch.manual_seed(0)
    assert torch.equal(states[0], torch.randn(2, 2, 8, 8))
    with torch.no_grad():
        for step, t in enumerate(plan.timesteps.tolist()):
            x = states[step]
            output = process.model(x, torch.full((2,), t))
            noise = torch.zeros_like(x) if step == plan.num_steps - 1 else torch.randn_like(x)  # draws nothing at the end
            x = reverse_step(x, output, step, plan, noise=noise)
            torch.testing.assert_close(x, states[step + 1], rtol=0, atol=2e-5)


@pairwise(objective=OBJECTIVES, schedule=SCHEDULES, sampler=SAMPLERS)
def test_trajectories_of_plans_are_the_originals(objective: str, schedule: str, sampler: dict[str, Any]) -> None:
    assert_plan_follows(make(objective=objective, beta_schedule=schedule, **sampler).eval())


# what is set in a process that was made -> number of its steps
SWITCHES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "ancestral with fewer": ({}, {"sampling_timesteps": 7}, T),
    "ancestral again": ({"sampling_timesteps": 7}, {"is_ddim_sampling": False}, T),
    "all timesteps of DDIM": ({}, {"is_ddim_sampling": True}, T),
    "fewer of DDIM": ({"sampling_timesteps": 7}, {"sampling_timesteps": 5, "ddim_sampling_eta": 0.5}, 5),
    "first timesteps": ({}, {"num_timesteps": 9}, 9),
    "first timesteps of DDIM": ({"sampling_timesteps": 7}, {"num_timesteps": 9}, 7),
    "training alone": ({}, {"immiscible": True, "offset_noise_strength": 0.1}, T),  # training reads them
}


@pytest.mark.parametrize("what", SWITCHES)
def test_plans_do_what_the_switches_of_a_process_say(what: str) -> None:
    options, attributes, num_steps = SWITCHES[what]
    process = make(**options).eval()
    for name, value in attributes.items():
        setattr(process, name, value)
    assert plan_of(process).num_steps == num_steps
    assert_plan_follows(process)


TABLES = [
    *("alphas_cumprod", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod"),
    *("sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1", "posterior_mean_coef2", "posterior_log_variance_clipped"),
]


@pytest.mark.parametrize("factor", [0.995, 1 + 2e-6])
@pytest.mark.parametrize("name", TABLES)
def test_tables_that_betas_do_not_give_are_named(name: str, factor: float) -> None:
    process = make()
    process.get_buffer(name).mul_(factor)
    with pytest.raises(ValueError, match=rf"^plan_of: expected x\.{name} to be what x\.betas give, .* got other values$"):
        plan_of(process)


def test_a_process_of_other_betas_or_in_bfloat16_is_no_plan() -> None:
    for change in (lambda process: process.betas.mul_(0.99), lambda process: process.bfloat16()):
        process = make()
        change(process)
        with pytest.raises(ValueError, match=r"^plan_of: expected x\.alphas_cumprod to be what x\.betas give"):
            plan_of(process)
    process = make(min_snr_loss_weight=True)
    process.loss_weight.mul_(2)  # for training alone
    assert plan_of(process.double()).num_steps == T


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timesteps", [2, 40, 1000, 4000])
def test_rounding_of_the_tables_is_no_change(timesteps: int, schedule: str) -> None:
    assert plan_of(make(timesteps=max(timesteps, 21 if schedule == "linear" else 2), beta_schedule=schedule))


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("objective", "pred_score", "one of pred_noise, pred_x0, pred_v, got 'pred_score'"),
        ("sampling_timesteps", 0, r"an integer in 1\.\.40, got 0"),
        ("sampling_timesteps", 41, r"an integer in 1\.\.40, got 41"),
        ("sampling_timesteps", 7.0, r"an integer in 1\.\.40, got 7\.0"),
    ],
)
def test_settings_that_a_process_cannot_sample_with_are_named(name: str, value: Any, wanted: str) -> None:
    process = make(sampling_timesteps=7)
    setattr(process, name, value)
    with pytest.raises((ValueError, TypeError), match=rf"^plan_of: expected x\.{name} to be {wanted}$"):
        plan_of(process)


def test_more_timesteps_than_a_process_has_tables_for_are_refused() -> None:
    process = make()
    process.num_timesteps = T + 1
    with pytest.raises(ValueError, match=r"to be strictly descending timesteps in 0\.\.39, got \[40, 39, "):
        plan_of(process)


def test_a_process_is_no_network_to_sample_with() -> None:
    process = make().eval()
    plan = plan_of(process, 3)
    draw: Any = partial(sample, plan=plan, num_samples=2, shape=(2, 8, 8), progress=False)
    for wrong in (process, freeze(process), Reweighted(unet(), image_size=8, timesteps=T)):
        with pytest.raises(
            TypeError,
            match=r"^sample: expected model to be a network, called as model\(x_t, t\), got a \w+ x: pass x\.model, and "
            r"plan_of\(x\) as the plan$",
        ):
            draw(wrong)

    class GaussianDiffusion(nn.Module):  # a network of this name
        def __init__(self) -> None:
            super().__init__()
            self.model = process.model

        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            output: Tensor = self.model(x_t, t)
            return output

    expected = draw(process.model, dtype=torch.float32)
    torch.testing.assert_close(draw(GaussianDiffusion()), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(draw(lambda x_t, t: process.model(x_t, t)), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(draw(freeze(process).model), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("num_steps", [1, 7, 50, 250, 411, 413, 999])
def test_ddim_takes_the_timesteps_of_the_original(num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    process = make(timesteps=1000, sampling_timesteps=num_steps)
    expected = plan_of(process).timesteps.tolist()
    told: list[int] = []

    def predictions(x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        told.append(int(t[0]))
        return x, x

    monkeypatch.setattr(process, "model_predictions", predictions)
    process.sample(1)
    assert expected == told


def test_a_plan_may_have_other_steps_than_the_process() -> None:
    process = make(objective="pred_x0")
    assert plan_of(process).num_steps == T
    assert plan_of(process, 9).num_steps == 9
    assert not plan_of(process, 9).is_random
    assert plan_of(process, 9, eta=1.0).is_random
    fewer = make(objective="pred_x0", sampling_timesteps=9)
    assert torch.equal(plan_of(process, 9).coefficients, plan_of(fewer).coefficients)
    ddim = ddim_plan(plan_of(process).schedule, None, spacing=list(range(T))[::-1], prediction="sample", eta=0.0)
    assert torch.equal(plan_of(process, eta=0.0).coefficients, ddim.coefficients)


def test_an_image_of_a_plan_is_its_own() -> None:
    process = make(theirs.Unet(8, dim_mults=(1, 2), channels=2).eval())
    plan = plan_of(process, 4)
    together = sample(process.model, plan, 3, shape=(2, 8, 8), progress=False)  # their own network is taken as it is
    torch.testing.assert_close(sample(process.model, plan, 1, shape=(2, 8, 8), progress=False), together[:1], rtol=0, atol=2e-6)


def test_their_process_trains_a_unet() -> None:
    torch.manual_seed(0)
    process = make(UNet(**SMALL), min_snr_loss_weight=True)
    optimizer = torch.optim.Adam(process.parameters(), lr=1e-2)
    images, noise, times = torch.zeros(16, 2, 8, 8), torch.randn(16, 2, 8, 8), torch.arange(16) * 2

    def loss() -> float:
        with torch.no_grad():
            return float(process.p_losses(process.normalize(images), times, noise=noise.clone()))

    untrained = loss()
    for _ in range(40):
        optimizer.zero_grad()
        process(images).backward()
        optimizer.step()
    assert loss() < 0.8 * untrained
    frozen = freeze(process.eval())
    before = drawn(frozen)
    torch.testing.assert_close(before, drawn(process), rtol=0, atol=5e-5)  # float32 networks along 40 steps
    with torch.no_grad():
        process.model.conv_out.weight.neg_()
        process.betas.zero_()
    assert torch.equal(drawn(frozen), before)  # nothing that happens to the process reaches it


def test_a_frozen_process_is_immutable_and_leaves_its_original() -> None:
    process = make().train()
    process.register_buffer("alias", process.betas, persistent=False)
    frozen = freeze(process, torch.bfloat16)
    assert process.training
    assert isinstance(process.model, UNet)
    assert frozen.model.frozen_unet.dtype == torch.bfloat16
    assert drawn(frozen).dtype == torch.float32
    assert freeze(process).model.dtype == torch.float32
    assert freeze(process).model.frozen_unet.dtype == torch.float32
    assert frozen.model.frozen_unet.num_timesteps == T
    assert list(frozen.parameters()) == []
    twice = {name: 2 * buffer for name, buffer in process.named_buffers()}
    frozen.register_forward_hook(lambda *args: None)
    assert not process._forward_hooks
    for change in (
        *(lambda: frozen.load_state_dict(twice), lambda: frozen.load_state_dict(twice, strict=False)),
        *(frozen.train, frozen.state_dict, frozen.half, lambda: setattr(frozen.model, "channels", 3)),
    ):
        with pytest.raises(
            ValueError, match=r"^FrozenModule: expected no .*, because the network is frozen, got one: .* the UNet from which"
        ):
            change()
    with pytest.raises(TypeError, match="it cannot be pickled: save the UNet"):
        pickle.dumps(freeze(process))
    assert torch.equal(frozen.betas, process.betas)
    for name, buffer in frozen.named_buffers(remove_duplicate=False):
        buffer.zero_()
        assert process.get_buffer(name).any(), name


def test_processes_that_are_no_plan_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"^plan_of: expected x to be a GaussianDiffusion itself, .*, got a Reweighted of test_"
    ):
        plan_of(Reweighted(unet(), image_size=8, timesteps=T))
    patched = make()
    patched.p_mean_variance = patched.p_mean_variance
    with pytest.raises(
        ValueError, match=r"^plan_of: expected x to have the methods of its class, got another p_mean_variance$"
    ):
        plan_of(patched)
    compiled = make()
    compiled.compile(backend="eager")
    assert plan_of(compiled, 5).num_steps == 5
    with pytest.raises(ValueError, match=r"^plan_of: expected num_steps to be an integer in 1\.\.40, got 41$"):
        plan_of(make(), 41)


def test_networks_that_a_process_cannot_be_frozen_with_are_named() -> None:
    for network in (process := make(theirs.Unet(8, dim_mults=(1, 2)), image_size=16), process.model):
        with pytest.raises(TypeError, match=r"^freeze: expected x.* a Unet\b"):
            freeze(network)
    with pytest.raises(
        TypeError,
        match=r"expected x\.model to be a ddpm_fast\.UNet, got a Unet, which freeze does not know: train a ddpm_fast\.UNet in",
    ):
        freeze(process)
    with pytest.raises(ValueError, match=r"expected x\.model to have no classes, which the process does not know"):
        freeze(make(unet(num_class_embeds=3)))
    changed = make()
    changed.model.conv_in.padding_mode = "circular"
    with pytest.raises(TypeError, match=r"got one where conv_in.padding_mode is 'circular'"):
        freeze(changed)
    with pytest.raises(ValueError, match=r"plan_of: expected x to have a network without self-conditioning"):
        plan_of(make(theirs.Unet(8, dim_mults=(1, 2), self_condition=True), image_size=16))


# ----------------------------------------------------------------------------------------------------------- checkpoints


def save(path: Path, **changes: Any) -> Any:
    """A file with the names of their Trainer. The moving average is half of the weights."""
    process = make()
    average = copy.deepcopy(process)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(0.5)
    ema = {f"ema_model.{k}": v for k, v in average.state_dict().items()}
    ema |= {f"online_model.{k}": v for k, v in process.state_dict().items()}
    ema |= {"initted": torch.tensor(True), "step": torch.tensor(30)}
    optimizer = torch.optim.Adam(process.parameters())
    content = {"step": 30, "model": process.state_dict(), "opt": optimizer.state_dict(), "ema": ema, "scaler": None}
    torch.save(content | {"version": "2.3.4"} | changes, path)
    return process


def test_checkpoints_load_with_either_weights(tmp_path: Path) -> None:
    saved = save(tmp_path / "model-1.pt")
    for weights, factor in (("ema", 0.5), ("model", 1.0)):
        process = make(UNet(**SMALL))
        assert load_checkpoint(process, tmp_path / "model-1.pt", weights=weights) == 30  # type: ignore[arg-type]
        assert torch.equal(process.model.conv_in.weight, saved.model.conv_in.weight * factor)
    default = make(UNet(**SMALL))
    load_checkpoint(default, str(tmp_path / "model-1.pt"))
    assert torch.equal(default.model.conv_in.weight, saved.model.conv_in.weight / 2)


def test_a_checkpoint_of_their_moving_average_loads(tmp_path: Path) -> None:
    process = make(theirs.Unet(8, dim_mults=(1, 2), channels=2))
    ema = theirs.EMA(process, beta=0.995, update_every=1, update_after_step=0)
    for _ in range(3):
        with torch.no_grad():
            for parameter in process.parameters():
                parameter.add_(0.1)
        ema.update()
    torch.save({"step": 3, "model": process.state_dict(), "ema": ema.state_dict()}, tmp_path / "model-1.pt")
    other = make(theirs.Unet(8, dim_mults=(1, 2), channels=2))
    load_checkpoint(other, tmp_path / "model-1.pt")
    for name, tensor in ema.ema_model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    assert not torch.equal(other.model.init_conv.weight, process.model.init_conv.weight)


class _Harmful:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('code from a checkpoint ran')",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opt": _Harmful()}, r"expected '.*' to hold tensors and plain values, got a \S*exec, which needs pickle"),
        ({"opt": argparse.Namespace(a=1)}, r"got a argparse\.Namespace, which needs pickle, and pickle may run any code"),
        ({"model": None}, "to be a Trainer's checkpoint, with step, model and ema, got one with step, model, opt, ema"),
        ({"step": "x"}, "to be a Trainer's checkpoint"),
        ({"model": {}}, r"expected the weights in '.*' to fit the model, got missing alphas_cumprod, .* more"),
        ({"model": make(unet(layers_per_block=2)).state_dict()}, "to fit the model, got unexpected model"),
        ({"model": make(timesteps=T + 1).state_dict()}, r"expected betas to have shape \[40\] \(by the model\), got \[41\]"),
    ],
)
def test_checkpoints_that_do_not_fit_leave_the_model_as_it_was(tmp_path: Path, changes: Any, message: str) -> None:
    save(tmp_path / "model-1.pt", **changes)
    process = make(UNet(**SMALL))
    before = copy.deepcopy(process.state_dict())
    with pytest.raises(ValueError, match="load_checkpoint: .*" + message):
        load_checkpoint(process, tmp_path / "model-1.pt", weights="model")
    for name, tensor in process.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    file = tmp_path / "model-1.pt"
    with pytest.raises(FileNotFoundError, match=r"load_checkpoint: expected path to be a file, got '.*model-1\.pt'"):
        load_checkpoint(make(), file)
    save(file)
    whole = file.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"load_checkpoint: expected '.*' to be a whole file of torch\.save, got"):
            load_checkpoint(make(), file)
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match=r"load_checkpoint: expected .* with step, model and ema, got one with no names"):
        load_checkpoint(make(), file)
    wrong: Any = "average"
    with pytest.raises(ValueError, match="load_checkpoint: expected weights to be one of ema, model, got 'average'"):
        load_checkpoint(make(), file, weights=wrong)
    with pytest.raises(TypeError, match=r"load_checkpoint: expected process to be a GaussianDiffusion of .*, got Linear"):
        load_checkpoint(nn.Linear(1, 1), file)
