"""Code for denoising-diffusion-pytorch on this package's kernels: train a little, sample, resume from a checkpoint."""

import torch

from ddpm_fast import UNet, sample_seeds, save_grid
from ddpm_fast.integrations.lucidrains import (  # was: from denoising_diffusion_pytorch import ...
    GaussianDiffusion,
    load_checkpoint,
)

torch.manual_seed(0)
model = UNet(  # or the Unet of denoising-diffusion-pytorch, or any model with channels and out_dim
    sample_size=16,
    in_channels=1,
    out_channels=1,
    block_out_channels=[16, 32],
    down_block_types=["DownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "UpBlock2D"],
    layers_per_block=1,
    norm_num_groups=8,
)
diffusion = GaussianDiffusion(model, image_size=16, timesteps=1000, sampling_timesteps=50, min_snr_loss_weight=True)

# Images in [0, 1]: discs of many sizes.
y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
discs = torch.sigmoid(20 * (torch.linspace(0.2, 0.8, 64)[:, None, None, None] - (x**2 + y**2).sqrt()))  # [64, 1, 16, 16]

optimizer = torch.optim.Adam(diffusion.parameters(), lr=2e-3)
for step in range(60):
    seeds = sample_seeds(0, 16, start=16 * step)  # the noise is then drawn in the kernels; without: by torch's generator
    loss = diffusion(discs[torch.randperm(64)[:16]], seeds=seeds)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.3f}")

images = diffusion.sample(batch_size=16, seed=0)  # image i depends on (seed, i) alone; without a seed: torch's generator
again = diffusion.sample(batch_size=1, seed=sample_seeds(0, 16)[5:6])
assert torch.allclose(again[0], images[5], atol=1e-4)
save_grid(images * 2 - 1, "discs.png")

# A model-N.pt of the original's Trainer loads, by default its moving average.
weights = diffusion.state_dict()
torch.save({"step": 60, "model": weights, "ema": {f"ema_model.{name}": w for name, w in weights.items()}}, "model-1.pt")
print("resumed at step", load_checkpoint(diffusion, "model-1.pt"))
