"""Record what guided-diffusion computes, as guided_diffusion.safetensors beside this file.

guided-diffusion is not on PyPI, so the tests compare with recorded values. The file was made on a CPU with torch 2.13, from
https://github.com/openai/guided-diffusion at commit 22e0df8183507e13a7813f8d38d51b072ca1e67c:

    PYTHONPATH=<a clone of guided-diffusion> python tests/integrations/record_guided_diffusion.py

The processes, networks and inputs are those of test_guided_diffusion.py and test_guided_diffusion_unet.py. Only the
computation is guided-diffusion's. Record again when one of them changes.
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


def _original_diffusion(d: Any) -> Any:
    """Return guided-diffusion's object for the process of `d`."""
    import test_guided_diffusion as ours
    from guided_diffusion import gaussian_diffusion, respace

    return respace.SpacedDiffusion(
        use_timesteps=respace.space_timesteps(ours.T, ours.KEPT),
        betas=ours.BETAS,
        model_mean_type=gaussian_diffusion.ModelMeanType[d.model_mean_type.name],
        model_var_type=gaussian_diffusion.ModelVarType[d.model_var_type.name],
        loss_type=gaussian_diffusion.LossType[d.loss_type.name],
    )


def _diffusions() -> dict[str, Tensor]:
    import test_guided_diffusion as ours

    found: dict[str, Tensor] = {}
    for mean, var in ours.BOTH:
        process = f"{mean.name} {var.name}"
        for hooks in ours.HOOKS:
            original = _original_diffusion(ours.diffusion(mean, var))
            for eta in ours.ETAS:
                found[f"trajectory {process} {hooks} {eta}"] = ours.trajectory(original, var, hooks, eta)
        for loss in ours.gd.LossType:
            original = _original_diffusion(ours.diffusion(mean, var, loss))
            found |= {f"{name} {process} {loss.name}": x for name, x in ours.losses(original, var).items()}
        found |= {f"{name} {process}": x for name, x in ours.bounds(original, var).items()}
    return found


def _networks() -> tuple[dict[str, Tensor], dict[str, str]]:
    import test_guided_diffusion_unet as ours
    from guided_diffusion.unet import UNetModel

    outputs, layouts = {}, {}
    for case, changes in ours.CASES.items():
        flags = ours.FLAGS | changes
        mults = flags["channel_mult"]
        network = UNetModel(
            image_size=16,
            in_channels=3,
            model_channels=flags["num_channels"],
            out_channels=6 if flags.get("learn_sigma") else 3,
            num_res_blocks=flags["num_res_blocks"],
            attention_resolutions=tuple(16 // int(r) for r in flags["attention_resolutions"].split(",")),
            channel_mult=tuple(int(m) for m in mults.split(",")) if isinstance(mults, str) else mults,
            num_classes=10 if flags.get("class_cond") else None,
            **{k: flags[k] for k in ("num_heads", "num_head_channels", "use_scale_shift_norm") if k in flags},
            **{k: flags[k] for k in ("resblock_updown", "use_new_attention_order") if k in flags},
        ).eval()
        layouts[f"unet {case}"] = layout(network.state_dict())
        network.load_state_dict(ours.Original(flags).weights)
        x, t, y = ours.inputs(flags)
        with torch.no_grad():
            outputs[f"unet {case}"] = network(x.float(), t, y)
    return outputs, layouts


def main() -> None:
    outputs, layouts = _networks()
    tensors = {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in (_diffusions() | outputs).items()}
    safetensors.torch.save_file(tensors, FILE, metadata=layouts)
    print(f"{FILE}: {len(tensors)} tensors, {FILE.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
