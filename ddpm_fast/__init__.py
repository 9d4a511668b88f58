"""Fused kernels for denoising diffusion probabilistic models (Ho et al. 2020) in PyTorch.

The public names below are imported when they are first used, so that `ddpm-fast --help` need not wait for PyTorch.
"""

from importlib import import_module
from typing import Any

from .version import __version__ as __version__

_NAMES_BY_MODULE = {
    "data.options": ("DataOptions",),
    "pretrained": ("Pretrained", "load_builtin", "load_folder"),
    "sampling.editing": ("inpaint", "interpolate", "invert", "load_image", "vary"),
    "evaluation": ("Moments", "VariationalBound", "frechet_distance", "variational_bound"),
    "files.images": ("image_grid", "save_grid", "save_trajectory", "to_uint8"),
    "integrations.freezing": ("freeze", "plan_of"),
    "integrations.fuse": ("FuseReport", "fuse", "unfuse"),
    "allocator": ("kept_memory",),
    "inference": ("FrozenUNet",),
    "nn": ("UNet",),
    "ops": (
        *("BackendUnavailable", "attention", "conv3x3", "denoising_loss", "group_norm_affine", "group_norm_silu"),
        *("initial_noise", "noise", "q_sample", "reverse_step", "sample_seeds"),
    ),
    "plan": (
        *("SamplingPlan", "ddim_inversion_plan", "ddim_plan", "ddpm_plan", "default_plan", "dpm_solver_plan", "heun_plan"),
        *("named_plan", "repaint_plan"),
    ),
    "publishing": ("push_to_hub",),
    "reference": ("STREAM_DROPOUT", "STREAM_KNOWN", "STREAM_Q_SAMPLE", "STREAM_SEEDS", "STREAM_X_T"),
    "samplers": ("SAMPLERS", "PlanOptions"),
    "sampling.fitting": ("fit_plan",),
    "sampling.options": ("BatchOptions", "DrawOptions", "EditOptions"),
    "sampling.sample_files": ("write_samples",),
    "sampling.sampler": ("Sampler", "sample"),
    "schedule": ("NoiseSchedule", "Objective"),
    "training.export": ("export_checkpoint",),
    "training.log": ("Logger",),
    "training.loop": ("TrainResult",),
    "training.options": ("ModelOptions", "TrainOptions"),
    "training.trainer": ("Trainer", "train"),
    "variational": ("variational_loss",),
}
_MODULE_BY_NAME = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}

__all__ = sorted(_MODULE_BY_NAME)


def __getattr__(name: str) -> Any:
    """Import a public name, or a submodule, when it is first used."""
    if name in _MODULE_BY_NAME:
        value = getattr(import_module(f".{_MODULE_BY_NAME[name]}", __name__), name)
        globals()[name] = value
        return value
    if not name.isidentifier() or name.startswith("__"):  # such as __path__, or __main__, which runs the command line
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return __all__
