"""Schemas of JSON files: each field with a value that it cannot have, and files of older versions."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ddpm_fast.checks import MAX_TIMESTEPS
from ddpm_fast.nn import UNetConfig
from ddpm_fast.schedule import NoiseSchedule, Objective

msgspec = pytest.importorskip("msgspec")

from ddpm_fast.schemas import Checkpoint, RunConfig, SampleManifest, Scheduler  # noqa: E402

SHA256 = "0123456789abcdef" * 4
FILES: dict[type, dict[str, Any]] = {
    Scheduler: {"num_train_timesteps": 5, "beta_start": 1e-4, "trained_betas": [0.1, 0.2], "_ddpm_fast": {"name": "linear"}},
    RunConfig: {
        "format": 3,
        "starter": "train",
        "options": {"prediction": "epsilon"},
        "unet": UNetConfig().to_dict(),
        "objective": Objective(NoiseSchedule.linear(5)).to_config(),
        "dataset": {
            **{"images": 3, "shape": [1, 8, 8], "classes": ["cat", "dog"]},
            **{"preparation": "not resized", "fingerprint": {"sample": SHA256}},
        },
        "threads": 2,
        "versions": {"torch": "2.13"},
    },
    Checkpoint: {
        "step": 3,
        "files": {"a": {"size": 1, "sha256": SHA256}},
        "seconds": 0.5,
        "losses": [0.5],
        "row": [3, 0.5],
        "sha256": SHA256,
    },
    SampleManifest: {
        "format": 1,
        "kind": "folder",
        "num_samples": 10,
        "shape": [3, 8, 8],
        "seed": -1,
        "batch_size": 4,
        "guidance_scale": None,
        "dtype": "float32",
        "plan": SHA256,
        "weights": None,
        "labels": None,
    },
}
MISSING = object()


def changed(values: dict[str, Any], field: str, value: object) -> dict[str, Any]:
    """Return values with another one in a field, whose path has dots, or without it."""
    name, _, rest = field.partition(".")
    new = values | {name: changed(values[name], rest, value) if rest else value}
    return {name: each for name, each in new.items() if each is not MISSING}


@pytest.mark.parametrize(
    ("kind", "field", "value", "wanted"),
    [
        (Scheduler, "num_train_timesteps", "x", "Expected `int | null`, got `str` - at `$.num_train_timesteps`"),
        (Scheduler, "num_train_timesteps", 10.5, "Expected `int | null`, got `float` - at `$.num_train_timesteps`"),
        (Scheduler, "num_train_timesteps", 0, "Expected `int` >= 1 - at `$.num_train_timesteps`"),
        (Scheduler, "num_train_timesteps", 10**6, "Expected `int` <= 100000 - at `$.num_train_timesteps`"),
        (Scheduler, "num_train_timesteps", 10**30, "Expected `int` <= 100000 - at `$.num_train_timesteps`"),
        (Scheduler, "beta_start", "x", "Expected `float | null`, got `str` - at `$.beta_start`"),
        (Scheduler, "beta_start", float("nan"), "Expected `float` >= -1.7976931348623157e+308 - at `$.beta_start`"),
        (Scheduler, "beta_end", float("inf"), "Expected `float` <= 1.7976931348623157e+308 - at `$.beta_end`"),
        (Scheduler, "beta_end", 10**400, "Number out of range - at `$.beta_end`"),
        (Scheduler, "beta_schedule", [], "Expected `str`, got `array` - at `$.beta_schedule`"),
        (Scheduler, "trained_betas", "x", "Expected `array | null`, got `str` - at `$.trained_betas`"),
        (Scheduler, "trained_betas", [0.1, None], "Expected `float`, got `null` - at `$.trained_betas[1]`"),
        (
            Scheduler,
            "trained_betas",
            [0.1] * (MAX_TIMESTEPS + 1),
            "Expected `array` of length <= 100000 - at `$.trained_betas`",
        ),
        (Scheduler, "rescale_betas_zero_snr", 1, "Expected `bool`, got `int` - at `$.rescale_betas_zero_snr`"),
        (
            Scheduler,
            "prediction_type",
            "noise",
            "Invalid enum value 'noise' - at `$.prediction_type`",
        ),
        (Scheduler, "prediction_type", None, "Expected `str | array`, got `null` - at `$.prediction_type`"),
        (Scheduler, "variance_type", "x", "Invalid enum value 'x' - at `$.variance_type`"),
        (Scheduler, "clip_sample", "false", "Expected `bool | null`, got `str` - at `$.clip_sample`"),
        (Scheduler, "clip_sample_range", None, "Expected `float`, got `null` - at `$.clip_sample_range`"),
        (Scheduler, "clip_sample_range", 0, "Expected `float` > 0.0 - at `$.clip_sample_range`"),
        (
            Scheduler,
            "clip_sample_range",
            float("inf"),
            "<= 1.7976931348623157e+308 - at `$.clip_sample_range`",
        ),
        (Scheduler, "thresholding", True, "thresholding to be false, got true"),
        (Scheduler, "_ddpm_fast", ["linear"], "Expected `object | null`, got `array` - at `$._ddpm_fast`"),
        (RunConfig, "options", None, "Expected `object`, got `null` - at `$.options`"),
        (RunConfig, "unet.freq_shift", None, "freq_shift to be an integer of at least 0, got None"),
        (RunConfig, "unet.colour", "red", "keys among sample_size, in_channels, "),
        (RunConfig, "objective", MISSING, "Object missing required field `objective`"),
        (RunConfig, "objective.gamma", MISSING, "the keys schedule, prediction, variance, loss_weight, gamma, got schedule, "),
        (
            RunConfig,
            "objective.prediction",
            "noise",
            "objective.prediction to be one of epsilon, sample, v_prediction, flow, got 'noise'",
        ),
        (RunConfig, "objective.prediction", [[0, 1], 2], "objective.prediction to be a name, or T pairs of numbers, got: "),
        (
            RunConfig,
            "objective.prediction",
            [[0, 1]],
            "objective.prediction to be a name, or two columns of shape [5, 2], got [1, 2]",
        ),
        (RunConfig, "objective.schedule.name", "x", "name to be one of linear, "),
        (RunConfig, "objective.schedule.num_timesteps", "x", "num_timesteps to be an integer in 1..100000, got 'x'"),
        (
            RunConfig,
            "objective.schedule.beta",
            1,
            "the arguments of linear to be among num_timesteps, beta_start, beta_end, scale",
        ),
        (RunConfig, "dataset", [], "Expected `object`, got `array` - at `$.dataset`"),
        (RunConfig, "dataset.images", 0, "Expected `int` >= 1 - at `$.dataset.images`"),
        (RunConfig, "dataset.shape", [1], "Expected `array` of length >= 2 - at `$.dataset.shape`"),
        (RunConfig, "dataset.shape", [1, 8, 0], "Expected `int` >= 1 - at `$.dataset.shape[2]`"),
        (RunConfig, "dataset.classes", [], "Expected `array` of length >= 1 - at `$.dataset.classes`"),
        (RunConfig, "dataset.fingerprint", "x", "Expected `object`, got `str` - at `$.dataset.fingerprint`"),
        (
            RunConfig,
            "dataset.fingerprint.sample",
            "x",
            "Expected `str` matching regex",
        ),
        (RunConfig, "versions.torch", 2, "Expected `str`, got `int` - at `$.versions[...]`"),
        (Checkpoint, "step", -1, "Expected `int` >= 0 - at `$.step`"),
        (Checkpoint, "step", True, "Expected `int`, got `bool` - at `$.step`"),
        (Checkpoint, "files", [], "Expected `object`, got `array` - at `$.files`"),
        (Checkpoint, "files.a", "x", "Expected `object`, got `str` - at `$.files[...]`"),
        (Checkpoint, "files.a.size", None, "Expected `int`, got `null` - at `$.files[...].size`"),
        (Checkpoint, "files.a.sha256", "x", "Expected `str` matching regex '^[0-9a-f]{64}$' - at `$.files[...].sha256`"),
        (Checkpoint, "files.a.sha256", MISSING, "Object missing required field `sha256` - at `$.files[...]`"),
        (Checkpoint, "files", {"../a": {"size": 1, "sha256": SHA256}}, "files to lie in the checkpoint's folder, got '../a'"),
        (
            Checkpoint,
            "files",
            {"/dev/zero": {"size": 1, "sha256": SHA256}},
            "files to lie in the checkpoint's folder, got '/dev/zero'",
        ),
        (Checkpoint, "seconds", float("nan"), "Expected `float` >= 0.0 - at `$.seconds`"),
        (Checkpoint, "losses", [1.0, float("inf")], "Expected `float` <= 1.7976931348623157e+308 - at `$.losses[1]`"),
        (Checkpoint, "losses", {"a": 1}, "Expected `array`, got `object` - at `$.losses`"),
        (Checkpoint, "row", [1, "2"], "Expected `int | float`, got `str` - at `$.row[1]`"),
        (SampleManifest, "format", 2, "Invalid enum value 2 - at `$.format`"),
        (SampleManifest, "kind", "tar", "Invalid enum value 'tar' - at `$.kind`"),
        (SampleManifest, "num_samples", 0, "Expected `int` >= 1 - at `$.num_samples`"),
        (SampleManifest, "shape", [3, 8], "Expected `array` of length >= 3 - at `$.shape`"),
        (SampleManifest, "seed", None, "Expected `int`, got `null` - at `$.seed`"),
        (SampleManifest, "batch_size", MISSING, "Object missing required field `batch_size`"),
        (SampleManifest, "guidance_scale", "x", "Expected `float | null`, got `str` - at `$.guidance_scale`"),
        (SampleManifest, "dtype", 32, "Expected `str`, got `int` - at `$.dtype`"),
        (SampleManifest, "plan", None, "Expected `str`, got `null` - at `$.plan`"),
        (SampleManifest, "weights", "x", "Expected `str` matching regex '^[0-9a-f]{64}$' - at `$.weights`"),
        (SampleManifest, "labels", 1, "Expected `str | null`, got `int` - at `$.labels`"),
    ],
)
def test_a_wrong_value_is_named_with_the_wanted_one(kind: type, field: str, value: object, wanted: str) -> None:
    msgspec.convert(FILES[kind], kind)
    with pytest.raises(msgspec.ValidationError, match=re.escape(wanted)):
        msgspec.convert(changed(FILES[kind], field, value), kind)
