"""guided-diffusion: its network frozen and loaded, its processes as plans, against recorded values of the original."""

from __future__ import annotations

import enum
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from changes import Change, given, hooked, replaced
from other_blocks import ForkedUNetModel, UNetModel, in_float64
from record_guided_diffusion import layout, recorded, recorded_layouts
from small_unets import relative_error
from torch import Tensor, nn

from ddpm_fast import NoiseSchedule, SamplingPlan, UNet, ddim_plan, ddpm_plan, freeze, plan_of, reverse_step, sample
from ddpm_fast.integrations.guided_diffusion import load_guided_diffusion

ModelMeanType = enum.Enum("ModelMeanType", ["PREVIOUS_X", "START_X", "EPSILON"])
ModelVarType = enum.Enum("ModelVarType", ["LEARNED", "FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE"])
BOTH = list(itertools.product(ModelMeanType, ModelVarType))
ETAS = (None, 0.0, 1.0)  # None: p_sample_loop
SHAPE = (3, 2, 4, 5)
T, RESPACING = 60, "6,4,5"  # 1000 timesteps would take long; betas reach as far
KEPT = [0, 4, 8, 11, 15, 19, 20, 26, 33, 39, 40, 45, 50, 54, 59]  # what the original makes of RESPACING
BETAS = np.linspace(0.1 / T, 20 / T, T)


class Network(nn.Module):
    """A formula with weights."""

    def __init__(self, var: ModelVarType) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        channels = 4 if var.name.startswith("LEARNED") else 2
        self.weight = nn.Parameter(0.5 * torch.randn(channels, 2, generator=generator))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        u = (t.to(x.dtype) / T).reshape(-1, 1, 1, 1)
        return torch.sin(torch.einsum("oc,nchw->nohw", self.weight, torch.tanh(x)).contiguous() + torch.cos(3 * u))


class GaussianDiffusion:
    """The attributes of the original's `SpacedDiffusion`, which keeps nothing of the timesteps that it leaves out."""

    def __init__(self, mean: ModelMeanType, var: ModelVarType, kept: list[int] = KEPT, betas: Any = BETAS) -> None:
        abar = np.cumprod(1 - betas)[kept]
        self.betas = 1 - abar / np.append(1.0, abar[:-1])
        self.model_mean_type, self.model_var_type = mean, var
        self.timestep_map, self.num_timesteps, self.original_num_steps = kept, len(kept), len(betas)
        self.rescale_timesteps = False


# name -> arguments of a UNetModel beside BASE
BASE: dict[str, Any] = {
    "image_size": 16,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": (2, 4),
    "channel_mult": (1, 2, 3),
    "num_heads": 4,
}
CASES: dict[str, dict[str, Any]] = {
    "heads-of-any-width": {},
    "one-head-two-blocks": {"num_heads": 1, "num_res_blocks": 2},
    "new-order": {"use_new_attention_order": True, "num_heads": 2},
    "scale-shift-learned": {"use_scale_shift_norm": True, "out_channels": 6},
    "dhariwal-nichol": {
        "num_head_channels": 16,
        "use_new_attention_order": True,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "out_channels": 6,
        "num_classes": 10,
    },
    "legacy-order-updown": {"num_head_channels": 32, "resblock_updown": True, "attention_resolutions": (1, 4)},
    "half-width": {"model_channels": 64, "channel_mult": (0.5, 1), "attention_resolutions": (2,), "resblock_updown": True},
    "one-level": {"channel_mult": (1,), "attention_resolutions": ()},
    "super-resolution": {"in_channels": 6, "channel_mult": (1, 2), "attention_resolutions": ()},
}
UNTOLD = ("num_heads", "num_head_channels", "use_new_attention_order", "image_size")  # by the weights


