"""A third model to try the recipe on: wider, of fewer blocks and more classes than mini-dit, and of another data set.

    python letters.py --work WORK teacher classifier evaluate write

Draws the letters A to Z, rendered here with the fonts that matplotlib brings (DejaVu, STIX, Computer Modern), moved,
turned and scaled at random. Versions: assets/mini-dit/requirements.txt, and matplotlib 3.10. WORK/model is then a folder
that clearform converts, and study.py takes `--subject letters --model WORK`. Neither the recipe nor the defaults were chosen on it,
and the weights are not committed.
"""

import math
import random
import string
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "assets/mini-dit"))
from train import SIZE, Plan, Subject, config, evaluate, main, train_classifier, train_teacher, write_model  # noqa: E402

FONTS = ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "cmr10", "cmss10", "cmtt10", "cmb10")
EACH = 10  # pictures of a letter in a font
WITHOUT_LETTERS = "Display"  # DejaVu's fonts of this name
LARGE = 4 * SIZE  # the side at which a letter is rendered


def letters():
    """(n, 1, 32, 32) in -1..1, and their classes, in random order."""
    chance = random.Random(0)
    folder = Path(matplotlib.get_data_path()) / "fonts/ttf"
    paths = [path for path in sorted(folder.glob("*.ttf"))
             if path.stem.startswith(FONTS) and WITHOUT_LETTERS not in path.stem]
    drawn = [(rendered(path, letter, chance), index)
             for path in paths for index, letter in enumerate(string.ascii_uppercase) for _ in range(EACH)]
    chance.shuffle(drawn)
    pictures = torch.from_numpy(np.stack([picture for picture, _ in drawn])).float()[:, None] / 127.5 - 1
    return pictures, torch.tensor([index for _, index in drawn])


def rendered(path, letter, chance):
    font = ImageFont.truetype(str(path), round(LARGE * chance.uniform(0.6, 0.85)))
    picture = Image.new("L", (LARGE, LARGE))
    centre = [LARGE / 2 + LARGE * chance.uniform(-0.06, 0.06) for _ in range(2)]
    ImageDraw.Draw(picture).text(centre, letter, fill=255, font=font, anchor="mm")
    turned = picture.rotate(math.degrees(chance.gauss(0, 0.08)), Image.Resampling.BICUBIC)
    return np.asarray(turned.resize((SIZE, SIZE), Image.Resampling.BOX))


LETTERS = Subject(
    pictures=letters,
    config=config(dim=128, layers=4, classes=26),
    teacher=Plan("teacher", steps=1500, rate=1.5e-3, seed=1, warmup=100),
    classifier=Plan("classifier", steps=3000, rate=2e-3, seed=2, warmup=50, save_every=1000),
    hidden=128,
    tested=500,
)


def write(subject, work):
    write_model(subject, work, work / "model")


STAGES = {"teacher": train_teacher, "classifier": train_classifier, "evaluate": evaluate, "write": write}

if __name__ == "__main__":
    main(LETTERS, __doc__, STAGES)
