"""A diffusers pipeline and its frozen copy: the same images from the same generator.

Needs diffusers. The network is a small one with random weights. `DDPMPipeline.from_pretrained("path/to/ddpm-cifar10-32")` works
the same. Writes the folder diffusers_pipeline.
"""

import diffusers
import torch

import ddpm_fast

torch.manual_seed(0)
unet = diffusers.UNet2DModel(
    sample_size=16,
    block_out_channels=(32, 64),
    norm_num_groups=8,  # 4 channels or more in each, so that norms keep what the time embedding adds
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
pipe = diffusers.DDPMPipeline(unet=unet.eval(), scheduler=diffusers.DDPMScheduler())


def draw(pipe, batch_size=4):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(batch_size, generator, num_inference_steps=10, output_type="pt").images


# 1. One line, and the images stay. `pipe` is as before.
before = draw(pipe)
fast = ddpm_fast.freeze(pipe)
print(f"largest difference of a pixel: {(draw(fast) - before).abs().max():.1e} of 1")

# 2. The network in bfloat16, which is faster on recent GPUs and some CPUs. Images stay float32 between steps.
print(f"in bfloat16: {(draw(ddpm_fast.freeze(pipe, torch.bfloat16)) - before).abs().max():.1e}")

# 3. Schedulers are swapped as in any pipeline.
fast.scheduler = diffusers.DDIMScheduler.from_config(fast.scheduler.config)
print(f"by DDIM: {tuple(draw(fast).shape)}")

# 4. The same sampler as a plan: constant memory, CUDA graphs, and seeds. The first of four images is the same alone.
sampler = ddpm_fast.Sampler(fast.unet, ddpm_fast.plan_of(pipe, 10))
four, one = (sampler(n, seed=0, progress=False) for n in (4, 1))
print(f"the first of four, drawn alone, differs by {(one[0] - four[0]).abs().max():.1e}")

# 5. A frozen network cannot change. Train, save and move the original, then freeze it again.
pipe.save_pretrained("diffusers_pipeline")
with torch.no_grad():
    unet.conv_out.bias += 0.1
fast = ddpm_fast.freeze(pipe)
try:
    fast.save_pretrained("frozen")
except ValueError as error:
    print(error)

# 6. Any other model keeps its own code and has its norms fused, in training too.
print(ddpm_fast.fuse(unet))
