"""A run in its folder: begun, or continued if it is the same run."""

from __future__ import annotations

import logging
import os
from typing import Any, Final

import torch

from ..errors import InvalidValue, expect, renaming
from ..nn import UNetConfig
from ..schedule import NoiseSchedule
from .run_folder import RunFolder
from .state import State, Task

# Options that a resumed run may change: they decide how long, where and with what records, not what is trained.
# `steps` and the learning rate's decay are among them so that a run can be prolonged, or brought to its end. `data` may name
# another folder, as the images themselves are compared. The data set's `preparation` is not compared, as older runs did not
# record it. Its shape is.
CHANGEABLE: Final = frozenset(
    {
        *("data", "data_dir", "data_memory", "skip_broken", "fingerprint", "preparation"),
        *("steps", "lr_decay", "lr_decay_steps", "micro_batch_size", "channels_last", "device", "threads"),
        *("log_every", "sample_every", "sample_steps", "checkpoint_every", "checkpoint_minutes", "keep", "tensorboard"),
    }
)
# Keys of a network's configuration that neither the weights nor the training depend on. Older runs have no names.
_DESCRIPTIVE: Final = frozenset({"sample_size", "class_names", "num_train_timesteps"})

_log = logging.getLogger("ddpm_fast")


def open_run(run: RunFolder, task: Task, state: State, resume: bool, data_check: str) -> dict[str, Any]:
    """Begin or continue the run in its folder. Return the content of config.json, and let the state be the run's."""
    options = task.options
    checkpoint = run.latest_checkpoint() if resume else None
    if resume and checkpoint is None and run.checkpoint_folders():  # it may be the disk: nothing is replaced
        raise InvalidValue("train", "", f"a whole checkpoint in {run.checkpoints}", "none that can be read")
    if resume and checkpoint is None and run.last_row():
        _log.warning("%s has no checkpoint yet: the run starts again from step 0, and its log too", run.path)
    if options.get("init") is not None and resume and checkpoint is None:
        state.load_weights(options["init"])
    config = task.config()
    with renaming("train"):  # an item may be wrong
        config["dataset"]["fingerprint"] = task.dataset.fingerprint(exact=data_check == "exact")
    if resume:
        _check_same(run, config, data_check)
        if checkpoint is not None:
            _warn_of_rounding(run, config)
        run.write_config(config)  # with the options that were changed
    else:
        run.create(config)
    run.checkpoints.mkdir(exist_ok=True)  # a run without this folder has lost it
    if checkpoint is not None:
        state.load(checkpoint)
    run.remove_leftovers()
    run.cut_log(state.step)
    if state.row is not None and run.last_row() < state.step:  # a full disk has ended the run before this row
        run.append_log(state.row)
    if run.last_row() == state.step:  # a full disk can end a run between the row and the end of the losses that it has
        state.losses.clear()
    state.row = None
    return config


def _warn_of_rounding(run: RunFolder, config: dict[str, Any]) -> None:
    """Warn if a resumed run sums its gradients in another order than before."""
    before = run.read_config()
    batch_size = before["options"]["batch_size"]
    for name, old, new in (
        ("threads", before.get("threads"), config["threads"]),
        # older runs had one micro-batch a step
        ("micro_batch_size", before["options"].get("micro_batch_size", batch_size), config["options"]["micro_batch_size"]),
    ):
        if old is not None and old != new:
            _log.warning(
                "%s was trained with %s %s and goes on with %s: gradients are summed in another order, so weights are equal up "
                "to rounding",
                *(run.path, name, old, new),
            )


def _check_same(run: RunFolder, config: dict[str, Any], data_check: str) -> None:
    """Refuse to resume a run as something else than it was started as. Complete the fingerprint of its data."""
    stored = run.read_config()
    before = {section: dict(stored[section]) for section in ("options", "dataset")}
    # `train` starts from other weights by `init`, and records no `ema_warmup`.
    before["options"].setdefault("ema_warmup", before["options"].get("init") is None)
    for section in ("options", "dataset"):
        for name, value in config[section].items():
            if name == "images" and data_check == "off":
                continue
            if name not in CHANGEABLE and before[section].get(name) != value:
                raise _other(run, name, before[section].get(name), value)
    networks = [UNetConfig.from_dict(each["unet"]).to_dict() for each in (stored, config)]
    for name in networks[0].keys() | networks[1].keys():
        old, new = (network.get(name) for network in networks)
        if name not in _DESCRIPTIVE and old != new:
            raise _other(run, "model", old, new, f"to have {name} =")
    old, new = (NoiseSchedule.from_config(each["schedule"]) for each in (stored, config))
    if not torch.equal(old.betas, new.betas):
        raise _other(run, "schedule", old, new)
    _check_images(run, stored, config, data_check)


def _other(run: RunFolder, name: str, before: object, now: object, verb: str = "to be") -> InvalidValue:
    """Return the error of a run that is resumed as another."""
    return InvalidValue("train", name, f"{verb} {before!r}, as the run in {run.path} was started", repr(now))


def _check_images(run: RunFolder, stored: dict[str, Any], config: dict[str, Any], data_check: str) -> None:
    """Compare the fingerprints of a resumed run's images, and complete them."""
    before, now = stored["dataset"].get("fingerprint", {}), config["dataset"]["fingerprint"]  # older runs have none
    if data_check != "off":
        names = [each["options"].get("data") for each in (stored, config)]  # a `Trainer` has none
        expect(
            before or os.path.abspath(str(names[0])) == os.path.abspath(str(names[1])),
            "train",
            "data",
            f"to be {names[0]!r}, as the run in {run.path} has no fingerprint of its images",
            f'{names[1]!r}; pass data_check="off" (--data-check off) to go on with them',
        )
        expect(
            all(before.get(kind, digest) == digest for kind, digest in now.items()),
            "train",
            "",
            f"the images that the run in {run.path} was started with",
            'others of the same number and size; pass data_check="off" (--data-check off) to go on with them',
        )
        config["dataset"]["fingerprint"] = before | now
