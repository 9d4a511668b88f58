"""Schemas of the JSON files that the package reads. A network's config.json has its schema in `UNetConfig`.

Only functions that read files import this module, so that `import ddpm_fast` needs no msgspec.
"""

from __future__ import annotations

import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import msgspec
from msgspec import Meta, Struct

from .checks import MAX_TIMESTEPS
from .nn.config import UNetConfig
from .plan import Prediction, Variance
from .schedule import NoiseSchedule

Finite = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
Size = Annotated[int, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]

T = TypeVar("T")


class Scheduler(Struct, frozen=True):
    """The scheduler_config.json of a scheduler of diffusers or of this package. Other keys are ignored."""

    num_train_timesteps: Annotated[int, Meta(ge=1, le=MAX_TIMESTEPS)] | None = None
    beta_schedule: str = "linear"
    beta_start: Finite | None = None
    beta_end: Finite | None = None
    trained_betas: Annotated[list[Finite], Meta(max_length=MAX_TIMESTEPS)] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: Prediction = "epsilon"
    variance_type: Variance | None = None  # DPM-Solver has null
    clip_sample: bool | None = True
    clip_sample_range: Annotated[float, Meta(gt=0, le=sys.float_info.max)] = 1.0
    thresholding: bool = False
    ddpm_fast: dict[str, Any] | None = None  # the schedule as `NoiseSchedule.from_config` checks it

    def __post_init__(self) -> None:
        if self.thresholding:
            raise ValueError("expected thresholding to be false, got true")


class Classes(Struct, frozen=True):
    """The classes.json that older folders have beside their network."""

    classes: list[str] = []

    def __post_init__(self) -> None:
        _check_names(self.classes)


class Options(Struct, frozen=True):
    """The options of a run that are read. `train` compares all of them with those that it is given, which it checks."""

    prediction: Prediction
    data: str | None = None
    init: str | None = None


class Fingerprint(Struct, frozen=True):
    """SHA-256 digests of a data set."""

    sample: Sha256 | None = None
    exact: Sha256 | None = None


class Dataset(Struct, frozen=True):
    """The description of a run's data set."""

    images: Count
    shape: Annotated[list[Count], Meta(min_length=3, max_length=3)]  # C, H, W
    classes: Annotated[list[str], Meta(min_length=1)]  # "" is a class without a name
    preparation: str = ""  # older runs have none
    fingerprint: Fingerprint = Fingerprint()

    def __post_init__(self) -> None:
        _check_names(self.classes)


class Run(Struct, frozen=True):
    """The config.json of a training run."""

    format: Literal[1, 2]
    options: Options
    unet: dict[str, Any]
    schedule: dict[str, Any]
    dataset: Dataset
    versions: dict[str, str] = {}

    def __post_init__(self) -> None:
        _check_nested("unet", self.unet, UNetConfig.from_dict)
        _check_nested("schedule", self.schedule, NoiseSchedule.from_config)


class StoredFile(Struct, frozen=True):
    """A file of a checkpoint."""

    size: Size
    sha256: Sha256


class Checkpoint(Struct, frozen=True):
    """The state.json of a checkpoint."""

    format: Literal[1, 2]
    step: Size
    files: dict[str, StoredFile | Size]  # format 1 has sizes alone
    seconds: Annotated[float, Meta(ge=0, le=sys.float_info.max)] = 0.0
    losses: list[Finite] = []
    row: list[int | Finite] | None = None  # a row that is not in log.csv yet

    def __post_init__(self) -> None:
        for name in self.files:
            if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or "\0" in name:
                raise ValueError(f"expected files to lie in the checkpoint's folder, got {name!r}")


class SampleManifest(Struct, frozen=True):
    """The manifest.json of images that `write_samples` has written."""

    format: Literal[1]
    kind: Literal["folder", "npz", "zip"]
    num_samples: Count
    shape: Annotated[list[Count], Meta(min_length=3, max_length=3)]  # C, H, W
    seed: int
    batch_size: Count
    guidance_scale: Finite | None
    dtype: str
    plan: Sha256
    weights: Sha256 | None
    labels: Sha256 | None


def _check_nested(field: str, values: Mapping[str, Any], parse: Callable[[Mapping[str, Any]], object]) -> None:
    """Raise a ValueError with the place of what `parse` refuses."""
    try:
        parse(values)
    except (TypeError, ValueError) as error:
        reason = re.sub(r"^[\w.]+: ", "", str(error))  # the function that found it
        wanted = reason.removeprefix("expected ")
        raise ValueError(f"{field}: {reason}" if wanted == reason else f"expected {field}.{wanted}") from error


def _check_names(names: list[str]) -> None:
    if len(set(names)) != len(names):
        raise ValueError(f"expected classes to be without repetitions, got {names}")


# ---------------------------------------------------------------------------------------------------------------- reading


def checked(values: Mapping[str, Any], kind: type[T]) -> T:
    """Return a file's values as a `kind`.

    Args:
        values: The object of a JSON file.
        kind: One of the classes above.

    Raises:
        ValueError: A field is missing, or has another type or a value out of range. The message names it.
    """
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        try:
            text = _explained(str(error), values, kind)
        except (LookupError, TypeError, ValueError):  # a version with other words, which the tests do not know
            text = str(error)
        raise ValueError(text) from error


_WORDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


def _explained(message: str, values: Any, kind: Any) -> str:
    """Return msgspec's message in this package's form: the field, the expected value and the given one.

    msgspec has no other form of its errors. tests/test_schemas.py has every message that the schemas can give.
    """
    message, _, place = message.partition(" - at `$")
    field = place.rstrip("`").lstrip(".")
    if missing := re.fullmatch("Object missing required field `(.*)`", message):
        return f"expected {field}{'.' if field else ''}{missing[1]} to be given, got none"
    known, unknown, _ = field.partition("[...]")  # msgspec does not name the key of a dict
    keys = re.findall(r"[^.\[\]]+", known)
    for key in keys:
        values = values[int(key) if isinstance(values, list) else key]
    if message.startswith("Expected "):
        wanted, _, got = message.removeprefix("Expected ").partition(", got ")
        wanted = re.sub("`([a-z |]+)`", lambda match: " or ".join(_WORDS[word] for word in match[1].split(" | ")), wanted)
        wanted = re.sub(rf" [<>]= -?{re.escape(str(sys.float_info.max))}", " that is finite", wanted)
        wanted = wanted.replace("matching regex '^[0-9a-f]{64}$'", "of 64 hexadecimal digits")
    elif message.startswith("Invalid enum value"):
        for key in keys:
            kind = get_type_hints(kind)[key]
        choices = [choice for part in get_args(kind) for choice in get_args(part) or [part] if choice is not type(None)]
        wanted, got = " or ".join(map(str, choices)), ""
    elif message == "Number out of range":
        wanted, got = "a number that is finite", ""
    else:
        return message  # from a schema's __post_init__
    return f"expected {field} to be {wanted}, got {got.replace('`', '') if unknown and got else reprlib.repr(values)}"
