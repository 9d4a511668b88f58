"""Images on disk: what is written is what was drawn."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from ddpm_fast import image_grid, save_grid, save_trajectory, to_uint8
from ddpm_fast.data.items import to_unit_range
from ddpm_fast.errors import ArgumentError
from ddpm_fast.files.images import evenly_spaced, grid_shape, image_format


def levels(*shape: int) -> torch.Tensor:
    """Every grey level in turn, in the range of the model."""
    numel = torch.Size(shape).numel()
    return to_unit_range((torch.arange(numel) % 256).to(torch.uint8)).reshape(shape)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_to_uint8_inverts_the_range_of_training_and_saturates(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8)
    if dtype != torch.bfloat16:  # 8 bits of mantissa cannot tell all levels apart
        assert torch.equal(to_uint8(to_unit_range(every, dtype)), every)
    assert to_uint8(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0], dtype=dtype)).tolist() == [0, 0, 128, 255, 255]


def test_image_grid_puts_every_image_in_its_place() -> None:
    images = levels(5, 3, 4, 6)
    expected = torch.full((2 * (8 + 1) + 1, 3 * (12 + 1) + 1, 3), 7, dtype=torch.uint8)
    left_over = torch.full((1, 3, 4, 6), 128, dtype=torch.uint8)  # the sixth cell of five images
    for i, image in enumerate(torch.cat([to_uint8(images), left_over])):
        y, x = 1 + i // 3 * 9, 1 + i % 3 * 13
        expected[y : y + 8, x : x + 12] = image.permute(1, 2, 0).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(image_grid(images, columns=3, padding=1, scale=2, background=7), expected)


@pytest.mark.parametrize(
    ("n", "shape"), [(1, (1, 1)), (3, (1, 3)), (4, (2, 2)), (7, (3, 3)), (8, (2, 4)), (10, (2, 5)), (16, (4, 4)), (24, (4, 6))]
)
def test_default_grids_are_full_or_nearly_square(n: int, shape: tuple[int, int]) -> None:
    assert image_grid(levels(n, 1, 2, 2), padding=0).shape == (2 * shape[0], 2 * shape[1], 1)


def test_one_image_has_no_frame() -> None:
    image = levels(1, 1, 3, 4)
    assert torch.equal(image_grid(image)[..., 0], to_uint8(image)[0, 0])
    assert image_grid(image, padding=2).shape == (7, 8, 1)
    assert image_grid(levels(2, 1, 3, 4)).shape == (7, 14, 1)


def test_the_shape_of_a_grid_is_known_before_it_is_drawn() -> None:
    for n in (1, 2, 5, 8, 12):
        for options in ({}, {"columns": 3, "padding": 0, "scale": 4}, {"columns": 50}):
            images = levels(n, 3, 4, 6)
            assert grid_shape(images.shape, **options) == tuple(image_grid(images, **options).shape)
    height, width, _ = grid_shape((10**12 + 39, 1, 1, 1), padding=0)  # a prime: no grid is full
    assert (height, width) == (10**6, 10**6 + 1)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    "ending", ["xbm", "palm", "msp", "h5", "blp", "grib", "ico", "icns", "qoi", "jpg", "pcx", "eps", "png"]
)
def test_a_format_is_accepted_exactly_if_pillow_can_write_it(ending: str, channels: int, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    try:
        Image.new(mode, (40, 30)).save(path)
    except Exception:
        writable = False
    else:
        writable = ending not in ("ico", "icns")  # they lose pixels
        path.unlink()
    images = levels(1, channels, 4, 4)
    if writable:
        assert save_grid(images, path).stat().st_size
        assert image_format(path, (40, 30, channels))
    else:
        wanted = f"to end in .png, .webp, .gif, .jpg or as another format for pictures of mode {mode}, got"
        with pytest.raises(ValueError, match=f"^save_grid: expected path {re.escape(wanted)}"):
            save_grid(images, path)
        with pytest.raises(ValueError, match=f"^expected --out {re.escape(wanted)}"):
            image_format(path, (40, 30, channels), "--out")
        assert not path.exists()


@pytest.mark.parametrize(("ending", "largest"), [("jpg", 65500), ("webp", 16383), ("gif", 65535)])
def test_pictures_too_large_for_a_format_are_refused(ending: str, largest: int, tmp_path: Path) -> None:
    assert image_format(f"a.{ending}", (1, largest, 1))
    Image.new("L", (largest, 1)).save(tmp_path / f"a.{ending}")
    wanted = rf"expected --out to end in \.png, as pictures in \w+ have at most {largest} pixels per side, got 'a\.{ending}'"
    with pytest.raises(ValueError, match=wanted):
        image_format(f"a.{ending}", (largest + 1, 1, 3), "--out")
    with pytest.raises((OSError, ValueError, OverflowError, struct.error)):  # Pillow's own limit
        Image.new("L", (largest + 1, 1)).save(tmp_path / f"a.{ending}")


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_save_grid_writes_the_grid_without_loss(tmp_path: Path, channels: int) -> None:
    images = levels(4, channels, 5, 5)
    path = save_grid(images, tmp_path / "new" / "grid.PNG", columns=2, padding=3, scale=2)
    grid = image_grid(images, columns=2, padding=3, scale=2).numpy()
    assert np.array_equal(read(path), grid[..., 0] if channels == 1 else grid)


def test_save_grid_shows_the_chosen_channels(tmp_path: Path) -> None:
    images = levels(1, 5, 2, 2)
    assert np.array_equal(read(save_grid(images, tmp_path / "a.png", channels=[3], scale=1)), to_uint8(images[0, 3]))


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_save_trajectory_animates_and_rests_on_the_last_frame(tmp_path: Path, ending: str) -> None:
    trajectory = torch.linspace(-1, 1, 8).reshape(8, 1, 1, 1, 1).expand(8, 3, 1, 16, 16)
    path = save_trajectory(trajectory, tmp_path / f"way.{ending}", frames=5, seconds=2.0, columns=3, padding=0)
    with Image.open(path) as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (5, (48, 16), 0)
        frames = [(frame.convert("L").getpixel((8, 8)), frame.info["duration"]) for frame in ImageSequence.Iterator(image)]
    shown, durations = zip(*frames, strict=True)
    expected = to_uint8(trajectory[evenly_spaced(8, 5), 0, 0, 8, 8]).tolist()
    assert shown == pytest.approx(expected, abs=3)  # WebP is lossy
    assert durations == pytest.approx([400] * 4 + [400 + 667], abs=10)  # GIF counts hundredths of a second


def test_save_trajectory_draws_a_strip_with_a_row_an_image(tmp_path: Path) -> None:
    trajectory = levels(31, 2, 3, 4, 4)
    strip = read(save_trajectory(trajectory, tmp_path / "strip.png", padding=0))
    frames = to_uint8(trajectory[::3].flatten(0, 1)).unflatten(0, (11, 2))
    assert np.array_equal(strip, frames.permute(1, 3, 0, 4, 2).reshape(2 * 4, 11 * 4, 3))


def test_evenly_spaced_has_both_ends() -> None:
    for (total, count), expected in {(11, 6): [0, 2, 4, 6, 8, 10], (3, 10): [0, 1, 2], (1, 5): [0], (7, 1): [6]}.items():
        assert evenly_spaced(total, count) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: save_grid(to_uint8(levels(1, 1, 2, 2)), p / "a.png"), r"images to be float32, .*, got torch\.uint8$"),
        (lambda p: save_grid(levels(1, 1, 2, 2), p / "a.xyz"), r"save_grid: expected path to end in .*got '.*a\.xyz'"),
        (lambda p: save_grid(levels(1, 1, 2, 2), p / "a"), "expected path to end in"),
        (
            lambda p: save_grid(levels(1, 2, 2, 2), p / "a.png"),
            r"save_grid: expected images .* got torch.float32 \[1, 2, 2, 2\]",
        ),
        (lambda p: save_grid(levels(1, 5, 2, 2), p / "a.png"), "or choose channels"),
        (
            lambda p: save_grid(levels(1, 5, 2, 2), p / "a.png", channels=[5]),
            r"save_grid: expected channels to be those of images, \[1, 5, 2, 2\], got \[5\]$",
        ),
        *(
            (
                lambda p, titles=titles: save_grid(levels(4, 1, 2, 2), p / "a.png", columns=2, titles=titles),
                f"save_grid: expected titles to be 2, one for each column, or none, got {len(titles)}$",
            )
            for titles in (["a"], ["a", "b", "c"])
        ),
        (lambda p: save_grid(levels(1, 2, 2), p / "a.png"), "save_grid: expected images"),
        (lambda p: save_grid(levels(0, 1, 2, 2), p / "a.png"), "save_grid: expected images"),
        (
            lambda p: save_grid(levels(1, 1, 2, 2) / 0, p / "a.png"),
            "save_grid: expected images to be finite, got NaN or infinity",
        ),
        (lambda p: save_grid(levels(1, 1, 2, 2), p / "a.png", columns=0), "expected columns to be a positive .*got 0"),
        (lambda p: save_grid(levels(1, 1, 2, 2), p / "a.png", padding=-1), "expected padding .*at least 0 or None, got -1"),
        (lambda p: save_grid(levels(1, 1, 2, 2), p / "a.png", scale=0), "expected scale to be a positive integer, got 0"),
        (lambda p: save_trajectory(levels(1, 1, 2, 2), p / "a.gif"), "save_trajectory: expected trajectory"),
        (lambda p: save_trajectory(levels(2, 1, 1, 2, 2), p / "a.gif", frames=0), "expected frames .*positive .*got 0"),
        (lambda p: save_trajectory(levels(2, 1, 1, 2, 2), p / "a.gif", seconds=0), "expected seconds to be positive"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path: Path, call, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_titles_stand_above_their_columns(channels: int, tmp_path: Path) -> None:
    images = torch.zeros(4, channels, 20, 30)
    plain, titled, other = (
        read(save_grid(images, tmp_path / "grid.png", columns=2, **titles))
        for titles in ({}, {"titles": ["a", "very long and ☃"]}, {"titles": ["a", "b"]})
    )
    assert np.array_equal(titled[14:], plain)
    assert titled.shape[:2] == (14 + plain.shape[0], 2 * 32 + 2)
    assert np.array_equal(titled[:14, :33], other[:14, :33])  # a long title does not run into another column
    assert titled[:14, :33].min() < 128
    assert not np.array_equal(titled, other)
