"""A diffusers pipeline, and the same one accelerated: the same images from the same generator, a folder that diffusers reads.

Needs diffusers. The network is a small one with random weights; `DDPMPipeline.from_pretrained("path/to/ddpm-cifar10-32")` and
the like work the same. Writes the folder diffusers_pipeline.
"""

import diffusers
import torch

import ddpm_fast

torch.manual_seed(0)
unet = diffusers.UNet2DModel(
    sample_size=32,
    block_out_channels=(32, 64),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
pipe = diffusers.DDPMPipeline(unet=unet.eval(), scheduler=diffusers.DDPMScheduler())
pipe.set_progress_bar_config(disable=True)


def draw(batch_size=4):
    generator = torch.Generator().manual_seed(0)
    return pipe(batch_size, generator, num_inference_steps=25, output_type="pt").images


# 1. One line, and the images stay.
before = draw()
ddpm_fast.accelerate(pipe)
print(f"largest difference of a pixel: {(draw() - before).abs().max():.1e} of 1")

# 2. The network in bfloat16, which some processors and every recent GPU are faster at; the images stay float32 between steps.
ddpm_fast.accelerate(pipe, dtype=torch.bfloat16)
print(f"in bfloat16: {(draw() - before).abs().max():.1e}")

# 3. Noise of each image's own: the first of four is the same alone.
ddpm_fast.accelerate(pipe, noise="philox")
print(f"the first of four, drawn alone, differs by {(draw(1)[0] - draw()[0]).abs().max():.1e}")

# 4. What is saved is diffusers' own, and `restore` is the way back.
pipe.save_pretrained("diffusers_pipeline")
diffusers.DDPMPipeline.from_pretrained("diffusers_pipeline", low_cpu_mem_usage=False)
ddpm_fast.restore(pipe)
print(f"restored: {(draw() - before).abs().max():.0e}")

# 5. Any other model keeps its own code and has its norms fused, in training too.
print(ddpm_fast.fuse(unet))
