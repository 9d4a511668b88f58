"""The loss of training with ddpm_fast beside diffusers': the CIFAR-10 network of Ho et al., the same weights, images and noise.

    python benchmarks/loss_curve.py
    python benchmarks/loss_curve.py --precision bf16

Two runs that compute the same up to rounding stay together at first; then rounding grows from step to step, but the mean stays.
Images are scikit-learn's digits, 32x32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import common
import peers
import torch
import training
from runtimes import DTYPES
from torch import nn

from ddpm_fast import sample_seeds
from ddpm_fast.nn import CIFAR10_32, UNet
from ddpm_fast.training.data import load_dataset, to_unit_range


def batches(steps: int, n: int) -> list[training.Batch]:
    dataset = load_dataset("digits", image_size=CIFAR10_32["sample_size"])
    generator = torch.Generator().manual_seed(0)
    result = []
    for step in range(steps):
        batch = training.Batch(n, "cpu")
        images, _ = dataset[torch.randint(len(dataset), (n,), generator=generator)]
        batch.x_0 = to_unit_range(images).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        batch.t = torch.randint(training.SCHEDULE.num_timesteps, (n,), generator=generator)
        batch.seeds = sample_seeds(step, n)
        result.append(batch)
    return result


def curve(name: str, model: nn.Module, data: list[training.Batch], autocast: bool) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, fused=True)
    losses = []
    for step, batch in enumerate(data):
        if name == training.OURS:
            loss = training.loss_ours(model, batch, autocast)
        else:
            loss = training.loss_diffusers(model, batch, autocast, batch.epsilon())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 0:
            print(f"{name}: step {step}, loss {losses[-1]:.5f}", flush=True)
    return losses


def picture(losses: dict[str, list[float]], precision: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, figsize=(6.4, 4.8), sharex=True, layout="constrained")
    for (name, values), style in zip(losses.items(), ("-", "--"), strict=True):
        above.plot(values, style, label=name, linewidth=1.5)
    above.set(ylabel="loss", yscale="log", title=f"cifar10-32, {precision}: the same weights, images and noise")
    above.legend()
    ours, theirs = losses[training.OURS], losses[training.DIFFUSERS]
    below.plot([abs(a - b) / b for a, b in zip(ours, theirs, strict=True)], color="black", linewidth=1)
    below.set(xlabel="step", ylabel="relative difference", yscale="log")
    common.save_picture(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--precision", choices=DTYPES, default="float32")
    parser.add_argument(
        "--out", type=Path, help="JSON file; default: benchmarks/results/<device>.json; the picture lies beside it"
    )
    args = parser.parse_args()

    machine = common.machine()
    common.print_machine(machine)
    torch.manual_seed(0)
    ours = UNet(**CIFAR10_32 | {"dropout": 0.0})  # the same dropout is not to be had
    models = {training.DIFFUSERS: peers.diffusers_unet(ours), training.OURS: ours}
    data = batches(args.steps, args.batch)
    losses = {
        name: curve(
            *(name, model.train().to(memory_format=torch.channels_last), data),  # type: ignore[call-overload]
            args.precision == "bf16",
        )
        for name, model in models.items()
    }
    pairs = list(zip(losses[training.OURS], losses[training.DIFFUSERS], strict=True))
    last = slice(-args.steps // 4, None)
    rows: list[dict[str, object]] = [
        {
            "training": name,
            "batch": args.batch,
            "precision": args.precision,
            "steps": args.steps,
            "mean loss": sum(values) / len(values),
            "of the last quarter": sum(values[last]) / len(values[last]),
            "largest difference": max(abs(a - b) for a, b in pairs),
            "in the first 20 steps": max(abs(a - b) for a, b in pairs[:20]),
        }
        for name, values in losses.items()
    ]
    common.print_table("loss of training", rows)
    output = args.out or common.default_output("cpu")
    common.record(output, f"loss_curve {args.precision}", machine, rows)
    picture(losses, args.precision, output.with_name(f"{output.stem}_loss_curve_{args.precision}.png"))


if __name__ == "__main__":
    main()