def randomised(network: nn.Module) -> nn.Module:
    """Give the same weights to networks with the same names. None is a value at which a layer does nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, weight in sorted(network.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * weight[0].numel() ** -0.5 if weight.dim() > 1 else 0.3 * noise)
        for layer in network.modules():
            if isinstance(layer, nn.GroupNorm):
                layer.weight.add_(1)
    return network.eval()


def make(case: str = "dhariwal-nichol", **changes: Any) -> UNetModel:
    network = randomised(UNetModel(**(BASE | CASES[case] | changes)))
    assert isinstance(network, UNetModel)
    return network


def inputs(case: str) -> tuple[Tensor, Tensor, Tensor | None]:
    channels = (BASE | CASES[case])["in_channels"]
    x = torch.randn(2, channels, 16, 16, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([3, 777]), torch.tensor([0, 9]) if "num_classes" in CASES[case] else None


def loaded(case: str, weights: Any = None, **options: Any) -> UNet:
    arguments = {name: value for name, value in (BASE | CASES[case]).items() if name in UNTOLD}
    return load_guided_diffusion(make(case).state_dict() if weights is None else weights, **arguments | options)


# --------------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_outputs_are_the_originals(case: str) -> None:
    network, (x, t, y) = make(case), inputs(case)
    assert layout(network.state_dict()) == recorded_layouts()[f"unet {case}"]  # its names and shapes
    expected = recorded()[f"unet {case}"]
    for got in (network(x, t, y), freeze(network)(x, t, y=y), loaded(case)(x, t, y)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_frozen_network_is_as_right_as_the_original() -> None:
    network, (x, t, y) = make(), inputs("dhariwal-nichol")
    exact = in_float64(network)(x.double(), t, y)
    assert relative_error(freeze(network)(x, t, y), exact) <= 2 * relative_error(network(x, t, y), exact)


@torch.no_grad()
def test_a_frozen_network_is_driven_as_the_original() -> None:
    """Timesteps are rescaled to floating ones, labels have any dtype, and the loop asks the first parameter for the device."""
    network, (x, t, y) = make(), inputs("dhariwal-nichol")
    frozen = freeze(network.train())
    assert network.training
    network.eval()
    for labels in (y, torch.tensor([0, 9], dtype=torch.int32)):
        torch.testing.assert_close(frozen(x, t * 0.25, y=labels), network(x, t * 0.25, labels), rtol=1e-4, atol=1e-4)
    assert next(frozen.parameters()).device == x.device
    assert frozen.eval() is frozen
    assert frozen.to("cpu") is frozen
    assert frozen(x, t, y).is_contiguous()
    wanted = "FrozenModule: expected evaluation only, because the network is frozen, got input that records gradients"
    with pytest.raises(ValueError, match=rf"^{wanted}: .* the UNetModel from"):
        torch.enable_grad()(frozen)(x.requires_grad_(), t, y)


@torch.no_grad()
def test_a_network_in_half_precision_is_frozen_in_it() -> None:
    network, (x, t, y) = make(), inputs("dhariwal-nichol")
    expected = network(x, t, y)
    for part in (network.input_blocks, network.middle_block, network.output_blocks):  # as convert_to_fp16 does
        for layer in part.modules():
            if isinstance(layer, nn.Conv1d | nn.Conv2d):
                layer.half()
    assert freeze(network, torch.float32).frozen_unet.dtype == torch.float32
    frozen = freeze(network)
    assert frozen.frozen_unet.dtype == torch.float16
    got = frozen(x, t, y)
    assert got.dtype == torch.float32
    assert 1e-5 < relative_error(got, expected) < 2e-2


def test_files_are_read(tmp_path: Path) -> None:
    weights = make("half-width").state_dict()
    torch.save({name: weight.half() for name, weight in weights.items()}, tmp_path / "ema.pt")
    model = loaded("half-width", tmp_path / "ema.pt")
    assert model.conv_in.weight.dtype == torch.float32
    assert model.config["sample_size"] == 16
    assert not model.training
    x, t, _ = inputs("half-width")
    model.save_pretrained(tmp_path / "folder")
    again = UNet.from_pretrained(tmp_path / "folder")
    assert again.config == model.config
    with torch.no_grad():
        torch.testing.assert_close(model(x, t), recorded()["unet half-width"], rtol=1e-2, atol=1e-2)  # its rounding in float16
        assert torch.equal(again(x, t), model(x, t))


def without(pattern: str) -> dict[str, Tensor]:
    return {name: weight for name, weight in make().state_dict().items() if not re.search(pattern, name)}


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        (without("time_embed"), {}, "to have the weights of a UNetModel, got none named time_embed.0.weight"),
        (without("input_blocks.1.0.in_layers.0"), {}, "to fit a UNetModel .*, got missing down_blocks.0.resnets.0.norm1"),
        ([1, 2], {}, "path_or_state_dict to be or to hold tensors by name, got list"),
        ({"a": torch.zeros(2)}, {}, "expected path_or_state_dict to have the weights of a UNetModel, got none named output"),
        (without("output_blocks"), {}, "got none named output_blocks.0.0.in_layers.2.weight"),
        ({**without("^$"), "more": torch.zeros(2)}, {}, "got unexpected more"),
        (without("^$"), {"num_head_channels": 7}, "heads to divide|UNet: expected attention_head_dim"),
        (without("^$"), {"num_head_channels": 0}, "expected num_head_channels to be -1 or positive, got 0"),
        (without("^$"), {"num_heads": 0}, r"expected num_heads to be an integer in 1..65536, got 0"),
    ],
)
def test_weights_that_do_not_fit_are_named(weights: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_guided_diffusion(weights, **({"num_head_channels": 16} | options))


@pytest.mark.filterwarnings("ignore")  # torch's, of old protocols
def test_a_damaged_file_is_a_value_error(tmp_path: Path) -> None:
    """Whatever the unpickler makes of it: a KeyError of its table, an AssertionError of torch's, ..."""
    torch.save({"a": torch.zeros(3)}, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "model.pt").read_bytes()
    for place in range(100):
        (tmp_path / "damaged.pt").write_bytes(whole[:place] + b"h" + whole[place + 1 :])  # in pickle: get from the table
        with pytest.raises(ValueError, match="load_guided_diffusion: expected "):
            load_guided_diffusion(tmp_path / "damaged.pt")


