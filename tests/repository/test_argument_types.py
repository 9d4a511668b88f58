"""Every argument of every public function refuses values of a wrong type, by an error that names the function and the argument.

Each entry of CALLS has valid arguments. Every value of JUNK replaces each argument in turn, except where the argument's
annotation or the entry says that the value is valid. Nothing may run before the error: neither a network nor a kernel.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin

import pytest
import torch
from PIL import Image
from small_unets import make_unet
from torch import Tensor, nn

import ddpm_fast as d
from ddpm_fast.errors import InvalidType, InvalidValue
from ddpm_fast.integrations import denoising_diffusion_pytorch, guided_diffusion
from ddpm_fast.sampling.options import ClassLabels

diffusers = pytest.importorskip("diffusers")
theirs = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch")

from ddpm_fast.integrations import diffusers as schedulers  # noqa: E402

# Objects that functions of the package return, which users do not make, a class to derive from, and types of keyword
# arguments, which other entries check.
NO_CALLS = {
    *("BackendUnavailable", "FuseReport", "Logger", "Moments", "Pretrained", "TrainResult", "VariationalBound"),
    *("BatchOptions", "DrawOptions", "EditOptions", "PlanOptions"),
}

JUNK: dict[str, Any] = {
    "None": None,
    "text": "no such",
    "bytes": b"no such",
    "object": object(),
    "list": [object()],
    "empty": [],
    "dict": {},
    "bool": True,
    "complex": 1j,
    "fraction": 1.5,
    "nan": math.nan,
    "inf": math.inf,
    "negative": -1,
    "zero": 0,
    "huge": 10**30,
    "dtype": torch.complex64,
    "tensor": torch.zeros(7, 1, 1, 1, 1, 1, dtype=torch.uint8),
}
# Part of an annotation -> the junk that is a valid value of it. Any other part has none.
VALID = {
    "None": "None",
    "bool": "bool",
    "float": "fraction",
    "os.PathLike[str]": "text",
    "Callable[[int], Tensor]": "",
    "ClassLabels": "None zero",
}


def changed(tensor: Tensor) -> dict[str, Tensor]:
    """Return tensors of other kinds with the values of this one."""
    return {
        "complex_values": tensor.to(torch.complex64),
        "bools": tensor.bool(),
        "sparse": tensor.to_sparse(),
        "nested": torch.nested.nested_tensor([tensor]),
        "meta": tensor.to("meta"),
        "shape": tensor[None, None],
        **({"mkldnn": tensor.to_mkldnn()} if tensor.dtype == torch.float32 else {}),
    }


@dataclass
class Entry:
    """A public callable with valid arguments.

    Attributes:
        accepts: Labels of junk and of changed tensors that are valid too, by argument. "*": all, as its library has no check.
        caller: Regular expression of the name in its errors. None: the name in CALLS.
    """

    call: Callable[..., Any]
    arguments: dict[str, Any]
    accepts: dict[str, str] = field(default_factory=dict)
    caller: str | None = None


class Untouched(nn.Module):
    """A network that must not be called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, *_: Any) -> NoReturn:
        raise AssertionError("the network was called")


X, SEEDS, TIME, ONES = torch.zeros(2, 4, 4, 4), d.sample_seeds(0, 2), torch.ones(2, 4), torch.ones(4)
NORM = {"num_groups": 2, "weight": ONES, "bias": ONES, "shift": TIME, "scale_shift": (TIME, TIME)}
IMAGES, FEATURES = torch.zeros(2, 3, 4, 4), torch.rand(9, 2)
SCHEDULE = d.NoiseSchedule.linear(10)
OBJECTIVE = d.Objective(SCHEDULE)
PLAN, NETWORK = d.ddpm_plan(SCHEDULE), Untouched()
ONE = torch.ones(1, 1, 4, 4)
STEP = torch.tensor([3, 4])
SAMPLE = {"seed": 0, "x_T": torch.zeros(2, 3, 4, 4)}
SAMPLE_ACCEPTS = {"seed": "negative zero", "batch_size": "huge", "guidance_scale": "None"}
EDIT_ACCEPTS = SAMPLE_ACCEPTS | {"strength": "zero"}
PLAN_ACCEPTS = {"eta": "zero"}
SCHEDULERS = {
    **{"DDPMScheduler": {}, "DDIMScheduler": {}, "DDIMInverseScheduler": {}},
    "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
}


