"""Predict the time of every op of the native backend on four GPUs, see cards.py. Nothing is measured.

python benchmarks/predict.py
python benchmarks/predict.py --network cifar10-32   # a step of sampling by kind, on an H100
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import common
import idioms
import traced
from cards import BUDGETS, CARDS, predict
from works import deciding


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=idioms.NETWORKS, help="print a step of this network on an H100")
    args = parser.parse_args(arguments)
    data = json.loads(BUDGETS.read_text(encoding="utf-8"))["native"]
    if args.network:
        rows = traced.table(args.network, CARDS[1], data["kernels"])
        common.print_table(f"milliseconds of a step on an {CARDS[1].name}, predicted", rows)
        print(f"assumed: {traced.ASSUMED}")
        return
    rows = []
    for work in deciding():
        found = {card.name: predict(work, card, data["kernels"]) for card in CARDS}
        rows.append(work.columns() | {name: f"{us:.3g} {bound}" for name, (us, bound) in found.items()})
    common.print_table(f"microseconds predicted from the instructions of {data['compiler']}", rows)


if __name__ == "__main__":
    main()
