"""Upload a model to the Hugging Face hub, with a card that shows what it draws."""

from __future__ import annotations

import copy
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from .checks import check_type
from .errors import expect
from .files.images import save_grid, shown_channels
from .files.models import SCHEDULER, hub_errors, is_hub_name, model_folder
from .files.writing import read_json, write_text
from .options import checked
from .pretrained import Pretrained, load_folder
from .resources import import_extra
from .training.checkpoint import Checkpoints
from .training.export import export_checkpoint

_PICTURE: Final = "samples.png"
_RECORD: Final = "training.json"
_COPIED: Final = (*SCHEDULER, "model_index.json", _RECORD, "training_log.csv")
_REPLACED: Final = ["unet/*", *_COPIED, "plan.json", "config.json", "diffusion_pytorch_model.*", _PICTURE]
# Options of a training that its card shows.
_TOLD: Final = ("data", "prediction", "variance", "schedule", "steps", "batch_size", "lr", "ema_decay", "precision", "seed")

_CARD: Final = """---
{{ card_data }}
---
# {{ name.partition("/")[2] }}

A diffusion model of {{ size }}images{{ classes }}.
{%- if picture %}

![16 images that it draws]({{ picture }})
{%- endif %}

```python
import ddpm_fast

model = ddpm_fast.load_folder("{{ name }}")
{%- if reads %}
c = ...  # conditions, float [16, {{ reads }}, H, W]
{%- endif %}
images = model.sampler()(16{{ ", condition=c" if reads }})  # float, in [-1, 1]
ddpm_fast.save_grid(images, "samples.png")
```
{%- for title, rows in tables.items() if rows %}

## {{ title }}

| | |
|---|---|
{%- for key, value in rows.items() %}
| {{ quoted(key) }} | {{ quoted(value) }} |
{%- endfor %}
{%- endfor %}
"""


@checked()
def push_to_hub(
    path: str | os.PathLike[str],
    name: str,
    *,
    private: bool = False,
    license: str | None = None,
    evaluation: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str | None = None,
) -> str:
    """Upload a model to the Hugging Face hub, where `load_folder(name)` and diffusers find it.

    The repository is made if it is new. Otherwise its model and its README.md are replaced. Log in with `hf auth login`, or set
    HF_TOKEN.

    Args:
        path: A training run, which is exported, or a model's folder, or the name of another one on the hub.
        name: "owner/name".
        private: Make a new repository private.
        license: The license's name in the card, such as "mit". None: none is named.
        evaluation: A JSON file that `ddpm-fast evaluate` has written of this model, whose figures the card shows.
        dtype: Dtype of the weights in the file.
        device: Draws the card's picture. None: the CPU.

    Returns:
        The address of the upload.

    Raises:
        FileNotFoundError: There is no model.
        OSError: The hub refuses it or is out of reach.
        ImportError: huggingface_hub is missing.
        ValueError: `evaluation` has figures of another model.
    """
    for key, text in (("name", name), ("license", "" if license is None else license)):
        check_type(key, text, str)
    expect(is_hub_name(name), "name", "to be owner/name", repr(name))
    hub = import_extra("huggingface_hub", "hub")
    quality = {} if evaluation is None else read_json(Path(evaluation), dict)
    loaded, source = load_folder(path, device), model_folder("path", path)
    fits, of = evaluation is None or quality.get("weights") == loaded.digest(), quality.get("model")
    got = "those of images, not of a model" if of is None else f"those of {of!r}, with other weights"
    expect(fits, "evaluation", f"to have figures of {str(path)!r}", got)
    wanted, got = "to be a repository that you may write to", f"{name!r}: "
    with hub_errors("name", wanted, got):
        hub.HfApi().create_repo(name, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        if Checkpoints(source).path.is_dir():
            export_checkpoint(source, out, dtype)
        else:
            copy.deepcopy(loaded.model).to(dtype).save_pretrained(out / "unet")
            for file in filter(lambda each: (source / each).is_file(), _COPIED):
                (out / file).parent.mkdir(exist_ok=True)
                shutil.copy(source / file, out / file)
        if loaded.plan is not None:  # a fitted one belongs to the weights as they are written
            load_folder(out).save_plan(loaded.plan, out)
        if loaded.interface.shape is not None and not loaded.interface.condition.channels:
            images = loaded.sampler()(16).cpu()
            save_grid(images, out / _PICTURE, scale=max(1, 128 // images.shape[-1]), channels=shown_channels(images.shape[1]))
        about = hub.ModelCardData(
            library_name="diffusers" if (out / "model_index.json").is_file() else "ddpm_fast",
            pipeline_tag="unconditional-image-generation",
            tags=["ddpm_fast", "diffusion"],
            license=license,
        )
        write_text(out / "README.md", _card(loaded, out, name, about, quality))
        with hub_errors("name", wanted, got):
            commit = {"commit_message": "Upload a model of ddpm_fast", "delete_patterns": _REPLACED}
            return str(hub.HfApi().upload_folder(repo_id=name, folder_path=out, **commit).commit_url)


def _card(loaded: Pretrained, folder: Path, name: str, about: Any, quality: Mapping[str, Any]) -> str:
    """Return the text of README.md."""
    from huggingface_hub import ModelCard

    interface = loaded.interface
    trained = read_json(folder / _RECORD, dict) if (folder / _RECORD).is_file() else {}
    options = {**trained.get("options", {}), "prediction": loaded.objective.name, "variance": loaded.objective.variance}
    training = {key: options[key] for key in _TOLD if trained and options.get(key) is not None}
    shape, labels = interface.shape, interface.labels.about()
    card = ModelCard.from_template(
        about,
        template_str=_CARD,
        name=name,
        size="" if shape is None else f"{shape[2]}x{shape[1]} ",
        classes=f" of {_quoted(labels)}" * bool(labels),
        picture=_PICTURE * (folder / _PICTURE).is_file(),
        reads=interface.condition.channels,
        tables={"Training": training, "Quality": dict(_figures(quality))},
        quoted=_quoted,
    )
    return str(card)


def _quoted(value: object) -> str:
    """Return a text for a line or a table's cell of Markdown, in which nothing is markup."""
    return re.sub(r"([\\`*_${}\[\]<>()#!|~&])", r"\\\1", " ".join(str(value).split()))


def _figures(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the numbers of an evaluation by name, without those of each image, and no texts: they can be paths."""
    for key, value in values.items():
        if key in ("seed", "batch_size"):
            continue
        if isinstance(value, dict) and not key.startswith("per_"):
            yield from _figures(value, f"{prefix}{key} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + key, f"{value:.5g}"
