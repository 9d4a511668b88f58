"""denoising-diffusion-pytorch on this package's network: train a little, sample frozen, load a checkpoint.

Needs denoising-diffusion-pytorch. The file has not its name, which would hide the package.
"""

import torch
from denoising_diffusion_pytorch import GaussianDiffusion

import ddpm_fast
from ddpm_fast.integrations.denoising_diffusion_pytorch import load_checkpoint

torch.manual_seed(0)
model = ddpm_fast.UNet(  # was: Unet(16, dim_mults=(1, 2), channels=1)
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

# 1. Their process trains the network, in a loop of yours or in their Trainer.
optimizer = torch.optim.Adam(diffusion.parameters(), lr=2e-3)
for _ in range(60):
    loss = diffusion(discs[torch.randperm(64)[:16]])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.3f}")

# 2. A frozen copy of the process samples. It draws the same images from the same random numbers.
diffusion.eval()
fast = ddpm_fast.freeze(diffusion)
torch.manual_seed(1)
before = diffusion.sample(batch_size=16)
torch.manual_seed(1)
print(f"largest difference of a pixel: {(fast.sample(batch_size=16) - before).abs().max():.1e} of 1")

# 3. The same sampler as a plan: constant memory, and image 5 is the same in any batch. Images are in [-1, 1].
sampler = ddpm_fast.Sampler(fast.model, ddpm_fast.plan_of(diffusion))
images = sampler(16, seed=0, progress=False)
alone = sampler(1, seed=ddpm_fast.sample_seeds(0, 16)[5:6], progress=False)
print(f"image 5 alone differs by {(alone[0] - images[5]).abs().max():.1e}")
ddpm_fast.save_grid(images, "discs.png")

# 4. A file of their Trainer, made up here, is read without running code from it. By default it loads the moving average.
weights = diffusion.state_dict()
torch.save({"step": 60, "model": weights, "ema": {f"ema_model.{name}": w for name, w in weights.items()}}, "model-1.pt")
print("resumed at step", load_checkpoint(diffusion, "model-1.pt"))
