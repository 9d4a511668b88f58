"""Render the emoji of a colour font to folders of pictures, such as Debian's package fonts-noto-color-emoji.

    python examples/emoji.py data/emoji
    ddpm-fast train runs/emoji --data data/emoji/train --condition grey --network base

Every tenth emoji goes to `test` instead of `train`.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

BLOCKS = [(0x1F300, 0x1F6FF), (0x1F7E0, 0x1F7EB), (0x1F90C, 0x1FAFF), (0x2600, 0x27BF), (0x2B1B, 0x2B55)]
STRIKE = 109  # the only size of the font's bitmaps
SIDE = 136  # pixels that hold any of them

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("out", type=Path, help="folder to write")
parser.add_argument("--font", type=Path, default="/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf", help="a font of bitmaps")
parser.add_argument("--size", type=int, default=32, help="height and width of a picture")
args = parser.parse_args()

if not args.font.is_file():
    parser.error(f"{args.font} does not exist: install the package fonts-noto-color-emoji, or pass --font")
font = ImageFont.truetype(str(args.font), STRIKE)  # Pillow 10 takes no path


def rendered(character: str) -> Image.Image:
    """Return a character on white."""
    picture = Image.new("RGBA", (SIDE, SIDE), "white")
    ImageDraw.Draw(picture).text((SIDE // 2, SIDE // 2), character, "black", font, "mm", embedded_color=True)
    return picture.convert("RGB").resize((args.size, args.size), Image.Resampling.LANCZOS)


missing = rendered("\U000fffff").tobytes()  # the picture of what the font lacks
seen = {missing, rendered(" ").tobytes()}
count = 0
for first, last in BLOCKS:
    for code in range(first, last + 1):
        picture = rendered(chr(code))
        if picture.tobytes() in seen:
            continue
        seen.add(picture.tobytes())
        folder = args.out / ("test" if count % 10 == 9 else "train")
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{code:05x}.png")
        count += 1
print(f"{args.out}: {count} emoji")
