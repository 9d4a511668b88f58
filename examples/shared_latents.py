"""Images that share x_t (Ho et al. 2020, figure 7).

Each row shows an x_t, and images drawn from it with other noise. The larger t is, the less the images have in common.
"""

import argparse

import torch

import ddpm_fast

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=100, help="timesteps, 4 to 1000")
parser.add_argument("--num", type=int, default=8, help="images for each x_t")
parser.add_argument("--out", default="shared_latents.png", help="file to write")
args = parser.parse_args()

sampler = ddpm_fast.load_builtin().sampler(sampler="ddpm", steps=args.steps)

# One trajectory from x_T to x_0. states[i] is the state before step i of the plan.
_, states = sampler.trajectory(1, num_frames=args.steps + 1, seed=4, class_labels="none")

rows = []
for tenths in (0, 4, 6, 8):  # the part of the steps that the images share
    start = args.steps * tenths // 10
    x_t = states[start]
    rest = sampler.with_plan(sampler.plan[start:])  # or plan.starting_at(t), with t the timestep of the step
    images = rest(args.num, seed=1, x_T=x_t.expand(args.num, -1, -1, -1), class_labels="none")
    rows += [x_t.clamp(-1, 1), images]
    print(f"{args.num} images share x_t at t = {int(rest.plan.timesteps[0])}")

ddpm_fast.save_grid(torch.cat(rows), args.out, columns=args.num + 1, scale=2)