def scheduler(name: str) -> Any:
    """Return a scheduler for diffusers before the first of five steps."""
    made = getattr(schedulers, name)(num_train_timesteps=10, **SCHEDULERS[name])
    made.set_timesteps(5)
    return made


@cache
def unet() -> d.UNet:
    return make_unet()[0]


@cache
def sampler() -> d.Sampler:
    return d.Sampler(Untouched(), PLAN, shape=(3, 4, 4))


@cache
def builtin() -> d.Pretrained:
    return d.load_builtin()


def trainer_arguments() -> dict[str, Any]:
    return {
        "model": make_unet(in_channels=3, out_channels=3)[0],
        "schedule": SCHEDULE,
        "dataset": [torch.zeros(3, 16, 16)],
        "options": d.TrainOptions(sample_steps=5),
        "run_dir": "no such run",
    }


def their_process() -> Any:
    return theirs.GaussianDiffusion(make_unet(out_channels=2)[0], image_size=16, timesteps=10)


def pipeline() -> Any:
    model = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=[8, 8],
        norm_num_groups=4,
        down_block_types=["DownBlock2D"] * 2,
        up_block_types=["UpBlock2D"] * 2,
    )
    return diffusers.DDPMPipeline(model, diffusers.DDPMScheduler())


def schedule(name: str, **accepts: str) -> Entry:
    return Entry(getattr(d.NoiseSchedule, name), {"num_timesteps": 5}, accepts, f"NoiseSchedule.{name}")


