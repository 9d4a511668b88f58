"""A run's averaged network as a folder for sampling."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import MissingPath, UnusablePath, expect
from ..files.writing import write_json, write_text
from ..inference import interface_of
from ..nn import UNet
from ..options import checked
from ..predictions import DIFFUSERS_PREDICTIONS
from ..resources import check_writable
from ..schedule import Objective
from .checkpoint import WEIGHTS, read_state
from .run import RunFolder

if TYPE_CHECKING:
    from ..schemas import Checkpoint


@checked()
def export_checkpoint(
    run_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str], dtype: torch.dtype = torch.float16
) -> Path:
    """Write the averaged network of a run's newest checkpoint for sampling, with the record of its training.

    Args:
        run_dir: Folder of a run.
        out_dir: Folder to write. It receives unet/, scheduler/ and model_index.json, from which diffusers loads a pipeline,
            training.json (the run's configuration and its step) and training_log.csv. The names of the classes are in
            unet/config.json. A network that predicts flow or a "learned" variance, or has a condition, gets no
            model_index.json, because no pipeline of diffusers draws with it.
        dtype: Dtype of the weights in the file.

    Returns:
        `out_dir`.

    Raises:
        FileNotFoundError: There is no run, or it has no checkpoint.
        ValueError: `out_dir` is the run's folder, or within its checkpoints.
        OSError: `out_dir` cannot be written.
    """
    run, out = RunFolder(run_dir), Path(out_dir)
    checkpoints = run.checkpoints.path
    for holds, wanted in (
        (out.resolve() != run.path.resolve(), "to be another folder than run_dir"),
        (checkpoints.resolve() not in (out.resolve(), *out.resolve().parents), "to be apart from the run's checkpoints"),
        (not RunFolder(out).checkpoints.path.is_dir(), "to be no training run"),
    ):
        expect(holds, "out_dir", wanted, out)
    check_writable("out_dir", out, out)
    config = run.read_config()

    def read(checkpoint: Path) -> tuple[UNet, Checkpoint]:
        check_is_unet("run_dir", checkpoint)
        return UNet.from_pretrained(checkpoint / "unet_ema").to(dtype), read_state(checkpoint)

    found = run.checkpoints.read_newest("unet_ema/", read)
    if found is None:
        raise MissingPath("", f"a checkpoint in {checkpoints}", "none")
    model, state = found
    log = run.log.until(state.step)
    objective = Objective.from_config(config["objective"])
    options = dict(config["options"], data_dir=None)  # a model that is shared names folders, but not where they were
    options |= {name: Path(options[name]).name for name in ("data", "condition", "init") if options.get(name) is not None}
    record = {**config, "options": options, "step": state.step, "seconds": state.seconds}
    try:
        model.save_pretrained(out / "unet")
        write_scheduler(out / "scheduler", objective)
        reads = interface_of(model, predicts_variance=objective.predicts_variance).condition.channels
        if not reads and _diffusers_steps(objective):  # no pipeline passes a condition
            write_json(
                out / "model_index.json",
                {
                    # diffusers' DDPMPipeline passes no labels to the network. This one does, with any scheduler.
                    "_class_name": "DDPMPipeline" if model.class_embedding is None else "ConsistencyModelPipeline",
                    "scheduler": ["diffusers", "DDPMScheduler"],
                    "unet": ["diffusers", "UNet2DModel"],
                },
            )
        write_json(out / "training.json", record)
        write_text(out / "training_log.csv", log)
    except OSError as error:
        raise UnusablePath("", f"to write a model to {out}", f"{error}; export it again") from error
    return out


def check_is_unet(name: str, folder: Path) -> None:
    """Raise a ValueError if a checkpoint holds another network than a `UNet`."""
    file = folder / WEIGHTS["unet_ema"]
    got = f"another network, which its folder does not describe; make it, and load {file} with load_state_dict"
    expect(not file.exists(), name, "to hold a UNet", got)


def write_scheduler(folder: Path, objective: Objective) -> None:
    """Write scheduler_config.json for diffusers' DDPMScheduler, if it can step such a network."""
    known = {"_class_name": "DDPMScheduler"} if _diffusers_steps(objective) else {}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "scheduler_config.json", known | objective.scheduler_config())


def _diffusers_steps(objective: Objective) -> bool:
    """Return whether diffusers' DDPMScheduler can step a network. It takes a "learned" log variance for a variance."""
    return objective.name in DIFFUSERS_PREDICTIONS and objective.variance != "learned"
