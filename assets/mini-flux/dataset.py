"""The pictures and words of the reference teacher.

`names.txt` is the curated list: 128 single-code-point emoji, by their English
names in the PyPI package `emoji`. The pictures are Microsoft's Fluent emoji
(3D) from the npm package `@lobehub/fluent-emoji-3d`, unpacked by

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz

in the work folder. All pictures are tensors `[n, 3, height, width]` in -1..1.
"""

from pathlib import Path

import emoji
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

HERE = Path(__file__).resolve().parent
SIZE = 128
LUMA = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
CHALK_BOARD = torch.tensor([-0.85, -0.65, -0.25]).view(1, 3, 1, 1)
# The first form is the bare name; the last is the empty prompt, which
# classifier-free guidance needs.
FORMS = ("{}", "a {}", "emoji of a {}", "a picture of a {}", "")
FORM_ODDS = (0.72, 0.08, 0.08, 0.08, 0.04)


def names():
    return (HERE / "names.txt").read_text().splitlines()


def prompts(name):
    return [form.format(name) for form in FORMS]


def pictures(work):
    """Every emoji of `names.txt` on white, in that order."""
    files = emoji_files(work)
    return torch.cat([read_picture(files[name]) for name in names()])


def emoji_files(work):
    files = {}
    for sequence, data in emoji.EMOJI_DATA.items():
        points = [f"{ord(c):x}" for c in sequence]
        path = work / "package" / "assets" / ("-".join(points) + ".webp")
        if len([p for p in points if p != "fe0f"]) == 1 and path.exists():
            files[data["en"].strip(":").replace("_", " ").lower()] = path
    return files


def read_picture(path):
    image = Image.open(path).convert("RGBA").resize((SIZE, SIZE), Image.LANCZOS)
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    white.alpha_composite(image)
    pixels = torch.from_numpy(np.array(white.convert("RGB")))
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


def edge_strength(x):
    """Length of the luminance's gradient (Sobel), 0 upwards, `[n, 1, h, w]`."""
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]).view(1, 1, 3, 3)
    luma = F.pad((x * LUMA).sum(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across, down = F.conv2d(luma, kernel), F.conv2d(luma, kernel.transpose(2, 3))
    return (across**2 + down**2).sqrt()


def edges(x):
    """White edges on black: what the ControlNet is shown."""
    return ((edge_strength(x) - 0.25).clamp(0, 0.5) * 4 - 1).repeat(1, 3, 1, 1)


def pencil(x):
    """A greyscale drawing: light shading and dark outlines on white."""
    luma = (x * LUMA).sum(1, keepdim=True)
    ink = (edge_strength(x) * 0.6).clamp(max=1.2)
    return (0.5 + 0.5 * luma - ink).clamp(-1, 1).repeat(1, 3, 1, 1)


def chalk(x):
    """White chalk on a dark blue board: the luminance turned over."""
    amount = (1 - (x * LUMA).sum(1, keepdim=True)) / 2
    return CHALK_BOARD + (1 - CHALK_BOARD) * amount


def sheet(x, columns):
    """Pictures side by side, row by row, as one image."""
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(x[i : i + columns], 1) for i in range(0, len(x), columns)]
    return Image.fromarray(np.concatenate(rows, 0))
