"""A checkpoint of guided-diffusion without guided-diffusion: read it, sample from it, train it on.

The file is made up here, with the names and shapes of a small `UNetModel` and random weights. For the original's own loops,
`ddpm_fast.freeze` takes a network in memory: see docs/migrating/guided-diffusion.md.
"""

import torch

import ddpm_fast
from ddpm_fast.integrations.guided_diffusion import load_guided_diffusion

CHANNELS, CLASSES = 32, 10
torch.manual_seed(0)
weights = {}


def layer(name, outs, ins, *kernel):
    """Add random weights of a linear layer or a convolution."""
    fan_in = ins * torch.Size(kernel).numel()
    weights[f"{name}.weight"], weights[f"{name}.bias"] = torch.randn(outs, ins, *kernel) / fan_in**0.5, torch.zeros(outs)


def norm(name, channels):
    weights[f"{name}.weight"], weights[f"{name}.bias"] = torch.ones(channels), torch.zeros(channels)


def res_block(name, ins, outs):
    """Add a residual block with scale and shift from the time embedding (use_scale_shift_norm)."""
    norm(f"{name}.in_layers.0", ins)
    layer(f"{name}.in_layers.2", outs, ins, 3, 3)
    layer(f"{name}.emb_layers.1", 2 * outs, 4 * CHANNELS)
    norm(f"{name}.out_layers.0", outs)
    layer(f"{name}.out_layers.3", outs, outs, 3, 3)
    if ins != outs:
        layer(f"{name}.skip_connection", outs, ins, 1, 1)


layer("time_embed.0", 4 * CHANNELS, CHANNELS)
layer("time_embed.2", 4 * CHANNELS, 4 * CHANNELS)
weights["label_emb.weight"] = torch.randn(CLASSES, 4 * CHANNELS)
layer("input_blocks.0.0", CHANNELS, 3, 3, 3)
res_block("input_blocks.1.0", CHANNELS, CHANNELS)
res_block("middle_block.0", CHANNELS, CHANNELS)
norm("middle_block.1.norm", CHANNELS)
layer("middle_block.1.qkv", 3 * CHANNELS, CHANNELS, 1)
layer("middle_block.1.proj_out", CHANNELS, CHANNELS, 1)
res_block("middle_block.2", CHANNELS, CHANNELS)
res_block("output_blocks.0.0", 2 * CHANNELS, CHANNELS)
res_block("output_blocks.1.0", 2 * CHANNELS, CHANNELS)
norm("out.0", CHANNELS)
layer("out.2", 6, CHANNELS, 3, 3)  # 6 channels for 3: a learned variance
torch.save(weights, "16x16_diffusion.pt")

# 1. Read the file, without running code from it. Names and shapes tell everything but the attention's heads.
model = load_guided_diffusion("16x16_diffusion.pt", num_head_channels=32, image_size=16)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {model.config['num_class_embeds']} classes")

# 2. p_sample_loop with timestep_respacing="25", as a plan. Image 2 is the same in any batch.
schedule = ddpm_fast.NoiseSchedule.linear(1000)  # or .cosine(...), as noise_schedule said
plan = ddpm_fast.ddpm_plan(schedule, 25, spacing="linspace", variance="learned_range")
labels = torch.tensor([1, 2, 3, 4])
sampler = ddpm_fast.Sampler(model, plan)
images = sampler(4, seed=0, class_labels=labels, progress=False)
alone = sampler(1, seed=ddpm_fast.sample_seeds(0, 4)[2:3], class_labels=labels[2:3], progress=False)
print(f"image 2 alone differs by {(images[2] - alone[0]).abs().max():.1e}")

# 3. Train it on, and freeze what came out. A `UNet` has gradients, a frozen one has none.
x_0, t = images.clamp(-1, 1), torch.randint(1000, (4,))
seeds = ddpm_fast.sample_seeds(1, 4)
x_t = ddpm_fast.q_sample(x_0, t, schedule, seeds=seeds)
epsilon = model.train()(x_t, t, labels)[:, :3]  # the last 3 channels are the variance's
ddpm_fast.denoising_loss(epsilon, x_0, t, schedule, seeds=seeds).backward()
frozen = ddpm_fast.freeze(model.eval())
print(f"frozen: {(frozen(x_t, t, labels)[:, :3] - epsilon).abs().max():.1e}")
