"""Which recipe repairs a model whose attention was replaced by CLEAR windows: one line of the table in docs/distillation.md.

    python study.py [--subject letters --model WORK] --radius 4 --steps 1000 --rate 3e-3 --denoising 0 ...

Versions: those of assets/mini-dit/requirements.txt. The teacher is assets/mini-dit, or what letters.py made; the student
is trained as clearform trains it, by the losses of CLEAR (arXiv 2412.16112, equation 6), on pictures that the teacher
draws. Every other choice is an argument. Prints one JSON object:

- error_before, error: mean squared error of the student's prediction against the teacher's on pictures that the
  training has not seen, at uniform noise levels, before and after; share: their ratio
- psnr: of pictures drawn from the same noise, in dB, over all of them together; read, read_teacher: the share of them that the
  classifier reads as their class
- seconds of training, on --threads threads
"""

import argparse
import copy
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

ASSETS = Path(__file__).resolve().parents[2] / "assets"
sys.path.insert(0, str(ASSETS / "mini-dit"))
import train as mini_dit  # noqa: E402

TRAINED = {
    "attention": ("attention.w",),
    "attention+norms": ("attention.",),
    "attention+mlp": ("attention.", "feed_forward."),
    "attention+modulation": ("attention.", "adaLN_modulation."),
    "blocks": ("layers.",),
}
CACHE = Path(tempfile.gettempdir()) / "clearform-study"  # what the teacher draws, for further lines
HELD_OUT, HELD_OUT_SEED, NOISE_SEED = 64, 1_000_000, 1234
DRAWN_EACH, DRAWN_SEED, DRAWN_STEPS = 20, 2_000_000, 25


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", type=subject, default="digits", help="digits or letters")
    parser.add_argument("--model", type=Path, default=ASSETS / "mini-dit")
    parser.add_argument("--student", type=Path, help="a model that clearform distilled with --radius, instead of training")
    parser.add_argument("--radius", type=float, default=4.0)
    parser.add_argument("--full", type=str, default="", help="layers that keep full attention, as 0,5")
    parser.add_argument("--shrink", type=float, default=0.0, help="share of the steps over which the radius shrinks from 11")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--floor", type=float, default=0.02)
    parser.add_argument("--denoising", type=float, default=1.0)
    parser.add_argument("--prediction", type=float, default=0.5)
    parser.add_argument("--attention", type=float, default=0.5)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--ema", type=float, default=0.0)
    parser.add_argument("--beta2", type=float, default=0.99)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--levels", choices=("uniform", "logit-normal", "stratified"), default="uniform")
    parser.add_argument("--inputs", choices=("samples", "trajectories"), default="samples")
    parser.add_argument("--unconditional", type=float, default=0.1)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sample-steps", type=int, default=20)
    parser.add_argument("--trained", choices=TRAINED, default="attention")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="activations in bf16")
    parser.add_argument("--errors-only", action="store_true", help="draw no pictures, which takes as long as 300 steps")
    return parser.parse_args()


def subject(name):
    if name == "digits":
        return mini_dit.DIGITS
    from letters import LETTERS  # needs matplotlib

    return LETTERS


class Windows:
    """Which keys each query sees: those whose distance is below the radius."""

    def __init__(self, side, radius):
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        places = torch.stack([rows.flatten(), columns.flatten()], 1)
        self.squares = ((places[:, None] - places[None]) ** 2).sum(-1)
        self.radius = radius

    def mask(self, radius=None):
        return self.squares < (radius or self.radius) ** 2


def watch(model, every):
    """Attention outputs before the output projection, by layer, of the model's last call."""
    seen = {}
    for index, layer in list(enumerate(model.layers))[::every]:
        layer.attention.wo.register_forward_pre_hook(lambda _, inputs, index=index: seen.__setitem__(index, inputs[0]))
    return seen


