"""A program for guided-diffusion on these kernels: another import, then its own lines. Offline; a few seconds."""

import torch
from torch import nn

import ddpm_fast
from ddpm_fast.integrations.guided_diffusion import create_gaussian_diffusion


class Denoiser(nn.Module):
    """Stands for a trained UNetModel: epsilon^ and the variance's channels (learn_sigma). Yours: `load_guided_diffusion`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.1 * self.net(x) + torch.cat([x, torch.zeros_like(x)], dim=1)


torch.manual_seed(0)
model = Denoiser()
diffusion = create_gaussian_diffusion(learn_sigma=True, noise_schedule="cosine", timestep_respacing="ddim25")

# Training: the loss of each sample at its own timestep.
x_0 = torch.rand(4, 3, 16, 16) * 2 - 1
t = torch.randint(0, diffusion.num_timesteps, (4,))
diffusion.training_losses(model, x_0, t)["loss"].mean().backward()

# Sampling from torch's generator: a seed gives the original's images. Guidance by the gradient of a classifier, say.
images = diffusion.ddim_sample_loop(model, (4, 3, 16, 16))
guided = diffusion.p_sample_loop(model, (4, 3, 16, 16), cond_fn=lambda x, t: -0.1 * x)

# Sampling from a seed an image: image 2 is the same by itself. The same steps by `sample`, which replays them as a CUDA graph.
seeds = ddpm_fast.sample_seeds(0, 4)
together = diffusion.p_sample_loop(model, (4, 3, 16, 16), seeds=seeds)
alone = diffusion.p_sample_loop(model, (1, 3, 16, 16), seeds=seeds[2:3])
sampled = ddpm_fast.sample(model, diffusion.sampling_plan(), 4, seed=seeds, shape=(3, 16, 16), progress=False)
print("image 2 alone differs by", float((together[2] - alone[0]).abs().max()))
print("sample() differs by", float((together - sampled).abs().max()))
print("bits a dimension:", diffusion.calc_bpd_loop(model, x_0)["total_bpd"].tolist())
