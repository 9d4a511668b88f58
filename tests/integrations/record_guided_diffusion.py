"""Record what guided-diffusion computes, as guided_diffusion.safetensors beside this file.

guided-diffusion is not on PyPI, so the tests compare with recorded values. The file was made on a CPU with torch 2.13, from
https://github.com/openai/guided-diffusion at commit 22e0df8183507e13a7813f8d38d51b072ca1e67c:

    PYTHONPATH=<a clone of guided-diffusion> python tests/integrations/record_guided_diffusion.py

The processes, networks and inputs are those of test_guided_diffusion.py. Only the computation is guided-diffusion's.
Record again when one of them changes.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

FILE = Path(__file__).with_name("guided_diffusion.safetensors")


@cache
def recorded() -> dict[str, Tensor]:
    """Return the recorded tensors by name."""
    return safetensors.torch.load_file(FILE)


@cache
def recorded_layouts() -> dict[str, str]:
    """Return the digest of the names and shapes of each U-Net's weights."""
    with safetensors.safe_open(FILE, "pt") as file:
        found: dict[str, str] = file.metadata()
    return found


def layout(weights: dict[str, Tensor]) -> str:
    """Return a digest of the names and shapes of weights."""
    lines = sorted(f"{name} {tuple(weight.shape)}" for name, weight in weights.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _trajectories() -> dict[str, Tensor]:
    import test_guided_diffusion as ours
    from guided_diffusion import gaussian_diffusion, respace
    from guided_diffusion.unet import UNetModel

    found: dict[str, Tensor] = {}
    timesteps = respace.space_timesteps(ours.T, ours.RESPACING)
    assert sorted(timesteps) == ours.KEPT
    for mean, var in ours.BOTH:
        process = respace.SpacedDiffusion(
            use_timesteps=timesteps,
            betas=ours.BETAS,
            model_mean_type=gaussian_diffusion.ModelMeanType[mean.name],
            model_var_type=gaussian_diffusion.ModelVarType[var.name],
            loss_type=gaussian_diffusion.LossType.MSE,
        )

        def draw(network: Any, shape: tuple[int, ...], eta: float | None, process: Any = process, **labels: Tensor) -> Tensor:
            torch.manual_seed(0)
            loop, options = (process.p_sample_loop, {}) if eta is None else (process.ddim_sample_loop, {"eta": eta})
            image: Tensor = loop(network, shape, model_kwargs=labels, **options)
            return image

        for eta in ours.ETAS:
            found[f"trajectory {mean.name} {var.name} {eta}"] = draw(ours.Network(var), ours.SHAPE, eta)
        if (mean.name, var.name) == ("EPSILON", "LEARNED_RANGE"):
            network = ours.randomised(UNetModel(**(ours.BASE | ours.CASES["dhariwal-nichol"])))
            for eta in (None, 0.0):
                found[f"unet trajectory {eta}"] = draw(network, (2, 3, 16, 16), eta, y=torch.tensor([1, 7]))
    return found


def _networks() -> tuple[dict[str, Tensor], dict[str, str]]:
    import test_guided_diffusion as ours
    from guided_diffusion.unet import UNetModel

    outputs, layouts = {}, {}
    for case, changes in ours.CASES.items():
        network = ours.randomised(UNetModel(**(ours.BASE | changes)))
        layouts[f"unet {case}"] = layout(network.state_dict())
        with torch.no_grad():
            outputs[f"unet {case}"] = network(*ours.inputs(case))
    return outputs, layouts


def main() -> None:
    outputs, layouts = _networks()
    tensors = {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in (_trajectories() | outputs).items()}
    safetensors.torch.save_file(tensors, FILE, metadata=layouts)
    print(f"{FILE}: {len(tensors)} tensors, {FILE.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