class SuperResModel(UNetModel):
    pass


class OtherSiLU(nn.SiLU):
    pass


OUTPUTS = "outputs differ by "
# name -> a change to a network, and what is said about it.
CHANGES: dict[str, tuple[Change, str]] = {
    "eps": (given("out.0", eps=1e-3), r"eps of the norms is \[1e-05, 0.001\], not \[1e-05\]"),
    "padding": (given("input_blocks.0.0", padding_mode="circular"), OUTPUTS),
    "heads": (given("middle_block.1.attention", n_heads=2), OUTPUTS),
    "activation": (replaced("out.1", nn.GELU()), OUTPUTS),
    "another SiLU": (replaced("out.1", OtherSiLU()), ""),
    "cut embeddings": (given("label_emb", max_norm=0.5), OUTPUTS),
    "hook": (hooked("out"), "out has hooks"),
    "hook of the network": (hooked(""), "it has hooks"),
    "patched": (given("", forward=lambda x, *args: -x), "it has a patched forward"),
    "fork": (given("", __class__=ForkedUNetModel), OUTPUTS),
    "relative": (
        given("", __class__=SuperResModel),
        "to be a UNetModel itself, got a SuperResModel: load_guided_diffusion takes",
    ),
    "failing": (replaced("out.1", nn.Sequential(nn.SiLU(), nn.Flatten())), ".*, a UNetModel of .*, got: "),
    "layer left out": (lambda network: network.__delattr__("out"), "none named out.2.weight"),
    "no convolutions between levels": (given("", conv_resample=False), "conv_resample to be True, got False"),
    "parametrized": (
        lambda network: nn.utils.parametrize.register_parametrization(network.out[2], "weight", nn.Tanh()),
        "none named out.2.weight",
    ),
}
SAME = ("another SiLU",)  # what is frozen computes the same


@pytest.mark.parametrize("what", CHANGES)
@torch.no_grad()
def test_a_changed_network_is_refused_or_frozen(what: str) -> None:
    change, reason = CHANGES[what]
    network, (x, t, y) = make(), inputs("dhariwal-nichol")
    change(network)
    if what in SAME:
        torch.testing.assert_close(freeze(network)(x, t, y=y), network(x, t, y), rtol=1e-4, atol=1e-4)
        return
    with pytest.raises(ValueError, match=rf"^freeze: expected x\b.*(?:{reason})"):
        freeze(network)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_heads_on_the_way_up_are_refused(dtype: torch.dtype) -> None:
    """A `UNet` has the same number everywhere. With little weight on attention, rounding could hide them."""
    network = make("heads-of-any-width", num_heads_upsample=2).to(dtype)
    with pytest.raises(ValueError, match=r"^freeze: expected x\.num_heads_upsample to be num_heads, 4, got 2$"):
        freeze(network)


@torch.no_grad()
def test_only_weights_may_keep_a_network_from_running() -> None:
    """They are read one by one, and what is frozen has one dtype."""
    network, (x, t, y) = make(), inputs("dhariwal-nichol")
    expected = network(x, t, y)
    network.input_blocks.half()  # and its input is float32
    network.out.half()
    with pytest.raises(RuntimeError, match="dtype"):
        network(x, t, y)
    assert 0 < relative_error(freeze(network, torch.float32)(x, t, y=y), expected) < 2e-3


