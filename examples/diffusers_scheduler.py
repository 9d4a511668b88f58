"""diffusers' loop with any plan of this package: the image of diffusers' scheduler, or a seed for each sample.

Needs diffusers, which reads the folder of the built-in network. Writes diffusers_scheduler.png.
"""

import diffusers
import torch

import ddpm_fast
from ddpm_fast.integrations.diffusers import PlanScheduler
from ddpm_fast.pretrained import BUILTIN

unet = diffusers.UNet2DModel.from_pretrained(BUILTIN / "unet", low_cpu_mem_usage=False).eval()
boot = torch.tensor([9])


@torch.no_grad()
def draw(scheduler, x_t, generator=None):
    """Draw images as every pipeline does."""
    scheduler.set_timesteps(25)
    for t in scheduler.timesteps:
        m = unet(x_t, t, class_labels=boot.expand(len(x_t))).sample
        x_t = scheduler.step(m, t, x_t, generator=generator).prev_sample
    return x_t


# 1. The same steps in one kernel each, and the same image.
x_T = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
ddpm = diffusers.DDPMScheduler.from_pretrained(BUILTIN / "scheduler")
theirs = draw(ddpm, x_T, torch.Generator().manual_seed(1))
scheduler = PlanScheduler.of(ddpm, 25)
ours = draw(scheduler, x_T, torch.Generator().manual_seed(1))
print(f"largest difference to diffusers: {(ours - theirs).abs().max():.1e}")

# 2. With seeds, an image depends only on its seed: the second of four is the same alone.
seeds = ddpm_fast.sample_seeds(0, 4)


def from_seeds(seeds):
    scheduler.seeds = seeds
    return draw(scheduler, ddpm_fast.initial_noise((len(seeds), 1, 32, 32), seeds))


images = from_seeds(seeds)
print(f"the second alone differs by {(from_seeds(seeds[1:2])[0] - images[1]).abs().max():.1e}")

# 3. A plan that diffusers does not have: DPM-Solver++ of order 3 at Karras's levels. A pipeline takes it as its scheduler.
plan = ddpm_fast.dpm_solver_plan(ddpm_fast.load_builtin().objective, 25, order=3, spacing="karras")
solved = draw(PlanScheduler(plan), x_T)

# 4. `plan_of` gives a scheduler of diffusers as a plan for a sampler, which freezes the network.
ddim = diffusers.DDIMScheduler.from_config(ddpm.config, timestep_spacing="trailing")
sampler = ddpm_fast.load_builtin().sampler(ddpm_fast.plan_of(ddim, 25))  # the same network, frozen
fast = sampler(4, seed=0, class_labels=9, progress=False)
ddpm_fast.save_grid(torch.cat([ours, images, solved, fast]), "diffusers_scheduler.png", columns=4)