def noise(seed):
    return torch.randn(1, mini_dit.SIZE, mini_dit.SIZE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def drawn(subject, model, count, seed, steps, trajectory=False):
    """Pictures of evenly spread classes with guidance, and with `trajectory` what led to each step, (steps, count, ...)."""
    classes = torch.arange(count) % subject.classes
    x = torch.stack([noise(seed + index) for index in range(count)])
    without = torch.full_like(classes, subject.classes)
    visited = []
    for step in range(steps, 0, -1):
        visited.append(x)
        parts = []
        for rows in torch.arange(count).split(64):
            t = torch.full((2 * len(rows),), step / steps)
            both = model(torch.cat([x[rows], x[rows]]), t, torch.cat([classes[rows], without[rows]])).chunk(2)
            parts.append(both[1] + mini_dit.GUIDANCE * (both[0] - both[1]))
        x = x - torch.cat(parts) / steps
    return (x, classes, torch.stack(visited)) if trajectory else (x, classes)


def cached(name, make):
    path = CACHE / name
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        torch.save(make(), path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)
    return torch.load(path)


class Inputs:
    """Noised pictures of the teacher, with their targets."""

    def __init__(self, options, teacher):
        name = f"{options.model.name}-{options.samples}-{options.sample_steps}.pt"
        make = lambda: drawn(
            options.subject, teacher, options.samples, options.seed, options.sample_steps, trajectory=True
        )
        self.pictures, self.classes, self.visited = cached(name, make)
        self.options, self.generator = options, torch.Generator().manual_seed(options.seed)

    def draw(self):
        o, g = self.options, self.generator
        index = torch.randint(0, len(self.pictures), (o.batch,), generator=g)
        labels = self.classes[index]
        dropped = torch.rand(o.batch, generator=g) < o.unconditional
        labels = torch.where(dropped, o.subject.classes, labels)
        if o.inputs == "trajectories":
            step = torch.randint(0, o.sample_steps, (o.batch,), generator=g)
            return self.visited[step, index], 1 - step / o.sample_steps, labels, None
        t = self.levels()
        x0 = self.pictures[index]
        noise = torch.randn(x0.shape, generator=g)
        levels = t.view(-1, 1, 1, 1)
        return (1 - levels) * x0 + levels * noise, t, labels, noise - x0

    def levels(self):
        o, g = self.options, self.generator
        if o.levels == "logit-normal":
            return torch.randn(o.batch, generator=g).sigmoid()
        t = torch.rand(o.batch, generator=g)
        return (torch.arange(o.batch) + t) / o.batch if o.levels == "stratified" else t


def held_out(options, teacher):
    """Noised pictures of other seeds, with their classes."""
    make = lambda: drawn(options.subject, teacher, HELD_OUT, HELD_OUT_SEED, 20)
    pictures, classes = cached(f"{options.model.name}-held-out.pt", make)
    generator = torch.Generator().manual_seed(NOISE_SEED)
    t = torch.rand(len(pictures), generator=generator)
    noise = torch.randn(pictures.shape, generator=generator)
    levels = t.view(-1, 1, 1, 1)
    return (1 - levels) * pictures + levels * noise, t, classes


@torch.no_grad()
def error(teacher, student, inputs):
    return F.mse_loss(student(*inputs), teacher(*inputs)).item()


def rate(options, step):
    warmup = min(20, options.steps // 9)
    if step < warmup:
        return options.rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, options.steps - warmup)
    return options.rate * (options.floor + (1 - options.floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_masks(model, windows, options, radius=None):
    full = {int(layer) for layer in options.full.split(",") if layer}
    for index, layer in enumerate(model.layers):
        layer.attention.mask = None if index in full else windows.mask(radius)


def read(student, folder):
    """Takes the weights of a portable model."""
    tensors = [load_file(path) for path in sorted((folder / "transformer").glob("*.safetensors"))]
    student.load_state_dict({name: value.float() for part in tensors for name, value in part.items()})
    return 0.0


def new_optimizer(options, parameters):
    if options.optimizer == "muon":
        return torch.optim.Muon(parameters, options.rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return torch.optim.AdamW(parameters, options.rate, betas=(0.9, options.beta2), weight_decay=0.0)


def train(options, teacher, student, windows):
    """Returns the seconds that training took."""
    prefixes = TRAINED[options.trained]
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(any(part in name for part in prefixes) and name.startswith("layers."))
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = new_optimizer(options, parameters)
    wanted, got = watch(teacher, options.every), watch(student, options.every)
    inputs = Inputs(options, teacher)
    began = time.time()
    for step in range(options.steps):
        if options.shrink:
            progress = min(1.0, step / (options.shrink * options.steps))
            set_masks(student, windows, options, 11 + (options.radius - 11) * progress)
        for group in optimizer.param_groups:
            group["lr"] = rate(options, step)
        x, t, labels, target = inputs.draw()
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            with torch.no_grad():
                teacher_prediction = teacher(x, t, labels).float()
            prediction = student(x, t, labels).float()
        loss = options.prediction * F.mse_loss(prediction, teacher_prediction)
        if target is not None and options.denoising:
            loss = loss + options.denoising * F.mse_loss(prediction, target)
        if options.attention:
            distances = [F.mse_loss(got[index], wanted[index]) for index in wanted]
            loss = loss + options.attention * sum(distances) / len(distances)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, options.clip)
        optimizer.step()
        if options.ema:
            decay = min(options.ema, (2 + step) / (11 + step))
            torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)
    if options.ema:
        with torch.no_grad():
            torch._foreach_copy_(parameters, average)
    return time.time() - began


def pictures_of(options, name, model):
    count = DRAWN_EACH * options.subject.classes
    make = lambda: drawn(options.subject, model, count, DRAWN_SEED, DRAWN_STEPS)
    return cached(f"{options.model.name}-{name}.pt", make) if name else make()


def compare_pictures(options, teacher, student, classifier):
    wanted, classes = pictures_of(options, "drawn", teacher)
    found, _ = pictures_of(options, None, student)
    squared = (wanted.clamp(-1, 1) - found.clamp(-1, 1)).square().mean().item()
    read = lambda pictures: mini_dit.read_rightly(classifier, pictures, classes)
    return {"psnr": 10 * math.log10(4 / squared), "read": read(found), "read_teacher": read(wanted)}


def main():
    options = arguments()
    torch.set_num_threads(options.threads)
    teacher, classifier = mini_dit.load(options.subject, options.model)
    student = copy.deepcopy(teacher)
    windows = Windows(mini_dit.SIZE // 2, options.radius)
    set_masks(student, windows, options)
    checked = held_out(options, teacher)
    before = error(teacher, student, checked)
    torch.manual_seed(options.seed)
    seconds = read(student, options.student) if options.student else train(options, teacher, student, windows)
    set_masks(student, windows, options)
    after = error(teacher, student, checked)
    drawn = {} if options.errors_only else compare_pictures(options, teacher, student, classifier)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items() if key != "subject"}
    print(json.dumps(settings | {
        "error_before": before, "error": after, "share": after / before, "seconds": seconds,
    } | drawn))


if __name__ == "__main__":
    main()
