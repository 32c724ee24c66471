"""Makes mini-dit: a class-conditional DiT on pixels that draws digits, and the classifier that reads them.

    python train.py --work WORK teacher classifier evaluate export

The stages in their order; `teacher` can be stopped and started again, since its state lies in WORK. Versions:
requirements.txt. The digits are those of scikit-learn (1797 of 8 x 8 pixels, UCI "Optical Recognition of Handwritten
Digits", CC BY 4.0), enlarged to 32 x 32. `export` copies what was made beside this script.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn

HERE = Path(__file__).parent
sys.path += [str(HERE.parent / "mini-flux"), str(HERE.parents[1] / "tests/fixtures/minrf")]
from dit_llama import DiTLlama  # noqa: E402
from training import Plan, Training, log  # noqa: E402

BATCH = 24
DROPPED = 0.1  # share of labels that training replaces by "no class"
STEPS, GUIDANCE = 50, 2.0
SIZE = 32  # of a picture, in pixels
CELL = 4  # pixels that the classifier averages, in each direction
DRAWN = 20  # of each class, by which the teacher is judged


@dataclass(frozen=True)
class Subject:
    """What a model draws, and how it and its classifier are trained on it."""

    pictures: Callable  # returns (n, 1, SIZE, SIZE) in -1..1, and their classes
    config: dict
    teacher: Plan
    classifier: Plan
    hidden: int  # width of the classifier
    tested: int  # pictures that the classifier is not trained on: the first

    @property
    def classes(self):
        return self.config["num_classes"]


def config(dim, layers, classes):
    """Sizes of a DiT_Llama."""
    sizes = dict(dim=dim, n_layers=layers, n_heads=4, num_classes=classes)
    return dict(in_channels=1, input_size=SIZE, patch_size=2, **sizes, norm_eps=1e-5)


def digits():
    """(1797, 1, 32, 32) in -1..1, and their classes."""
    data = load_digits()
    small = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    large = F.interpolate(small, (SIZE, SIZE), mode="bicubic", align_corners=False).clamp(-1, 1)
    return large, torch.from_numpy(data.target)


DIGITS = Subject(
    pictures=digits,
    config=config(dim=64, layers=6, classes=10),
    teacher=Plan("teacher", steps=1500, rate=2e-3, seed=1, warmup=100),
    classifier=Plan("classifier", steps=2000, rate=2e-3, seed=2, warmup=50, save_every=1000),
    hidden=64,
    tested=360,
)


def train_teacher(subject, work):
    """Rectified flow with logit-normal noise levels, as minRF trains."""
    torch.manual_seed(subject.teacher.seed)
    pictures, classes = subject.pictures()
    model = DiTLlama(**subject.config)
    for block in [*model.layers, model.final_layer]:  # adaLN-zero
        nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(block.adaLN_modulation[1].bias)
    training = Training(subject.teacher, model.parameters(), work)
    training.run(lambda step, generator: flow_loss(subject, model, pictures, classes, generator))
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, work / "model.safetensors", {"format": "pt"})


def flow_loss(subject, model, pictures, classes, generator):
    index = torch.randint(0, len(pictures), (BATCH,), generator=generator)
    dropped = torch.rand(BATCH, generator=generator) < DROPPED
    labels = torch.where(dropped, subject.classes, classes[index])
    t = torch.randn(BATCH, generator=generator).sigmoid()
    x0 = pictures[index]
    noise = torch.randn(x0.shape, generator=generator)
    levels = t.view(-1, 1, 1, 1)
    return F.mse_loss(model((1 - levels) * x0 + levels * noise, t, labels), noise - x0)


def features(pictures):
    return F.avg_pool2d(pictures, CELL).flatten(1)


def new_classifier(subject):
    """Reads pictures of which each cell is averaged."""
    cells = (SIZE // CELL) ** 2
    return nn.Sequential(nn.Linear(cells, subject.hidden), nn.ReLU(), nn.Linear(subject.hidden, subject.classes))


def train_classifier(subject, work):
    torch.manual_seed(subject.classifier.seed)
    pictures, classes = subject.pictures()
    x, y = features(pictures[subject.tested :]), classes[subject.tested :]
    model = new_classifier(subject)

    def loss(_, generator):
        index = torch.randint(0, len(x), (128,), generator=generator)
        return F.cross_entropy(model(x[index] + 0.2 * torch.randn(128, x.shape[1], generator=generator)), y[index])

    Training(subject.classifier, model.parameters(), work).run(loss)
    tested = slice(0, subject.tested)
    right = read_rightly(model, pictures[tested], classes[tested])
    log(work, f"classifier reads {right:.3f} of the {subject.tested} pictures it was not trained on")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, work / "classifier.safetensors")


@torch.no_grad()
def draw(subject, model, classes, seed=0, steps=STEPS, guidance=GUIDANCE):
    """Pictures of `classes` by Euler steps with classifier-free guidance; picture i begins with the noise of seed + i."""
    noise = [torch.randn(1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed + i)) for i in range(len(classes))]
    x = torch.stack(noise)
    without = torch.full_like(classes, subject.classes)
    for step in range(steps, 0, -1):
        t = torch.full((2 * len(x),), step / steps)
        conditional, unconditional = model(torch.cat([x, x]), t, torch.cat([classes, without])).chunk(2)
        x = x - (unconditional + guidance * (conditional - unconditional)) / steps
    return x


def read_rightly(classifier, pictures, classes):
    return (classifier(features(pictures)).argmax(1) == classes).float().mean().item()


def load(subject, folder):
    """The teacher in f32, and the classifier."""
    model, classifier = DiTLlama(**subject.config), new_classifier(subject)
    weights = folder / "model" / "model.safetensors"
    model.load_state_dict(load_file(weights if weights.exists() else folder / "model.safetensors"))
    classifier.load_state_dict(load_file(folder / "classifier.safetensors"))
    return model.float().eval(), classifier.eval()


def sheet(pictures, columns):
    rows = [torch.cat(list(row), -1) for row in pictures[:, 0].split(columns)]
    return Image.fromarray(((torch.cat(rows, 0).clamp(-1, 1) + 1) * 127.5).round().byte().numpy())


def evaluate(subject, work):
    model, classifier = load(subject, work)
    classes = torch.arange(subject.classes).repeat_interleave(DRAWN)
    drawn = torch.cat([draw(subject, model, part, seed=DRAWN * i) for i, part in enumerate(classes.split(DRAWN))])
    log(work, f"the classifier reads {read_rightly(classifier, drawn, classes):.3f} of {len(classes)} drawn pictures")
    pictures, _ = subject.pictures()
    distance = torch.cdist(features(drawn), features(pictures)).min(1).values.mean() * CELL / SIZE
    log(work, f"mean distance to the nearest training picture {distance:.3f} (RMS of averaged cells)")
    sheet(drawn, DRAWN).save(work / "contact-sheet.png", optimize=True)


def write_model(subject, work, folder):
    """A folder that clearform reads."""
    folder.mkdir(exist_ok=True, parents=True)
    shutil.copy(work / "model.safetensors", folder)
    config = json.dumps({"_class_name": "DiT_Llama", **subject.config}, indent=2)
    (folder / "config.json").write_text(config + "\n")


def export(subject, work):
    write_model(subject, work, HERE / "model")
    for name in ("classifier.safetensors", "contact-sheet.png", "train.log"):
        shutil.copy(work / name, HERE)


STAGES = {"teacher": train_teacher, "classifier": train_classifier, "evaluate": evaluate, "export": export}


def main(subject, description, stages):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("stages", nargs="+", choices=stages)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    for stage in options.stages:
        stages[stage](subject, options.work)


if __name__ == "__main__":
    main(DIGITS, __doc__, STAGES)
