"""Progressive lossy coding (Ho et al. 2020, section 4.3, figure 5): rate and distortion over reverse time.

A sender transmits x_T, x_{T-1}, ..., x_1. The receiver estimates x_0 from each. The rate is the sum of the bound's terms so
far (derivation eq. 9 and 10), in bits per dimension. The distortion is the RMSE of x_0^ on the scale 0..255.
"""

import argparse

import torch

import ddpm_fast
from ddpm_fast.data.items import read_batch, to_unit_range
from ddpm_fast.data.load import load_dataset
from ddpm_fast.data.options import DataOptions

parser = argparse.ArgumentParser(description="Print rate and distortion of progressive lossy coding over reverse time.")
parser.add_argument("--steps", type=int, default=1000, help="timesteps; fewer are quicker and cost more bits")
parser.add_argument("--num", type=int, default=16, help="test images")
parser.add_argument("--data", default="fashion-mnist", help="fashion-mnist, digits, or a folder of images")
parser.add_argument("--rows", type=int, default=11, help="rows of the table, evenly spaced in time")
parser.add_argument("--plot", help="also draw the curves to this file; needs matplotlib: pip install -e '.[bench]'")
args = parser.parse_args()
if args.plot:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib: pip install -e '.[bench]'") from error

garments = ddpm_fast.load_builtin()
schedule = garments.objective.schedule
dataset = load_dataset(DataOptions(data=args.data, image_size=32), split="test")
if not 1 <= args.num <= len(dataset):
    parser.error(f"expected --num to be in 1..{len(dataset)}, got {args.num}")
images = read_batch(dataset, range(args.num)).images

# The schedule of S of the T timesteps (Nichol and Dhariwal 2021, section 4): alpha_t = abar_t / abar_s.
timesteps = ddpm_fast.ddpm_plan(schedule, args.steps).timesteps.flip(0)  # ascending
abar = schedule.alpha_bars[timesteps]
spaced = ddpm_fast.NoiseSchedule.from_betas(1 - abar / torch.cat([torch.ones(1), abar[:-1]]))


class Spaced(torch.nn.Module):
    """The model, told its own timesteps by those of the shorter schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.network = garments.model.config, ddpm_fast.freeze(garments.model)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        return self.network(x_t, timesteps[t], class_labels)


objective = ddpm_fast.Objective(spaced, garments.objective.prediction)
sampler = ddpm_fast.Sampler(Spaced(), ddpm_fast.ddpm_plan(objective))
bound = ddpm_fast.VariationalBound.of(sampler, to_unit_range(images))

# Columns in reverse time. Once x_t is known, L_T and the terms of all larger t have been sent.
sent = torch.cat([bound.prior[:, None], bound.terms[:, 1:].flip(1)], dim=1)
rate = sent.cumsum(dim=1).mean(dim=0)
distortion = 127.5 * bound.x_0_mse.flip(1).mean(dim=0).sqrt()

print("reverse time  rate (bits/dim)  distortion (RMSE of 0..255)")
for i in torch.linspace(0, args.steps - 1, args.rows).round().int().unique().tolist():
    print(f"{i + 1:>12}  {rate[i]:>15.4f}  {distortion[i]:>27.2f}")
print(f"lossless: {bound.total.mean():.4f} bits/dim, {bound.reconstruction.mean():.4f} of them for L_0")

if args.plot:
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    panels = figure.subplots(1, 3)
    time = torch.arange(1, args.steps + 1)
    for axes, x, y, name, ylabel in zip(
        *(panels, (time, time, rate), (distortion, rate, distortion)),
        ("reverse time", "reverse time", "rate (bits/dim)"),
        ("distortion (RMSE)", "rate (bits/dim)", "distortion (RMSE)"),
        strict=True,
    ):
        axes.plot(x, y)
        axes.set(xlabel=name, ylabel=ylabel)
    figure.savefig(args.plot)
