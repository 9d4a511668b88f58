"""Progressive generation (Ho et al. 2020, figure 6): x_0^ at steps on the way from x_T to x_0. A row for each image."""

import argparse

import torch

import ddpm_fast

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=250, help="timesteps, at most 1000")
parser.add_argument("--num", type=int, default=6, help="images")
parser.add_argument("--columns", type=int, default=10, help="steps to show, evenly spaced")
parser.add_argument("--out", default="progressive.png", help="file to write")
args = parser.parse_args()
if min(args.num, args.columns) < 1:
    parser.error("expected --num and --columns to be at least 1")

garments = ddpm_fast.load_builtin()
network = ddpm_fast.freeze(garments.model)  # the same outputs, faster
plan = ddpm_fast.ddpm_plan(garments.objective, args.steps)
seeds = ddpm_fast.sample_seeds(0, args.num)
labels = torch.arange(args.num) % 10  # the classes in turn
shown = set(torch.linspace(args.steps - 1, 0, args.columns).round().int().tolist())  # the last one first

columns = []
with torch.inference_mode():
    x_t = ddpm_fast.initial_noise((args.num, 1, 32, 32), seeds)  # x_T
    for step, t in enumerate(plan.timesteps.tolist()):
        v = network(x_t, torch.full((args.num,), t), labels)
        # x_0^ = sqrt(abar_t) x_t - sqrt(1 - abar_t) v, clipped: the estimate of the finished image.
        x_t, x_0 = ddpm_fast.reverse_step(x_t, v, step, plan, seeds=seeds, return_x_0=True)
        if step in shown:
            columns.append(x_0)

rows = torch.stack(columns, dim=1)  # [num, columns, 1, 32, 32]
ddpm_fast.save_grid(rows.flatten(0, 1), args.out, columns=len(columns), scale=2)
print(f"{args.out}: x_0^ at steps {sorted(shown)} of {args.steps}")
