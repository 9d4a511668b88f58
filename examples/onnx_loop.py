"""Draw with ONNX Runtime and numpy alone: the network as an ONNX file, and the plan as a table of numbers.

Needs diffusers, onnx, onnxscript and onnxruntime (the extra bench). Writes onnx/network.onnx, onnx/plan.npz and onnx_loop.png.
"""

from pathlib import Path

import numpy as np
import torch

import ddpm_fast
from ddpm_fast.pretrained import BUILTIN

try:
    import diffusers
    import onnxruntime
    import onnxscript  # noqa: F401  # torch.onnx.export needs it
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: install the extra bench, pip install -e '.[bench]'") from None

# 1. Once, with PyTorch: export the network, which diffusers reads, and write the plan.
garments, out = ddpm_fast.load_builtin(), Path("onnx")
out.mkdir(exist_ok=True)
unet = diffusers.UNet2DModel.from_pretrained(BUILTIN / "unet", low_cpu_mem_usage=False).eval()
inputs = {
    "sample": torch.zeros(2, 1, 32, 32),
    "timestep": torch.zeros((), dtype=torch.int64),
    "class_labels": torch.zeros(2).long(),
}
batch = torch.export.Dim("batch")
shapes = {"sample": {0: batch}, "timestep": {}, "class_labels": {0: batch}}
torch.onnx.export(unet, kwargs=inputs, f=out / "network.onnx", dynamic_shapes=shapes, dynamo=True, verbose=False)
plan = garments.plan
np.savez(out / "plan.npz", timesteps=plan.timesteps.numpy(), coefficients=plan.coefficients.numpy())

# 2. Anywhere, without PyTorch: a loop over the rows of the plan. It draws no noise, so x_T decides the images.
network = onnxruntime.InferenceSession(out / "network.onnx")
table = np.load(out / "plan.npz")


def draw(x_t: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return images [N, 1, 32, 32] in [-1, 1] from x_T of the same shape, float32, and labels int64 [N]."""
    before = np.zeros_like(x_t)
    for t, row in zip(table["timesteps"], table["coefficients"].astype(np.float32), strict=True):
        p, q, k0, k1, k2, k3, *_, clip = row
        (m,) = network.run(None, {"sample": x_t, "timestep": np.array(t), "class_labels": labels})
        x_0 = np.clip(p * x_t + q * m, -clip, clip)
        x_t, before = k0 * x_0 + k1 * x_t + k2 * m + k3 * before, x_0
    return x_t


seeds, labels = ddpm_fast.sample_seeds(0, 10), np.arange(10)
drawn = torch.from_numpy(draw(ddpm_fast.initial_noise((10, 1, 32, 32), seeds).numpy(), labels))
expected = garments.sampler()(10, seed=0, class_labels=labels.tolist(), progress=False)
print(f"largest difference from the package's images: {(drawn - expected).abs().max():.1e}")
ddpm_fast.save_grid(torch.cat([drawn, expected]), "onnx_loop.png", columns=10)
print("onnx_loop.png: drawn by ONNX Runtime, and by the package")
