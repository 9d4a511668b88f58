"""Upload a model to the Hugging Face hub, with a card that shows what it draws."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from .checks import check_type
from .errors import expect
from .files.images import save_grid, shown_channels
from .files.models import hub_errors, is_hub_name
from .files.writing import read_json, write_text
from .options import checked
from .pretrained import Pretrained, load_folder
from .resources import import_extra
from .training.checkpoint import Checkpoints
from .training.export import export_checkpoint

_PICTURE: Final = "samples.png"
_PARTS: Final = ("unet", "scheduler", "config.json", "diffusion_pytorch_model.safetensors", "scheduler_config.json")
_RECORDS: Final = ("model_index.json", "plan.json", "training.json", "training_log.csv")

_CARD: Final = """---
{metadata}
---
# {title}

A diffusion model that draws {images}, trained with ddpm_fast.
{picture}
```python
import ddpm_fast

model = ddpm_fast.load_folder("{name}")
images = model.sampler()(16{arguments})  # float [16, C, H, W] in [-1, 1]
ddpm_fast.save_grid(images, "samples.png")
```
{tables}"""


@checked()
def push_to_hub(
    path: str | os.PathLike[str],
    name: str,
    *,
    private: bool = False,
    license: str | None = None,
    evaluation: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> str:
    """Upload a model to the Hugging Face hub, where `load_folder(name)` and diffusers find it.

    The repository is made if it is new. Log in with `hf auth login`, or set HF_TOKEN.

    Args:
        path: A training run, which is exported, or a model's folder.
        name: "owner/name".
        private: Make a new repository private.
        license: The license's name in the card, such as "mit". None: none is named.
        evaluation: A JSON file that `ddpm-fast evaluate` has written, for the card.
        dtype: Dtype of a run's weights in the file. A folder's weights stay as they are.

    Returns:
        The address of the upload.

    Raises:
        FileNotFoundError: There is no model.
        OSError: The hub refuses it or is out of reach.
        ImportError: huggingface_hub is missing.
    """
    for key, text in (("name", name), ("license", "" if license is None else license)):
        check_type("push_to_hub", key, text, str)
    expect(is_hub_name(name), "push_to_hub", "name", "to be owner/name", repr(name))
    hub, source = import_extra("huggingface_hub", "hub"), Path(path)
    quality = {} if evaluation is None else read_json("push_to_hub", Path(evaluation), dict)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        if Checkpoints(source).path.is_dir():
            export_checkpoint(source, out, dtype)
        else:
            load_folder(source)
            for part in (source / each for each in (*_PARTS, *_RECORDS)):
                if part.is_dir():
                    shutil.copytree(part, out / part.name)
                elif part.is_file():
                    shutil.copy(part, out)
        loaded = load_folder(out)
        if not loaded.interface.condition_channels:
            images = loaded.sampler()(16)
            save_grid(images, out / _PICTURE, scale=max(1, 128 // images.shape[-1]), channels=shown_channels(images.shape[1]))
        write_text(out / "README.md", _card(loaded, out, name, license, quality))
        with hub_errors("push_to_hub", "name", name):
            api = hub.HfApi()
            api.create_repo(name, private=private, exist_ok=True)
            uploaded = api.upload_folder(repo_id=name, folder_path=out, commit_message="Upload a model of ddpm_fast")
    return str(uploaded.commit_url)


def _card(loaded: Pretrained, folder: Path, name: str, license: str | None, quality: Mapping[str, Any]) -> str:
    """Return the text of README.md."""
    interface = loaded.interface
    metadata = {
        "library_name": "diffusers" if (folder / "model_index.json").is_file() else "ddpm_fast",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["ddpm_fast", "diffusion"],
    } | ({} if license is None else {"license": license})
    reads = interface.condition_channels
    channels, height, width = interface.shape or ("any", "any", "any")
    record = folder / "training.json"
    trained = json.loads(record.read_text()) if record.is_file() else {}
    options = {key: value for key, value in trained.get("options", {}).items() if value not in (None, [])}
    options = {"prediction": loaded.objective.name, **options, **{key: trained[key] for key in ("step",) if key in trained}}
    tables = {"Training": options, "Quality": dict(_figures(quality))}
    return _CARD.format(
        metadata="\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items()),
        title=name.partition("/")[2],
        images=f"images of {width}x{height} pixels in {channels} channel{'s' * (channels != 1)}"
        + (f", of {len(interface.class_names)} classes: {', '.join(interface.class_names)}" if interface.class_names else ""),
        picture="" if reads else f"\n![16 images that it draws]({_PICTURE})\n",
        name=name,
        arguments=f", condition=given  # float [16, {reads}, H, W]" if reads else "",
        tables="".join(
            f"\n## {title}\n\n| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in rows.items())
            for title, rows in tables.items()
            if rows
        ),
    )


def _figures(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the numbers and texts of an evaluation by name, without those of each image."""
    for key, value in values.items():
        if isinstance(value, dict) and not key.startswith("per_"):
            yield from _figures(value, f"{prefix}{key} ")
        elif isinstance(value, str | int | float):
            yield prefix + key, f"{value:.5g}" if isinstance(value, float) else str(value)