# Memory alone bounds the size of a picture.
GRID_ACCEPTS = {"columns": "huge", "padding": "zero huge", "scale": "huge", "background": "zero"}
TRAIN_ACCEPTS = (
    dict.fromkeys(("lr_decay_steps", "warmup_steps", "sample_every", "checkpoint_every"), "zero huge")
    | dict.fromkeys(("clip_grad", "ema_decay", "label_dropout", "weight_decay", "checkpoint_minutes", "max_minutes"), "zero")
    | {
        "seed": "negative zero huge",
        "num_workers": "zero",
        "sample_steps": "huge",
        "keep": "huge",
        "threads": "huge",
        "micro_batch_size": "huge",
        "device": "text",
        "loss_weight": "None",
    }
)
# diffusers takes anything for these arguments. Shapes are checked by `reverse_step`.
UNCHECKED = ("generator", "return_dict", "use_clipped_model_output", "variance_noise")
DROP_IN: dict[str, Any] = {
    "accepts": {"timestep": "zero", "eta": "zero"} | dict.fromkeys(UNCHECKED, "*"),
    "caller": r"(?:DDPM|DDIM|DDIMInverse|DPMSolverMultistep)Scheduler\.step|reverse_step",
}
CALLS: dict[str, Callable[[], Entry]] = {
    "FrozenUNet": lambda: Entry(
        d.freeze(unet(), torch.float32, num_timesteps=10), {"x": torch.zeros(2, 2, 16, 16), "t": STEP}, {"t": "zero"}
    ),
    "FrozenUNet, int": lambda: Entry(
        d.freeze(unet(), torch.float32, num_timesteps=10), {"x": torch.zeros(2, 2, 16, 16), "t": 3}, {"t": "zero"}
    ),
    "NoiseSchedule": lambda: Entry(d.NoiseSchedule, {"betas": SCHEDULE.betas, "name": "from_betas"}, {"parameters": "dict"}),
    "NoiseSchedule.linear": lambda: schedule("linear"),
    "NoiseSchedule.scaled_linear": lambda: schedule("scaled_linear"),
    "NoiseSchedule.cosine": lambda: schedule("cosine", s="zero"),
    "NoiseSchedule.sigmoid": lambda: schedule("sigmoid", start="negative zero", end="negative zero", tau="negative"),
    "NoiseSchedule.sigmoid_betas": lambda: schedule("sigmoid_betas", beta_start="zero", beta_end="zero"),
    "NoiseSchedule.laplace": lambda: schedule("laplace"),
    "NoiseSchedule.from_betas": lambda: Entry(d.NoiseSchedule.from_betas, {"betas": [0.1, 0.2]}),
    "NoiseSchedule.from_diffusers": lambda: Entry(d.NoiseSchedule.from_diffusers, {"config": {}}, {"config": "dict"}),
    "NoiseSchedule.flow": lambda: schedule("flow"),
    "NoiseSchedule.from_pretrained": lambda: Entry(d.NoiseSchedule.from_pretrained, {"path": "no such"}),
    "NoiseSchedule.table": lambda: Entry(SCHEDULE.table, {}),
    "Objective": lambda: Entry(d.Objective, {"schedule": SCHEDULE, "loss_weight": "min_snr"}, {"loss_weight": "None"}),
    "Objective, columns": lambda: Entry(d.Objective, {"schedule": SCHEDULE, "prediction": torch.ones(10, 2)}),
    "Pretrained.build_plan": lambda: Entry(
        builtin().build_plan, {}, PLAN_ACCEPTS | {"guidance_scale": "negative zero"}, "build_plan"
    ),
    "Pretrained.from_data": lambda: Entry(
        builtin().from_data, {"images": ONE}, {"images": "bools tensor shape meta"}, "from_data"
    ),
    "Pretrained.sampler": lambda: Entry(
        builtin().sampler,
        {},
        PLAN_ACCEPTS | {"guidance_scale": "negative zero", "no_label": "zero"},
        "sampler|Sampler|build_plan",
    ),
    "Pretrained.to_data": lambda: Entry(builtin().to_data, {"images": ONE}, {"images": "shape meta"}, "to_data"),
    "Sampler": lambda: Entry(d.Sampler, {"model": NETWORK, "plan": PLAN, "shape": (3, 4, 4)}, {"no_label": "zero"}),
    "Sampler, call": lambda: Entry(sampler(), {"num_samples": 2} | SAMPLE, SAMPLE_ACCEPTS, "Sampler"),
    "Sampler.trajectory": lambda: Entry(
        sampler().trajectory, {"num_samples": 2} | SAMPLE, SAMPLE_ACCEPTS | {"num_frames": "huge"}
    ),
    "SamplingPlan": lambda: Entry(
        d.SamplingPlan,
        {name: getattr(PLAN, name) for name in ("schedule", "timesteps", "coefficients", "prediction", "variance")},
    ),
    "SamplingPlan.table": lambda: Entry(PLAN.table, {}),
    "SamplingPlan.steps": lambda: Entry(PLAN.steps, {}),
    "DataOptions": lambda: Entry(d.DataOptions, {}, {"data_memory": "zero huge", "colors": "None"}),
    "ModelOptions": lambda: Entry(d.ModelOptions, {}, {"attention": "empty", "dropout": "zero", "schedule": "None"}),
    "TrainOptions": lambda: Entry(d.TrainOptions, {"steps": 1}, TRAIN_ACCEPTS),
    "Trainer": lambda: Entry(d.Trainer, trainer_arguments(), {"loggers": "empty"}),
    "Trainer.run": lambda: Entry(d.Trainer(**trainer_arguments()).run, {}),
    "UNet": lambda: Entry(unet().forward, {"x": torch.zeros(2, 2, 16, 16), "t": STEP}, {"x": "meta", "t": "fraction zero"}),
    "UNet.from_pretrained": lambda: Entry(d.UNet.from_pretrained, {"path": "no such"}, caller="from_pretrained"),
    "UNet.save_pretrained": lambda: Entry(unet().save_pretrained, {"path": "no such"}, caller="save_pretrained"),
    "attention": lambda: Entry(
        d.attention, {"qkv": torch.zeros(2, 6, 12), "num_heads": 2}, {"qkv": "meta", "scale": "negative zero"}
    ),
    "conv3x3": lambda: Entry(
        d.conv3x3,
        {"x": X, "weight": torch.zeros(4, 8, 3, 3), "bias": torch.zeros(4), "skip": X, "affine": torch.zeros(2, 3, 8)}
        | {"residual": X},
        {"divisor": "negative"},
    ),
    "ddim_inversion_plan": lambda: Entry(d.ddim_inversion_plan, {"schedule": SCHEDULE, "num_steps": 5}, {"clip": "inf"}),
    "ddim_plan": lambda: Entry(d.ddim_plan, {"schedule": SCHEDULE, "num_steps": 5}, {"eta": "zero", "clip": "inf"}),
    "default_plan": lambda: Entry(d.default_plan, {"objective": OBJECTIVE}, {"steps": "huge", "clip": "inf"}),
    "named_plan": lambda: Entry(d.named_plan, {"objective": OBJECTIVE}, PLAN_ACCEPTS | {"clip": "inf"}),
    "dpm_solver_plan": lambda: Entry(
        d.dpm_solver_plan, {"schedule": SCHEDULE, "num_steps": 5}, {"eta": "zero", "clip": "inf", "lambda_min": "negative zero"}
    ),
    "heun_plan": lambda: Entry(
        d.heun_plan, {"schedule": SCHEDULE, "num_steps": 5}, {"clip": "inf", "lambda_min": "negative zero"}
    ),
    "repaint_plan": lambda: Entry(
        d.repaint_plan, {"schedule": SCHEDULE, "num_steps": 5, "jump_length": 2, "jump_num_sample": 2}, {"clip": "inf"}
    ),
    "ddpm_plan": lambda: Entry(d.ddpm_plan, {"schedule": SCHEDULE, "spacing": [5, 3], "previous": [3, -1]}, {"clip": "inf"}),
    "denoising_loss": lambda: Entry(
        d.denoising_loss,
        {"model_output": X, "x_0": X, "t": STEP, "schedule": SCHEDULE, "noise": X, "weight": torch.ones(2)},
        {"t": "zero"},
    ),
    "variational_loss": lambda: Entry(
        d.variational_loss, {"model_output": X, "x_0": X, "t": STEP, "schedule": SCHEDULE, "seeds": SEEDS}, {"t": "zero"}
    ),
    "denoising_loss, seeds": lambda: Entry(
        d.denoising_loss, {"model_output": X, "x_0": X, "t": 3, "schedule": SCHEDULE, "seeds": SEEDS}, {"t": "zero"}
    ),
    "export_checkpoint": lambda: Entry(d.export_checkpoint, {"run_dir": "no such", "out_dir": "no such either"}),
    "frechet_distance": lambda: Entry(d.frechet_distance, {"a": FEATURES, "b": FEATURES}),
    "freeze": lambda: Entry(d.freeze, {"x": unet()}),
    "freeze, pipeline": lambda: Entry(d.freeze, {"x": pipeline()}, caller="freeze"),
    "fuse": lambda: Entry(d.fuse, {"model": NETWORK}),
    "group_norm_affine": lambda: Entry(d.group_norm_affine, {"x": X, "skip": X[:, :0]} | NORM),
    "group_norm_silu": lambda: Entry(d.group_norm_silu, {"x": X} | NORM),
    "image_grid": lambda: Entry(d.image_grid, {"images": IMAGES}, GRID_ACCEPTS),
    "initial_noise": lambda: Entry(d.initial_noise, {"shape": (2, 4), "seeds": SEEDS}, {"seeds": "meta"}),
    "kept_memory": lambda: Entry(d.kept_memory, {}),
    "load_builtin": lambda: Entry(d.load_builtin, {}),
    "load_folder": lambda: Entry(d.load_folder, {"path": "no such"}),
    "push_to_hub": lambda: Entry(d.push_to_hub, {"path": "no such", "name": "owner/name"}, {"license": "text"}),
    "inpaint": lambda: Entry(
        d.inpaint, {"sampler": sampler(), "images": IMAGES, "mask": ONE, "seed": 0}, EDIT_ACCEPTS | {"mask": "bools"}
    ),
    "interpolate": lambda: Entry(d.interpolate, {"sampler": sampler(), "a": IMAGES, "b": IMAGES, "seed": 0}, EDIT_ACCEPTS),
    "invert": lambda: Entry(
        d.invert, {"sampler": sampler().with_plan(d.ddim_inversion_plan(SCHEDULE, 5)), "images": IMAGES}, EDIT_ACCEPTS
    ),
    "load_image": lambda: Entry(d.load_image, {"image": Image.new("RGB", (4, 4)), "sampler": sampler()}, {"image": "text"}),
    "noise": lambda: Entry(d.noise, {"shape": (2, 4), "seeds": SEEDS}, {"seeds": "meta", "stream": "zero"}),
    "q_sample": lambda: Entry(
        d.q_sample, {"x_0": X, "t": STEP, "schedule": SCHEDULE, "noise": X}, {"x_0": "tensor", "t": "zero"}
    ),
    "q_sample, seeds": lambda: Entry(
        d.q_sample, {"x_0": X, "t": 3, "schedule": SCHEDULE, "seeds": SEEDS}, {"x_0": "tensor meta", "t": "zero"}
    ),
    "plan_of": lambda: Entry(d.plan_of, {"x": pipeline(), "num_steps": 5}),
    "plan_of, eta": lambda: Entry(d.plan_of, {"x": diffusers.DDIMScheduler(), "num_steps": 5, "eta": 0.5}, {"eta": "zero"}),
    "reverse_step": lambda: Entry(
        d.reverse_step,
        {"x_t": X, "model_output": X, "step": STEP, "plan": PLAN, "noise": X, "x_0_prev": X, "x_0_prev2": X, "out": X.clone()},
        {"step": "zero", "guidance_scale": "negative zero"},
    ),
    "reverse_step, seeds": lambda: Entry(
        d.reverse_step,
        {"x_t": X, "model_output": X, "step": 3, "plan": PLAN, "seeds": SEEDS},
        {"step": "zero", "guidance_scale": "negative zero"},
    ),
    "sample": lambda: Entry(
        d.sample,
        {"model": NETWORK, "plan": PLAN, "num_samples": 2, "shape": (3, 4, 4)} | SAMPLE,
        SAMPLE_ACCEPTS | {"no_label": "zero"},
    ),
    "sample_seeds": lambda: Entry(d.sample_seeds, {"seed": 0, "n": 2}, {"seed": "negative zero", "n": "zero", "start": "zero"}),
    "save_grid": lambda: Entry(
        d.save_grid, {"images": IMAGES, "path": "no such folder/x.png"}, GRID_ACCEPTS | {"titles": "empty"}
    ),
    "save_trajectory": lambda: Entry(
        d.save_trajectory,
        {"trajectory": IMAGES[None], "path": "no such folder/x.png"},
        GRID_ACCEPTS | {"frames": "huge"},
    ),
    "to_uint8": lambda: Entry(d.to_uint8, {"images": IMAGES}, {"images": "shape meta"}),
    "train": lambda: Entry(d.train, {"run_dir": "no such run"}),
    "unfuse": lambda: Entry(d.unfuse, {"model": NETWORK}),
    "fit_plan": lambda: Entry(
        d.fit_plan,
        {
            "sampler": sampler().with_plan(d.dpm_solver_plan(SCHEDULE, 2)),
            "teacher": d.dpm_solver_plan(SCHEDULE, 4),
            "num_images": 1,
        }
        | SAMPLE,
        SAMPLE_ACCEPTS,
    ),
    "vary": lambda: Entry(d.vary, {"sampler": sampler(), "images": IMAGES, "seed": 0}, EDIT_ACCEPTS),
    "variational_bound": lambda: Entry(
        d.variational_bound,
        {"model": NETWORK, "x_0": IMAGES, "schedule": SCHEDULE},
        {"clip": "inf", "seed": "negative zero", "batch_size": "huge"},
    ),
    "write_samples": lambda: Entry(
        d.write_samples,
        {"out": "no such folder", "sampler": sampler(), "num_samples": 2},
        {"seed": "negative zero", "guidance_scale": "None"},
    ),
    **{
        f"{name}.set_timesteps": lambda name=name: Entry(scheduler(name).set_timesteps, {"num_inference_steps": 5})
        for name in SCHEDULERS
    },
    **{
        f"{name}.step": lambda name=name: Entry(
            scheduler(name).step, {"model_output": X, "timestep": 4, "sample": X}, **DROP_IN
        )
        for name in SCHEDULERS
    },
    **{
        f"{name}.add_noise": lambda name=name: Entry(
            scheduler(name).add_noise,
            {"original_samples": X, "noise": X, "timesteps": STEP},
            {"original_samples": "shape", "noise": "shape", "timesteps": "zero shape"},  # they are broadcast
            f"{name}.add_noise|q_sample",
        )
        for name in SCHEDULERS
    },
    "load_checkpoint": lambda: Entry(
        denoising_diffusion_pytorch.load_checkpoint, {"path": "no such", "process": their_process()}
    ),
    "load_guided_diffusion": lambda: Entry(
        guided_diffusion.load_guided_diffusion,
        {"path_or_state_dict": "no such"},
        {"path_or_state_dict": "text", "dropout": "zero", "num_head_channels": "negative"},
    ),
}


