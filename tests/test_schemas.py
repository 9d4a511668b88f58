"""Schemas of JSON files: each field with a value that it cannot have, and files of older versions."""

from __future__ import annotations

import copy
import re
from typing import Any

import msgspec
import pytest

from ddpm_fast.nn import UNetConfig
from ddpm_fast.schedule import MAX_TIMESTEPS
from ddpm_fast.schemas import Checkpoint, Classes, Run, SampleManifest, Scheduler, checked

SHA256 = "0123456789abcdef" * 4
FILES: dict[type, dict[str, Any]] = {
    Scheduler: {"num_train_timesteps": 5, "beta_start": 1e-4, "trained_betas": [0.1, 0.2], "ddpm_fast": {"name": "linear"}},
    Classes: {"classes": ["cat", "dog"]},
    Run: {
        "format": 1,
        "options": {"prediction": "epsilon", "data": "digits", "init": None, "lr": 1e-3},
        "unet": UNetConfig().to_dict(),
        "schedule": {"name": "linear", "num_timesteps": 5},
        "dataset": {"images": 3, "shape": [1, 8, 8], "classes": ["cat", "dog"], "fingerprint": {"sample": SHA256}},
        "versions": {"torch": "2.13"},
    },
    Checkpoint: {
        "format": 2,
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


def changed(kind: type, field: str, value: object) -> dict[str, Any]:
    values = copy.deepcopy(FILES[kind])
    *outer, key = field.split(".")
    holder = values
    for name in outer:
        holder = holder[name]
    if value is MISSING:
        del holder[key]
    else:
        holder[key] = value
    return values


@pytest.mark.parametrize(
    ("kind", "field", "value", "wanted"),
    [
        (Scheduler, "num_train_timesteps", "x", "num_train_timesteps to be an integer or null, got 'x'"),
        (Scheduler, "num_train_timesteps", 10.5, "num_train_timesteps to be an integer or null, got 10.5"),
        (Scheduler, "num_train_timesteps", 0, "num_train_timesteps to be an integer >= 1, got 0"),
        (Scheduler, "num_train_timesteps", 10**6, f"num_train_timesteps to be an integer <= {MAX_TIMESTEPS}, got 1000000"),
        (Scheduler, "num_train_timesteps", 10**30, f"num_train_timesteps to be an integer <= {MAX_TIMESTEPS}, got 1000000"),
        (Scheduler, "beta_start", "x", "beta_start to be a number or null, got 'x'"),
        (Scheduler, "beta_start", float("nan"), "beta_start to be a number that is finite, got nan"),
        (Scheduler, "beta_end", float("inf"), "beta_end to be a number that is finite, got inf"),
        (Scheduler, "beta_end", 10**400, "beta_end to be a number that is finite, got 1000"),
        (Scheduler, "beta_schedule", [], "beta_schedule to be a string, got []"),
        (Scheduler, "trained_betas", "x", "trained_betas to be a list or null, got 'x'"),
        (Scheduler, "trained_betas", [0.1, None], "trained_betas[1] to be a number, got None"),
        (
            Scheduler,
            "trained_betas",
            [0.1] * (MAX_TIMESTEPS + 1),
            f"trained_betas to be a list of length <= {MAX_TIMESTEPS}, got",
        ),
        (Scheduler, "rescale_betas_zero_snr", 1, "rescale_betas_zero_snr to be true or false, got 1"),
        (
            Scheduler,
            "prediction_type",
            "noise",
            "prediction_type to be epsilon or sample or v_prediction or previous_sample, got",
        ),
        (Scheduler, "prediction_type", None, "prediction_type to be a string, got None"),
        (Scheduler, "variance_type", "x", "variance_type to be fixed_small or fixed_small_log or fixed_large or"),
        (Scheduler, "clip_sample", "false", "clip_sample to be true or false or null, got 'false'"),
        (Scheduler, "clip_sample_range", None, "clip_sample_range to be a number, got None"),
        (Scheduler, "clip_sample_range", 0, "clip_sample_range to be a number > 0.0, got 0"),
        (Scheduler, "clip_sample_range", float("inf"), "clip_sample_range to be a number that is finite, got inf"),
        (Scheduler, "thresholding", True, "thresholding to be false, got true"),
        (Scheduler, "ddpm_fast", ["linear"], "ddpm_fast to be an object or null, got ['linear']"),
        (Classes, "classes", None, "classes to be a list, got None"),
        (Classes, "classes", ["cat", 1], "classes[1] to be a string, got 1"),
        (Classes, "classes", ["cat", "cat"], "classes to be without repetitions, got ['cat', 'cat']"),
        (Run, "format", 3, "format to be 1 or 2, got 3"),
        (Run, "format", MISSING, "format to be given, got none"),
        (Run, "options", None, "options to be an object, got None"),
        (Run, "options.prediction", MISSING, "options.prediction to be given, got none"),
        (Run, "options.prediction", "noise", "options.prediction to be epsilon or sample or"),
        (Run, "options.data", 3, "options.data to be a string or null, got 3"),
        (Run, "unet.freq_shift", None, "freq_shift to be an integer of at least 0, got None"),
        (Run, "unet.colour", "red", "unknown configuration key 'colour'"),
        (Run, "schedule", MISSING, "schedule to be given, got none"),
        (Run, "schedule.name", "x", "name to be one of linear, "),
        (Run, "schedule.num_timesteps", "x", "num_timesteps to be an integer in 1..100000, got 'x'"),
        (Run, "schedule.beta", 1, "the arguments of linear to be among num_timesteps, beta_start, beta_end, scale"),
        (Run, "dataset", [], "dataset to be an object, got []"),
        (Run, "dataset.images", 0, "dataset.images to be an integer >= 1, got 0"),
        (Run, "dataset.shape", [1, 8], "dataset.shape to be a list of length >= 3, got [1, 8]"),
        (Run, "dataset.shape", [1, 8, 0], "dataset.shape[2] to be an integer >= 1, got 0"),
        (Run, "dataset.classes", [], "dataset.classes to be a list of length >= 1, got []"),
        (Run, "dataset.fingerprint", "x", "dataset.fingerprint to be an object, got 'x'"),
        (Run, "dataset.fingerprint.sample", "x", "dataset.fingerprint.sample to be a string of 64 hexadecimal digits, got 'x'"),
        (Run, "versions.torch", 2, "versions[...] to be a string, got int"),
        (Checkpoint, "format", 3, "format to be 1 or 2, got 3"),
        (Checkpoint, "step", -1, "step to be an integer >= 0, got -1"),
        (Checkpoint, "step", True, "step to be an integer, got True"),
        (Checkpoint, "files", [], "files to be an object, got []"),
        (Checkpoint, "files.a", "x", "files[...] to be an integer or an object, got str"),
        (Checkpoint, "files.a.size", None, "files[...].size to be an integer, got null"),
        (Checkpoint, "files.a.sha256", "x", "files[...].sha256 to be a string of 64 hexadecimal digits, got {'a': "),
        (Checkpoint, "files.a.sha256", MISSING, "files[...].sha256 to be given, got none"),
        (Checkpoint, "files", {"../a": 1}, "files to lie in the checkpoint's folder, got '../a'"),
        (Checkpoint, "files", {"/dev/zero": 0}, "files to lie in the checkpoint's folder, got '/dev/zero'"),
        (Checkpoint, "seconds", float("nan"), "seconds to be a number >= 0.0, got nan"),
        (Checkpoint, "losses", [1.0, float("inf")], "losses[1] to be a number that is finite, got inf"),
        (Checkpoint, "losses", {"a": 1}, "losses to be a list, got {'a': 1}"),
        (Checkpoint, "row", [1, "2"], "row[1] to be an integer or a number, got '2'"),
        (SampleManifest, "format", 2, "format to be 1, got 2"),
        (SampleManifest, "kind", "tar", "kind to be folder or npz or zip, got 'tar'"),
        (SampleManifest, "num_samples", 0, "num_samples to be an integer >= 1, got 0"),
        (SampleManifest, "shape", [3, 8], "shape to be a list of length >= 3, got [3, 8]"),
        (SampleManifest, "seed", None, "seed to be an integer, got None"),
        (SampleManifest, "batch_size", MISSING, "batch_size to be given, got none"),
        (SampleManifest, "guidance_scale", "x", "guidance_scale to be a number or null, got 'x'"),
        (SampleManifest, "dtype", 32, "dtype to be a string, got 32"),
        (SampleManifest, "plan", None, "plan to be a string, got None"),
        (SampleManifest, "weights", "x", "weights to be a string of 64 hexadecimal digits, got 'x'"),
        (SampleManifest, "labels", 1, "labels to be a string or null, got 1"),
    ],
)
def test_a_wrong_value_is_named_with_the_wanted_one(kind: type, field: str, value: object, wanted: str) -> None:
    checked(FILES[kind], kind)
    with pytest.raises(ValueError, match=re.escape(wanted)):
        checked(changed(kind, field, value), kind)


def test_fields_that_older_files_lack_have_values() -> None:
    assert checked({}, Scheduler).prediction_type == "epsilon"
    assert checked({}, Classes).classes == []
    assert checked({"format": 1, "step": 3, "files": {"a": 5}}, Checkpoint).files == {"a": 5}
    values = changed(Run, "dataset.fingerprint", MISSING)
    del values["versions"]
    assert checked(values, Run).dataset.fingerprint.sample is None


def test_keys_of_diffusers_schedulers_are_ignored() -> None:
    more = {"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -float("inf"), "variance_type": None}
    assert checked({**FILES[Scheduler], **more}, Scheduler).num_train_timesteps == 5


@pytest.mark.parametrize(
    "message",
    [
        "Expected `integer`, got `text` - at `$.step`",
        "Expected `int`, got `str` - at `$.step.deeper`",
        "Expected `int`, got `str` - at `$.losses[first]`",
        "Invalid enum value 3 - at `$.unknown`",
        "Wrong",
    ],
)
def test_a_message_in_other_words_is_shown_as_it_is(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(*_: object) -> None:
        raise msgspec.ValidationError(message)

    monkeypatch.setattr(msgspec, "convert", convert)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        checked(FILES[Checkpoint], Checkpoint)
