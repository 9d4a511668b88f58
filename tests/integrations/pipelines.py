"""Small pipelines of diffusers, and the images that they draw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_unets import SMALL, VARIANTS, randomise
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

Pipeline = Any
STEPS = 3


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


def assert_same_output(actual: Tensor, expected: Tensor) -> None:
    """To the rounding of one evaluation in float32."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
