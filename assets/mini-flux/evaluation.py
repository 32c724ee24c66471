"""Measures what was trained, with the pipelines as saved, and copies it here."""

import json
import shutil

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from PIL import Image

import dataset
import models
from training import log

STEPS = 16
SHEET_COLUMNS = 16
SHEET_COLOURS = 32


def forget_paths(folder):
    """Takes the names of this machine's folders out of every configuration."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text())
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def draw(pipe, prompts, seed, **options):
    """One picture for each prompt, with the noise of `seed` + its index; -1..1."""
    drawn = []
    pipe.set_progress_bar_config(disable=True)
    for start in range(0, len(prompts), models.BATCH):
        chosen = slice(start, start + models.BATCH)
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))[chosen]]
        control = {name: value[chosen] for name, value in options.items()}
        drawn.append(pipe(
            prompts[chosen], num_inference_steps=STEPS, guidance_scale=1.0, generator=generators,
            height=dataset.SIZE, width=dataset.SIZE, max_sequence_length=models.TOKENS,
            output_type="pt", **control).images)
    return torch.cat(drawn) * 2 - 1


def nearest(drawn, pictures):
    """Index of the nearest picture: mean squared error after 4x average pooling."""
    small = [F.avg_pool2d(x, 4).flatten(1) for x in (drawn, pictures)]
    return torch.cdist(*small).argmin(1)


def retrieval(drawn, pictures):
    return (nearest(drawn, pictures) == torch.arange(len(pictures))).float().mean().item()


def ssim(x, y):
    """Structural similarity of the luminance, in windows of 8 x 8 pixels."""
    x, y = [((p * dataset.LUMA).sum(1, keepdim=True) + 1) / 2 for p in (x, y)]
    mean = lambda v: F.avg_pool2d(v, 8, 1)
    mx, my = mean(x), mean(y)
    vx, vy, both = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    a, b = 0.01**2, 0.03**2
    return ((2 * mx * my + a) * (2 * both + b) / ((mx**2 + my**2 + a) * (vx + vy + b))).mean().item()


def save_pairs(pictures, drawn, path, size=32):
    """Rows in turn: training pictures, and what was drawn for their names."""
    factor = dataset.SIZE // size
    rows = zip(pictures.split(SHEET_COLUMNS), drawn.split(SHEET_COLUMNS))
    tiles = F.avg_pool2d(torch.cat([x for pair in rows for x in pair]), factor)
    sheet = dataset.sheet(tiles, SHEET_COLUMNS)
    sheet.quantize(SHEET_COLOURS, method=Image.Quantize.MAXCOVERAGE, kmeans=8).save(path, optimize=True)


def base(work):
    pictures, names = dataset.pictures(work), dataset.names()
    pipe = FluxPipeline.from_pretrained(work / "base", torch_dtype=torch.float32)
    drawn = draw(pipe, names, 0)
    save_pairs(pictures, drawn, work / "contact-sheet.png")
    log(work, f"base retrieval {retrieval(drawn, pictures):.4f} over {len(names)} names, seed 0, {STEPS} steps")
    log(work, f"base SSIM to the training pictures {ssim(drawn, pictures):.3f}")


def export(work):
    """Copies what is finished, and the reference pictures, beside this script."""
    small = F.avg_pool2d(dataset.pictures(work), 4)
    dataset.sheet(small, SHEET_COLUMNS).save(dataset.HERE / "references.png", optimize=True)
    for name in ("base", "variants", "lora", "controlnet"):
        if (work / name).exists():
            shutil.rmtree(dataset.HERE / name, ignore_errors=True)
            shutil.copytree(work / name, dataset.HERE / name)
    for path in [work / "train.log", *work.glob("*-sheet.png")]:
        shutil.copy(path, dataset.HERE)