class Casting(UNetModel):
    """A network that casts its activations to an attribute, as the original does."""

    def __init__(self, *args: Any, dtype: torch.dtype, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dtype = dtype

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        assert self.input_blocks[0][0].weight.dtype == self.dtype
        return super().forward(x.type(self.dtype), timesteps, y).type(x.dtype)


Casting.__name__ = "UNetModel"


@torch.no_grad()
def test_a_network_that_casts_is_compared_in_float32() -> None:
    network = randomised(Casting(**(BASE | CASES["dhariwal-nichol"]), dtype=torch.float16)).half()
    x, t, y = inputs("dhariwal-nichol")
    assert 0 < relative_error(freeze(network)(x, t, y=y), make()(x, t, y)) < 2e-2
    assert vars(network)["dtype"] == torch.float16


# ------------------------------------------------------------------------------------------------------------------ plans


def trajectory(plan: SamplingPlan, network: Any, shape: tuple[int, ...], **kwargs: Any) -> Tensor:
    """The last image of a plan, with the original's draws: x_T, then noise like x for every step."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    with torch.no_grad():
        for step, t in enumerate(plan.timesteps.tolist()):
            output = network(x, torch.full((len(x),), t), **kwargs)
            x = reverse_step(x, output, step, plan, noise=torch.randn_like(x))
    return x


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize(("mean", "var"), BOTH)
def test_trajectories_are_the_originals(mean: ModelMeanType, var: ModelVarType, eta: float | None) -> None:
    expected = recorded()[f"trajectory {mean.name} {var.name} {eta}"]
    got = trajectory(plan_of(GaussianDiffusion(mean, var), eta=eta), Network(var), SHAPE)
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)  # float32 along 15 steps


def test_trajectories_of_a_frozen_network_are_the_originals() -> None:
    frozen, labels = freeze(make()), torch.tensor([1, 7])
    for eta in (None, 0.0):
        plan = plan_of(GaussianDiffusion(ModelMeanType.EPSILON, ModelVarType.LEARNED_RANGE), eta=eta)
        got = trajectory(plan, frozen, (2, 3, 16, 16), y=labels)
        torch.testing.assert_close(got, recorded()[f"unet trajectory {eta}"], rtol=0, atol=1e-4)
    torch.manual_seed(0)
    drawn = sample(frozen, plan, 2, x_T=torch.randn(2, 3, 16, 16), class_labels=labels, progress=False)
    torch.testing.assert_close(drawn, got, rtol=0, atol=1e-4)  # DDIM needs no other noise


@pytest.mark.parametrize("kept", [KEPT, list(range(0, T, 7)), [3, 30], list(range(T))])
@pytest.mark.parametrize("eta", ETAS)
def test_the_levels_of_a_respaced_process_are_those_of_its_training(kept: list[int], eta: float | None) -> None:
    """The process keeps no others. A plan on the schedule of the training has the same rows."""
    got = plan_of(GaussianDiffusion(ModelMeanType.EPSILON, ModelVarType.FIXED_LARGE, kept), eta=eta)
    schedule = NoiseSchedule.from_betas(BETAS)
    steps: dict[str, Any] = {"spacing": kept[::-1], "clip": 1.0}
    expected = (
        ddpm_plan(schedule, variance="fixed_large", **steps)
        if eta is None
        else ddim_plan(schedule, None, eta=eta, use_clipped_model_output=True, **steps)
    )
    assert got.timesteps.tolist() == kept[::-1]
    assert got.schedule.num_timesteps == T
    torch.testing.assert_close(got.coefficients, expected.coefficients, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got.alpha_bars, expected.alpha_bars, rtol=1e-12, atol=0)


def process(kind: str = "GaussianDiffusion", methods: dict[str, Any] | None = None, **attributes: Any) -> GaussianDiffusion:
    """Return a process of a class of this name, with further methods and attributes."""
    made = type(kind, (GaussianDiffusion,), methods or {})(ModelMeanType.EPSILON, ModelVarType.FIXED_SMALL)
    vars(made).update(attributes)
    return made


OTHER_MEAN = enum.Enum("ModelMeanType", ["VELOCITY"])
INCOMPLETE = type("GaussianDiffusion", (), {"model_mean_type": ModelMeanType.EPSILON, "model_var_type": ModelVarType.LEARNED})


@pytest.mark.parametrize(
    ("x", "num_steps", "message"),
    [
        (process(), 20, r"num_steps to be None, as the process has 15, got 20$"),
        (process(rescale_timesteps=True), None, r"x\.rescale_timesteps to be False, or .* 1000 timesteps, got True"),
        (process("LearnedDiffusion"), None, "x to be a GaussianDiffusion or SpacedDiffusion itself, .* got a Learned"),
        (
            process("SpacedDiffusion", {"p_sample": None}, p_sample=lambda *args: None),
            None,
            "x to have the methods of its class, got another p_sample",
        ),
        (INCOMPLETE(), None, r"x to be a scheduler or pipeline of .*, got: .* no attribute 'betas'$"),
        (process(model_mean_type=OTHER_MEAN.VELOCITY), None, r"x\.model_mean_type\.name to be one of .*, got 'VELOCITY'"),
    ],
)
def test_processes_that_are_no_plan_are_named(x: Any, num_steps: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^plan_of: expected {message}"):
        plan_of(x, num_steps)