def test_every_public_callable_has_valid_arguments() -> None:
    names = {name for name in d.__all__ if callable(getattr(d, name))}
    assert names - NO_CALLS <= CALLS.keys()


def parts_of(annotation: Any) -> list[str]:
    """Return the parts of an annotation. Those of declared options are types, others are text."""
    if isinstance(annotation, str):
        return annotation.split(" | ")
    if annotation == ClassLabels:
        return ["ClassLabels"]
    if get_origin(annotation) in (Union, UnionType):
        return [part for each in get_args(annotation) for part in parts_of(each)]
    return ["None" if annotation is NoneType else inspect.formatannotation(annotation)]


def wrong_values(entry: Entry, parameter: inspect.Parameter) -> Iterator[tuple[str, Any]]:
    """Yield what a parameter must refuse."""
    name, parts = parameter.name, parts_of(parameter.annotation)
    valid = {*entry.accepts.get(name, "").split(), *" ".join(VALID.get(part, "") for part in parts).split()}
    if "*" in valid:
        return
    given = entry.arguments.get(name)
    values = JUNK | (changed(given) if isinstance(given, Tensor) else {})
    assert valid <= values.keys(), f"{entry.call}, {name}: {valid - values.keys()}"
    yield from ((label, value) for label, value in values.items() if label not in valid)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", CALLS)
def test_arguments_of_wrong_types_are_refused(name: str, calls: list[str]) -> None:
    entry = CALLS[name]()
    caller = entry.caller or name.partition(",")[0]
    parameters = inspect.signature(entry.call).parameters
    calls.clear()
    for parameter in parameters.values():
        for label, value in wrong_values(entry, parameter):
            print(f"{name}, {parameter.name}={label}")  # pytest shows the last line if the test fails
            with pytest.raises((InvalidType, InvalidValue)) as caught:
                entry.call(**entry.arguments | {parameter.name: value})
            error: Any = caught.value
            assert re.fullmatch(caller, error.caller)
            names = "|".join(parameters if label in ("shape", "meta") else (parameter.name,))
            assert re.search(rf"\b({names})\b", f"{error.name} {error.expected}")  # several arguments have no name
            assert not calls
