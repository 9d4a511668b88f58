# %% [markdown]
# # A tour
#
# This tour shows how a DDPM ([Ho et al. 2020](https://arxiv.org/abs/2006.11239)) works, from its equations to a network that
# you train. You should know PyTorch. The tour takes about three minutes on two cores, and downloads nothing.
#
# Run it as a [notebook](tour.ipynb), or as a [script](tour.py) that writes its pictures to `runs/tour`. Both need the
# [extra](../docs/index.md#install) `train`. `make tour` writes the notebook and this page again.

# %%
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # otherwise training is slow while other programs use the CPU

import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.testing import assert_close

import ddpm_fast


def show(images, name, **options):
    """Write images in [-1, 1] to one file, and return it as a picture, which a notebook shows."""
    with Image.open(ddpm_fast.save_grid(images, f"runs/tour/{name}.png", **options)) as picture:
        return picture.copy()


# %% [markdown]
# ## The derivation in code
#
# The forward process turns an image into noise in 1000 steps. Each step keeps the part `alpha` of the variance and adds
# `beta` of noise, so the product of all alphas so far, `abar`, is the share of the image's variance left ([eq.
# 2](../docs/derivation.md#eq-2)):

# %%
schedule = ddpm_fast.NoiseSchedule.linear(1000)
alpha, beta, abar = schedule.alphas, schedule.betas, schedule.alpha_bars
assert_close(abar, (1 - beta).cumprod(0))
print(f"abar falls from {abar[0]:.4f} over {abar[250]:.4f} and {abar[500]:.4f} to {abar[999]:.6f}")

# %% [markdown]
# Sums of Gaussians are Gaussian, so one draw replaces t steps ([eq. 3](../docs/derivation.md#eq-3)):

# %%
t = 300
x_0, epsilon = torch.rand(4, 1, 8, 8) * 2 - 1, torch.randn(4, 1, 8, 8)
x_t = ddpm_fast.q_sample(x_0, t, schedule, noise=epsilon)
assert_close(x_t, abar[t].sqrt() * x_0 + (1 - abar[t]).sqrt() * epsilon)

# %% [markdown]
# If x_0 is known, the step back is a Gaussian, too ([eq. 6 and 7](../docs/derivation.md#the-posterior)). By Bayes' rule, the
# precisions of the step and of eq. 3 for t-1 add up, and they weight the means:

# %%
variance = 1 / (alpha[t] / beta[t] + 1 / (1 - abar[t - 1]))
assert_close(schedule.posterior_variance[t], variance)
assert_close(schedule.posterior_mean_coef_x_t[t], variance * alpha[t].sqrt() / beta[t])
assert_close(schedule.posterior_mean_coef_x_0[t], variance * abar[t - 1].sqrt() / (1 - abar[t - 1]))

# %% [markdown]
# When you sample, x_0 is not known. A network estimates the noise in x_t instead, which gives x_0 by eq. 3. If the estimate is
# exact, the sampler's step ([eq. 13](../docs/derivation.md#eq-13)) reaches the mean of that Gaussian:

# %%
mean = schedule.posterior_mean_coef_x_t[t] * x_t + schedule.posterior_mean_coef_x_0[t] * x_0
plan = ddpm_fast.ddpm_plan(schedule, clip=None)  # row 0 is t = 999
assert_close(ddpm_fast.reverse_step(x_t, epsilon, 999 - t, plan, noise=torch.zeros_like(x_t)), mean)

# %% [markdown]
# ## The forward process in pictures
#
# The built-in model draws three garments, and `q_sample` adds the noise of six timesteps to each:

# %%
garments = ddpm_fast.load_builtin()
sampler = garments.sampler()
labels = torch.tensor([2, 7, 9])  # pullover, sneaker, ankle boot
images = sampler(3, seed=1, class_labels=labels)

timesteps = [0, 50, 100, 200, 400, 999]
seeds = ddpm_fast.sample_seeds(0, 3)
noisy = torch.stack([ddpm_fast.q_sample(images, t, garments.objective.schedule, seeds=seeds) for t in timesteps], dim=1)
show(noisy.flatten(0, 1), "forward_process", columns=6, scale=2, titles=[f"t = {t}" for t in timesteps])

# %% [markdown]
# ## Sampling
#
# A sampler follows a plan, a table with one row for each evaluation of the network. This is DDIM's plan of six steps:

# %%
print(ddpm_fast.ddim_plan(garments.objective, 6))

# %% [markdown]
# The images of a column start from the same noise. The rows are DDIM with 3, 12 and 50 steps, and the built-in model's own plan
# of 6 steps. Three steps are too few for garments. Those of the 6 steps are sharp, because that plan was
# [fitted](../docs/sampling.md#fit-a-plan) to a slower one.

# %%
ddim = [garments.sampler(sampler="ddim", steps=steps)(10, seed=0) for steps in (3, 12, 50)]
show(torch.cat([*ddim, sampler(10, seed=0)]), "few_and_many_steps", columns=10, scale=2)

# %% [markdown]
# Guidance moves the prediction away from the unlabelled prediction, so the images show their class more clearly. The
# rows are scales of 0 (no class), 1 (the class sandal) and 3:

# %%
guided = [sampler(10, seed=0, class_labels="sandal", guidance_scale=scale) for scale in (0, 1, 3)]
show(torch.cat(guided), "guidance", columns=10, scale=2)

# %% [markdown]
# The reverse process, from x_T on the left to x_0 on the right:

