"""Settings of the benchmark of the ops."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import common

HERE = Path(__file__).parent


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Time the backends of a group one after the other: pytest-randomly has shuffled them."""
    places = [i for i, item in enumerate(items) if item.path.parent == HERE]
    for place, item in zip(places, sorted((items[i] for i in places), key=lambda item: item.name), strict=True):
        items[place] = item


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Add what a time depends on. `--benchmark-compare` warns if it differs, so leave out the clock's rate at this moment."""
    for key in ("hz_actual", "hz_actual_friendly"):
        machine_info["cpu"].pop(key, None)
    machine_info |= {"device": common.device_name(common.visible_device()), "instruction_set": common.instruction_set()}
    machine_info |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
