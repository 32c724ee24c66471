"""Whether PyTorch judges a student as clearform does: the figures of `[distillation.verdict]` in clearform.toml, computed again.

    python verdict.py BASE HELD_OUT MODEL

Versions: torch 2.13, diffusers 0.42.1, safetensors. BASE is a FLUX pipeline folder or assets/mini-dit, HELD_OUT the
folder `held-out-N` in the samples of `clearform convert --samples`, MODEL what it wrote. Prints each figure of both, and
at last the largest relative difference.
"""

import argparse
import math
import re
import sys
import tomllib
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent / "recipe")]
import study  # noqa: E402
from distil import Distillation, SampleSet, pictures  # noqa: E402

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
NOISE_SEED = 1234


class Flux:
    """mini-flux or another FLUX pipeline."""

    def __init__(self, base, held_out, radius):
        self.held_out = SampleSet(held_out)
        arguments = Namespace(base=base, radius=radius, pool=None, every=1, bf16=False)
        self.distillation = Distillation(arguments, self.held_out)
        self.vae = AutoencoderKL.from_pretrained(base / "vae").float()
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(base / "scheduler")
        self.teacher, self.student = self.distillation.teacher, self.distillation.student
        self.latents = self.held_out.latents

    def read(self, model):
        self.distillation.read(model)

    def predict(self, model, level, noise):
        members = range(self.held_out.count)
        inputs, _ = self.held_out.noised(members, torch.full((len(members),), level), noise)
        return self.distillation.predict(model, inputs)[0]

    def images(self, model):
        settings = self.held_out.settings
        generator = lambda index: torch.Generator().manual_seed(settings["seed"] + index)
        noise = torch.stack([torch.randn(self.latents.shape[1:], generator=generator(index)) for index in range(len(self.latents))])
        return pictures(self.distillation, model, self.held_out, self.vae, self.scheduler, settings["steps"], noise)


class MiniDit:
    """assets/mini-dit."""

    def __init__(self, base, held_out, radius):
        self.settings = SampleSet(held_out).settings
        self.latents = SampleSet(held_out).latents
        self.classes = torch.tensor(self.settings["prompts"]).repeat(len(self.latents))[: len(self.latents)]
        subject = study.mini_dit.DIGITS
        self.subject = subject
        self.teacher, _ = study.mini_dit.load(subject, base)
        self.student, _ = study.mini_dit.load(subject, base)
        study.set_masks(self.student, study.Windows(study.mini_dit.SIZE // 2, radius), Namespace(full=""))

    def read(self, model):
        study.read(self.student, model)

    def predict(self, model, level, noise):
        noised = (1 - level) * self.latents + level * noise
        return model(noised, torch.full((len(noised),), level), self.classes)

    def images(self, model):
        settings = self.settings
        scale = settings["classifier_free"]["scale"]
        drawn = study.mini_dit.draw(
            self.subject, model, self.classes, settings["seed"], settings["steps"], scale
        )
        return (drawn.expand(-1, 3, -1, -1) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def errors(subject, model):
    """Mean squared error against the teacher and the teacher's power, at each level."""
    random = torch.Generator().manual_seed(NOISE_SEED)
    rows = []
    for level in LEVELS:
        noise = torch.randn(subject.latents.shape, generator=random)
        wanted, found = (subject.predict(each, level, noise).double() for each in (subject.teacher, model))
        rows.append(((found - wanted).square().mean().item(), wanted.square().mean().item()))
    return rows


@torch.no_grad()
def bytes_of(subject, model):
    return (subject.images(model) * 255).round().double()


def psnr(a, b):
    return 10 * math.log10(255**2 / (a - b).square().mean().item())


def ssim(a, b):
    """Mean SSIM of the luma (Wang et al., 2004), an 11 x 11 Gaussian window."""
    places = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-places.square() / (2 * 1.5**2))
    window = (line[:, None] * line[None] / line.sum() ** 2)[None, None]
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(1, 3, 1, 1)
    blur = lambda x: F.conv2d(x, window)
    x, y = ((image * weights).sum(1, keepdim=True) for image in (a, b))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = blur(x), blur(y)
    vx, vy, covariance = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    values = (2 * mx * my + c1) * (2 * covariance + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return values.mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("model", type=Path)
    options = parser.parse_args()
    record = tomllib.loads((options.model / "clearform.toml").read_text())
    radius = float(re.fullmatch(r"clear:r=([\d.]+)", record["attention"]["default"])[1])
    kind = Flux if (options.base / "model_index.json").exists() else MiniDit
    subject = kind(options.base, options.held_out, radius)

    wanted = bytes_of(subject, subject.teacher)
    found = {}
    for when in ("before", "after"):
        if when == "after":
            subject.read(options.model)
        rows = errors(subject, subject.student)
        for index, (error, power) in enumerate(rows):
            found[f"level {LEVELS[index]} {when}"] = error
            found[f"level {LEVELS[index]} power"] = power
        found[f"error_{when}"] = sum(error for error, _ in rows) / len(rows)
        images = bytes_of(subject, subject.student)
        found[f"psnr_{when}"], found[f"ssim_{when}"] = psnr(wanted, images), ssim(wanted, images)

    verdict = record["distillation"]["verdict"]
    told = {key: verdict[key] for key in ("error_before", "error_after")} | verdict["images"]
    for level in verdict["level"]:
        told |= {f"level {level['noise']} {key}": level[key] for key in ("before", "after", "power")}
    differences = []
    for key, value in found.items():
        differences.append(abs(value - told[key]) / abs(value))
        print(f"{key:20} {told[key]:12.6f} {value:12.6f} {differences[-1]:.1e}")
    print(f"largest relative difference {max(differences):.1e}")


if __name__ == "__main__":
    main()