# %%
_, states = sampler.trajectory(3, num_frames=7, seed=1, class_labels=labels)
show(states.transpose(0, 1).flatten(0, 1), "reverse_process", columns=7, scale=2)

# %% [markdown]
# ## Editing
#
# `vary` adds noise to an image and removes it again. With a larger strength, more of the image changes:

# %%
sde = garments.sampler(sampler="dpm++2m-sde", steps=20)
strengths = (0.2, 0.4, 0.6, 0.8)
varied = [ddpm_fast.vary(sde, images, strength=strength, class_labels=labels) for strength in strengths]
titles = ["image", *map(str, strengths)]
show(torch.stack([images, *varied], dim=1).flatten(0, 1), "variations", columns=5, scale=2, titles=titles)

# %% [markdown]
# `inpaint` keeps a part of an image and paints the rest, here the lower half. Other noise gives other paintings:

# %%
mask = torch.zeros(1, 1, 32, 32)
mask[..., 16:, :] = 1  # 1 is painted
repaint = sampler.with_plan(ddpm_fast.repaint_plan(garments.objective, 50, 5, 3))
painted = ddpm_fast.inpaint(repaint, images.repeat(3, 1, 1, 1), mask, seed=2, class_labels=labels.repeat(3))
rows = torch.stack([images, images.where(mask == 0, torch.tensor(0.0)), *painted.chunk(3)], dim=1)
show(rows.flatten(0, 1), "inpainting", columns=5, scale=2, titles=["image", "kept", "painted", "painted", "painted"])

# %% [markdown]
# ## Training
#
# scikit-learn has 1797 digits of 8x8 pixels. Its 17 grey levels become 0 to 255, and then -1 to 1:

# %%
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32).mul(255 / 16).round().div(127.5).sub(1).unsqueeze(1)
y = torch.tensor(digits.target)
x_train, y_train, x_test, y_test = x[:1500], y[:1500], x[1500:], y[1500:]
show(x_train[:20], "digits", columns=10, scale=6)

# %% [markdown]
# This loop is Algorithm 1 of the paper, and takes up to two minutes. It drops one label in ten, because guidance also needs
# predictions without a class. [`Trainer`](../docs/training.md#train-a-model-of-your-own) does the same, and saves checkpoints.

# %%
torch.manual_seed(0)
model = ddpm_fast.UNet(
    in_channels=1,
    out_channels=1,
    block_out_channels=[32, 64],
    norm_num_groups=8,  # norms of single channels would take away the timestep and the class
    layers_per_block=1,
    down_block_types=["DownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "UpBlock2D"],
    num_class_embeds=11,  # ten digits, and "no label"
    no_label=10,
)
model.to(memory_format=torch.channels_last)  # the CPU training kernels need it
steps, batch_size = int(os.environ.get("TOUR_STEPS", "1200")), 64
schedule = ddpm_fast.NoiseSchedule.cosine(1000)
optimizer = torch.optim.Adam(model.parameters())
rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
losses = []

with ddpm_fast.kept_memory():  # faster on a CPU
    for step in range(steps):
        chosen = torch.randint(len(x_train), (batch_size,))
        x_0, labels = x_train[chosen], y_train[chosen]
        labels[torch.rand(batch_size) < 0.1] = 10  # no label
        t = torch.randint(schedule.num_timesteps, (batch_size,))
        seeds = ddpm_fast.sample_seeds(0, batch_size, start=step * batch_size)  # new noise for every image
        x_t = ddpm_fast.q_sample(x_0, t, schedule, seeds=seeds)  # eq. 3
        loss = ddpm_fast.denoising_loss(model(x_t, t, labels), x_0, t, schedule, seeds=seeds)  # eq. 12
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        losses.append(loss.item())

for part in torch.tensor(losses).chunk(4):
    print(f"mean loss of {len(part)} steps: {part.mean():.3f}")

# %% [markdown]
# The network now draws digits, 0 to 9 in each row. `lambda_min` skips the largest timesteps of the cosine schedule, which
# contain almost no image:

# %%
plan = ddpm_fast.dpm_solver_plan(schedule, 20, eta=1.0, lambda_min=-5.1)
drawn = ddpm_fast.sample(model, plan, 300, shape=(1, 8, 8), class_labels=torch.arange(300) % 10)
show(drawn[:40], "drawn_digits", columns=10, scale=6)

# %% [markdown]
# ## Evaluation
#
# The Frechet distance compares the mean and the covariance of features of two sets of images. These images are so small that
# their pixels can be the features. A good model is about as near to the test digits as other real digits are:

# %%
sets = {"drawn": drawn, "real": x_train[:300], "noise": torch.randn(300, 1, 8, 8)}
for name, each in sets.items():
    print(f"{name:>5}: {ddpm_fast.frechet_distance(each.flatten(1), x_test.flatten(1)):.2f}")

# %% [markdown]
# The [variational bound](../docs/derivation.md#the-variational-bound) says in how many bits per pixel the model could store
# test digits without loss. A pixel of 256 grey levels has 8 bits. Wrong labels cost more bits, because the model then expects
# other digits:

# %%
ancestral = ddpm_fast.Sampler(model, ddpm_fast.ddpm_plan(schedule), shape=(1, 8, 8), dtype=torch.float32)
for name, labels in {"right": y_test[:16], "wrong": (y_test[:16] + 1) % 10}.items():
    bound = ddpm_fast.VariationalBound.of(ancestral, x_test[:16], class_labels=labels)
    print(f"{name} labels: {bound.total.mean():.2f} bits, {bound.reconstruction.mean():.2f} of them for the last step (L_0)")
