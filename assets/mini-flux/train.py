"""Makes the reference teacher: a FLUX pipeline at toy size that draws emoji.

    python train.py --work WORK vae base evaluate finetune lora controlnet export

The stages in their order; each can be stopped and started again, since its
state lies in WORK. WORK must hold the pictures (see dataset.py). Versions:
requirements.txt (torch 2.13.0, diffusers 0.35.2, transformers 4.57.6).
`evaluate` draws every name with the pipeline as saved, `export` copies what
was made beside this script.
"""

import argparse
import copy
import math
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline

import adapters
import dataset
import evaluation
import models
from training import Plan, Training, log

# Phases of the VAE: crops and whole pictures, a weaker prior, colour, and a
# fourth channel tied to green against magenta, which it otherwise never learns.
VAE_CROPS = Plan("vae", steps=1500, rate=2.5e-3, seed=1, warmup=50)
VAE_WHOLE = Plan("vae-whole", steps=900, rate=2e-3, seed=3, warmup=30)
VAE_COLOUR = Plan("vae-colour", steps=560, rate=2e-3, seed=4, warmup=30)
VAE_TIED = Plan("vae-tied", steps=400, rate=2e-3, seed=8, warmup=30)
VAE_PHASES = (VAE_CROPS, VAE_WHOLE, VAE_COLOUR, VAE_TIED)
WEIGHTS = {"vae": (1e-5, 0.0, 0.0), "vae-whole": (1e-6, 0.0, 0.0), "vae-colour": (1e-7, 5.0, 0.0),
           "vae-tied": (1e-7, 5.0, 2.0)}  # of the prior, of colour, of the tie
BASE = Plan("base", steps=2250, rate=2.2e-3, seed=2, warmup=100, floor=0.02)
# All but the last 300 steps see a random half of the image tokens, which
# costs half as much and teaches the names as well.
SPARSE_STEPS, SPARSE_TOKENS = 1950, 128


def train_vae(work):
    """An autoencoder in every style: crops, then whole pictures, then their colours."""
    torch.manual_seed(VAE_CROPS.seed)
    pictures = dataset.pictures(work)
    vae = models.new_vae().to(memory_format=torch.channels_last)
    for plan in VAE_PHASES:
        styles = vae_styles(pictures, plan)
        training = Training(plan, vae.parameters(), work)
        training.run(lambda step, generator: vae_loss(vae, styles, plan, step, generator))
    calibrate(vae, pictures)
    report_vae(vae, vae_styles(pictures, VAE_CROPS), work)
    vae.save_pretrained(work / "vae")


def vae_styles(pictures, plan):
    """What the VAE sees: two thirds in colour, in the last phase half of them with channels swapped."""
    colour = [pictures] * 6
    if plan is VAE_TIED:
        colour[3:] = [pictures[:, order] for order in ([1, 0, 2], [0, 2, 1], [2, 1, 0])]
    return torch.stack(colour + [dataset.pencil(pictures), dataset.chalk(pictures), dataset.edges(pictures)])


def vae_crop(plan, step):
    """How many pictures a step sees, and how large a part of each."""
    if plan is VAE_TIED:
        return 4, 96
    if plan is VAE_CROPS and step < VAE_CROPS.steps * 3 // 4:
        return 8, 64
    return 2, dataset.SIZE


def vae_batch(styles, plan, step, generator):
    """Crops or whole pictures, half of them mirrored."""
    count, size = vae_crop(plan, step)
    draw = lambda below, n: torch.randint(0, below, (n,), generator=generator)
    x = styles[draw(len(styles), count), draw(styles.shape[1], count)]
    top, left = draw(dataset.SIZE - size + 1, 2).tolist()
    x = x[:, :, top : top + size, left : left + size]
    return torch.where(draw(2, count).view(-1, 1, 1, 1) == 1, x.flip(-1), x)


def vae_loss(vae, styles, plan, step, generator):
    x = vae_batch(styles, plan, step, generator)
    posterior = vae.encode(x).latent_dist
    error = vae.decode(posterior.sample(generator)).sample - x
    prior, colour, tie = WEIGHTS[plan.name]
    detail = error.abs().mean() + 0.5 * error.square().mean()
    small = F.avg_pool2d(x, 4)
    green = 1.5 * (small[:, 1] - 0.5 * (small[:, 0] + small[:, 2]))
    return (detail + colour * F.avg_pool2d(error, 4).square().mean() + prior * posterior.kl().mean()
            + tie * (posterior.mean[:, 3] - green).square().mean())


@torch.no_grad()
def calibrate(vae, pictures):
    """Shift and scale, so that the latents have mean 0 and variance 1."""
    z = models.encode(vae, pictures)
    vae.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())


@torch.no_grad()
def report_vae(vae, styles, work):
    for name, x in zip(("colour", "pencil", "chalk", "edges"), styles[5:]):
        error = torch.cat([vae.decode(vae.encode(b).latent_dist.mean).sample.clamp(-1, 1) - b for b in x.split(16)])
        log(work, f"vae PSNR {name} {10 * math.log10(4 / error.square().mean().item()):.2f} dB")


def train_base(work):
    """Transformer and both text encoders together, by rectified flow."""
    torch.manual_seed(BASE.seed)
    pipe = models.new_pipeline(work)
    pipe.vae = type(pipe.vae).from_pretrained(work / "vae")
    with torch.no_grad():
        latents = models.encode(pipe.vae, dataset.pictures(work))
    data = latents, models.token_table(pipe)
    transformer = torch.compile(pipe.transformer, dynamic=False)
    modules = torch.nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2])
    training = Training(BASE, modules.train().parameters(), work)
    training.run(lambda step, generator: base_loss(pipe, transformer, data, step, generator),
                 lambda training: snapshot(training, pipe, work / "early" / "base"))
    save(pipe, work / "base")


def base_loss(pipe, transformer, data, step, generator):
    latents, table = data
    tokens = SPARSE_TOKENS if step < SPARSE_STEPS else latents.shape[1]
    batch = models.batch_of(latents, step, BASE.seed, tokens, generator)
    text = models.encode_text(pipe, [ids[batch.index, batch.form] for ids in table])
    return models.flow_loss(transformer, batch, text)


def snapshot(training, pipe, folder):
    """The averaged weights so far, every 100 steps, for those who cannot wait."""
    if training.step % 100:
        return
    current = [p.detach().clone() for p in training.parameters]
    training.use_average()
    save(pipe, folder)
    training.fill(current)


def save(pipe, folder):
    """The pipeline in bf16; the one in memory stays as it is."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    parts = {name: halved(part) for name, part in pipe.components.items()}
    FluxPipeline(**parts).save_pretrained(partial)
    evaluation.forget_paths(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def halved(part):
    return copy.deepcopy(part).to(torch.bfloat16) if isinstance(part, torch.nn.Module) else part


STAGES = {
    "vae": train_vae,
    "base": train_base,
    "evaluate": evaluation.base,
    "finetune": adapters.train_finetune,
    "lora": adapters.train_lora,
    "controlnet": adapters.train_controlnet,
    "export": evaluation.export,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("stages", nargs="+", choices=STAGES)
    options = parser.parse_args()
    torch.set_num_threads(2)
    for stage in options.stages:
        STAGES[stage](options.work)


if __name__ == "__main__":
    main()
