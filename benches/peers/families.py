"""Whether clearform distils SD3, PixArt, DiT and SiT as well as PyTorch does, with the same settings.

    python families.py WORK --clearform target/release/clearform --seeds 0 1

Versions: torch 2.13, diffusers 0.42.1, transformers 5.24, safetensors 0.8. WORK gets a folder for each family and seed,
which replaces an earlier one: a tiny model of 12 x 12 image tokens, what `clearform convert` makes of it by the
prediction loss, and the samples. The peer is the same distillation on the same samples, with the same draws of members,
noise levels, prompts left out and noise, and the same trained parameters: q, k, v and out of the image's windowed
attention. A seed is that of the model, the samples and the training.

Prints a row for each family and seed: the mean squared error against the teacher on held-out samples before training,
its share of the teacher's power, what clearform and PyTorch leave of it, and the ratio of the two. Exits with 1 if a
ratio is above 1.1, or if the two do not agree on the error before training. Two seeds take a quarter of an hour.
"""

import argparse
import math
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
FIXTURES = HERE.parent.parent / "tests/fixtures"
sys.path[:0] = [str(FIXTURES), str(FIXTURES / "pipelines"), str(HERE)]  # the fixtures have a families.py too
import families  # noqa: E402
import original  # noqa: E402
import seeded  # noqa: E402
import tiny  # noqa: E402
from distil import SampleSet  # noqa: E402
from verdict import LEVELS, NOISE_SEED  # noqa: E402

GRID, PATCH, HEADS, HEAD_DIM, BLOCKS = 12, 2, 4, 16, 3
WIDTH, SIDE = HEADS * HEAD_DIM, GRID * PATCH
CHANNELS, CLASSES, TEXT_CHANNELS = 4, 10, 16
PROMPTS = ["", "a cat", "two red apples", "the sea in the evening"]
TEACHER_STEPS, TEACHER_BATCH, TEACHER_RATE = 300, 8, 2e-3
RADIUS, WARMUP, FLOOR, UNCONDITIONAL = 3.0, 20, 0.02, 0.1
MOST_RATIO, AGREEMENT = 1.1, 1e-3


def flow(x0, noise, level):
    """Latents, the model's timestep and what it should predict."""
    at = level.view(-1, 1, 1, 1)
    return (1 - at) * x0 + at * noise, 1000 * level, noise - x0


def reversed_flow(x0, noise, level):
    at = level.view(-1, 1, 1, 1)
    return (1 - at) * x0 + at * noise, 1 - level, x0 - noise


def ddpm(x0, noise, level):
    step = (1000 * level).floor().clamp(0, 999)
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[step.long()].view(-1, 1, 1, 1)
    return kept.sqrt() * x0 + (1 - kept).sqrt() * noise, step, noise


def waves(count, random):
    """Pictures of a plane wave each, with a phase of its own in every channel: any part tells of the whole."""
    frequency = torch.randint(-2, 3, (count, 1, 2, 1, 1), generator=random)
    phase = torch.rand(count, CHANNELS, 1, 1, generator=random)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    turns = (frequency * torch.stack([rows, columns])).sum(2) / SIDE + phase
    return math.sqrt(2) * torch.sin(2 * math.pi * turns)


def teach(family, model, conditions, seed):
    """Trains `model` a little on waves. What DDPM's samplers draw with random weights is a hundred times too large."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=TEACHER_RATE)
    prompts = len(next(iter(conditions.values())))
    for _ in range(TEACHER_STEPS):
        x0 = waves(TEACHER_BATCH, random)
        noise = torch.randn(x0.shape, generator=random)
        latents, timestep, target = family.noised(x0, noise, torch.rand(len(x0), generator=random))
        chosen = torch.randint(0, prompts, (len(x0),), generator=random)
        given = {name: rows[chosen] for name, rows in conditions.items()}
        predicted = family.predict(model, latents, timestep, **given)
        optimizer.zero_grad()
        F.mse_loss(predicted[:, :CHANNELS], target).backward()
        optimizer.step()


def vae():
    return tiny.vae(latent_channels=CHANNELS, scaling_factor=0.18215)


class Sd3:
    """As SD 3.5 medium: queries and keys are normed, the first block has a second attention, T5 is left out."""

    name, noised = "sd3", staticmethod(flow)
    trained = re.compile(r"\.attn2?\.to_(q|k|v|out)\.")
    text_tokens = tiny.CLIP_TOKENS + 256

    def write(self, folder, seed):
        model = SD3Transformer2DModel(
            sample_size=SIDE, patch_size=PATCH, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=BLOCKS,
            attention_head_dim=HEAD_DIM, num_attention_heads=HEADS, caption_projection_dim=WIDTH,
            joint_attention_dim=TEXT_CHANNELS, pooled_projection_dim=12, pos_embed_max_size=GRID, qk_norm="rms_norm",
            dual_attention_layers=(0,),
        )
        pipe = StableDiffusion3Pipeline(
            transformer=seeded.fill(model, f"{self.name}/{seed}/"),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(),
            text_encoder=tiny.clip("text_encoder/", 6, 1, 5, "quick_gelu"),
            tokenizer=tiny.clip_tokenizer(),
            text_encoder_2=tiny.clip("text_encoder_2/", 8, 2, 7, "gelu"),
            tokenizer_2=tiny.clip_tokenizer(),
            text_encoder_3=None,
            tokenizer_3=None,
        )
        text, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
        teach(self, model, {"text": text.detach(), "pooled": pooled.detach()}, seed)
        pipe.save_pretrained(folder)
        return [folder]

    def read(self, folder):
        return SD3Transformer2DModel.from_pretrained(folder / "transformer")

    def set_mask(self, model, mask):
        for block in model.transformer_blocks:
            for attention in filter(None, (block.attn, block.attn2)):
                families.window(attention, mask)

    def predict(self, model, latents, timestep, text, pooled):
        return model(latents, text, pooled, timestep).sample


class PixArt:
    name, noised = "pixart", staticmethod(ddpm)
    trained = re.compile(r"\.attn1\.to_(q|k|v|out)\.")
    text_tokens = 0  # attn2 alone sees the text

    def write(self, folder, seed):
        model = PixArtTransformer2DModel(
            sample_size=SIDE, patch_size=PATCH, in_channels=CHANNELS, out_channels=2 * CHANNELS, num_layers=BLOCKS,
            attention_head_dim=HEAD_DIM, num_attention_heads=HEADS, cross_attention_dim=WIDTH,
            caption_channels=TEXT_CHANNELS, use_additional_conditions=False,
        )
        pipe = PixArtSigmaPipeline(
            transformer=seeded.fill(model, f"{self.name}/{seed}/"),
            scheduler=DPMSolverMultistepScheduler(
                beta_start=1e-4, beta_end=0.02, beta_schedule="linear", solver_order=2, algorithm_type="dpmsolver++"
            ),
            vae=vae(),
            text_encoder=tiny.t5("text_encoder/", TEXT_CHANNELS, 2),
            tokenizer=tiny.t5_tokenizer(),
        )
        text, text_mask, _, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
        teach(self, model, {"text": text.detach(), "text_mask": text_mask}, seed)
        pipe.save_pretrained(folder)
        return [folder]

    def read(self, folder):
        return PixArtTransformer2DModel.from_pretrained(folder / "transformer")

    def set_mask(self, model, mask):
        for block in model.transformer_blocks:
            families.window(block.attn1, mask)

    def predict(self, model, latents, timestep, text, text_mask):
        sizes = {"resolution": None, "aspect_ratio": None}
        mask = text_mask.float()
        return model(latents, text, timestep, added_cond_kwargs=sizes, encoder_attention_mask=mask).sample


class DiT:
    name, noised = "dit", staticmethod(ddpm)
    trained = PixArt.trained
    text_tokens = 0
    set_mask = PixArt.set_mask

    def write(self, folder, seed):
        model = DiTTransformer2DModel(
            sample_size=SIDE, patch_size=PATCH, in_channels=CHANNELS, out_channels=2 * CHANNELS, num_layers=BLOCKS,
            attention_head_dim=HEAD_DIM, num_attention_heads=HEADS, num_embeds_ada_norm=CLASSES,
        )
        teach(self, seeded.fill(model, f"{self.name}/{seed}/"), {"classes": torch.arange(CLASSES + 1)}, seed)
        DiTPipeline(
            transformer=model,
            vae=vae(),
            scheduler=DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False),
        ).save_pretrained(folder)
        return [folder]

    def read(self, folder):
        return DiTTransformer2DModel.from_pretrained(folder / "transformer")

    def predict(self, model, latents, timestep, classes):
        return model(latents, timestep, classes.long()).sample


class SiT:
    """A checkpoint in the names of its authors, with a VAE beside it."""

    name, noised = "sit", staticmethod(reversed_flow)
    trained = re.compile(r"\.attn\.(qkv|proj)\.")
    text_tokens = 0
    set_mask = staticmethod(original.set_mask)

    def model(self):
        return original.SiT(
            input_size=SIDE, patch_size=PATCH, in_channels=CHANNELS, hidden_size=WIDTH, depth=BLOCKS, num_heads=HEADS,
            num_classes=CLASSES,
        )

    def write(self, folder, seed):
        model = seeded.fill(self.model(), f"sit/{seed}/", leave=["pos_embed"])
        teach(self, model, {"classes": torch.arange(CLASSES + 1)}, seed)
        vae().save_pretrained(folder / "components/vae")
        save_file(model.state_dict(), folder / "sit.safetensors")
        families.json_file(folder / "config.json", {"attention_head_dim": HEAD_DIM})
        return [folder / "sit.safetensors", "--family", "sit", "--config", folder / "config.json",
                "--components", folder / "components"]

    def read(self, folder):
        model = self.model()
        model.load_state_dict(load_file(folder / "sit.safetensors"))
        return model.eval()

    def predict(self, model, latents, timestep, classes):
        return model(latents, timestep, classes)


class Samples(SampleSet):
    """With the prompts of members, of which some are left out."""

    def conditions(self, members, left_out):
        rows = [self.embeddings[-1 if out else member % self.prompts] for member, out in zip(members, left_out)]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class Peer:
    """Teacher and student in PyTorch."""

    def __init__(self, family, folder, samples, record):
        self.family, self.record = family, record
        self.samples, self.held_out = Samples(samples), Samples(next(samples.glob("held-out-*")))
        self.teacher, self.student = (family.read(folder).requires_grad_(False) for _ in range(2))
        family.set_mask(self.student, families.clear_mask(GRID, GRID, family.text_tokens, RADIUS))
        parameters = self.student.named_parameters()
        self.trained = [p.requires_grad_() for name, p in parameters if family.trained.search(name)]

    def predictions(self, noised, conditions):
        """The teacher's and the student's."""
        latents, timestep, _ = noised
        with torch.no_grad():
            taught = self.family.predict(self.teacher, latents, timestep, **conditions)
        return taught, self.family.predict(self.student, latents, timestep, **conditions)

    def draw(self, random):
        """In clearform's order: members one by one, levels, prompts left out, noise."""
        samples, count = self.samples, self.record["batch"]
        members = [torch.randint(0, samples.count, (1,), generator=random).item() for _ in range(count)]
        level = torch.rand(count, generator=random)
        left_out = (torch.rand(count, generator=random) < UNCONDITIONAL).tolist()
        noise = torch.randn(count, *samples.latents.shape[1:], generator=random)
        return self.family.noised(samples.latents[members], noise, level), samples.conditions(members, left_out)

    def rate(self, step):
        steps = self.record["steps"]
        rise = min(1, (step + 1) / max(1, min(WARMUP, steps // 9)))
        wave = 0.5 * (1 + math.cos(math.pi * step / steps))
        return self.record["learning_rate"] * rise * (FLOOR + (1 - FLOOR) * wave)

    def train(self):
        random = torch.Generator().manual_seed(self.record["seed"])
        optimizer = torch.optim.AdamW(self.trained, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
        for step in range(self.record["steps"]):
            optimizer.param_groups[0]["lr"] = self.rate(step)
            taught, own = self.predictions(*self.draw(random))
            optimizer.zero_grad()
            F.mse_loss(own, taught).backward()
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            optimizer.step()

    @torch.no_grad()
    def error(self):
        """On held-out samples, without the variance that DiT and PixArt predict too."""
        random = torch.Generator().manual_seed(NOISE_SEED)
        latents, members = self.held_out.latents, range(self.held_out.count)
        conditions = self.held_out.conditions(members, [False] * len(members))
        errors = []
        for level in LEVELS:
            noise = torch.randn(latents.shape, generator=random)
            noised = self.family.noised(latents, noise, torch.full((len(members),), level))
            taught, own = (out[:, :CHANNELS].double() for out in self.predictions(noised, conditions))
            errors.append((own - taught).square().mean().item())
        return sum(errors) / len(errors)


def convert(options, folder, source, seed):
    """What clearform records of a distillation. Its samples are in `folder`, its progress in a file there."""
    command = [options.clearform, "convert", *source, "-o", folder / "out", "--radius", RADIUS, "--seed", seed,
               "--steps", options.steps, "--batch", 8, "--lr", 8e-3, "--losses", "0,1,0",
               "--samples", folder / "samples", "--images-every", 0, "--threads", 1]
    with open(folder / "convert.log", "w") as log:
        subprocess.run(list(map(str, command)), stdout=log, stderr=log, check=True)
    return tomllib.loads((folder / "out/clearform.toml").read_text())["distillation"]


def compare(options, family, seed):
    """Prints a row; the ratio."""
    folder = options.work / f"{family.name}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = folder / "model"
    model.mkdir()
    record = convert(options, folder, family.write(model, seed), seed)
    verdict = record["verdict"]
    peer = Peer(family, model, folder / "samples", record)
    before, told = peer.error(), verdict["error_before"]
    if abs(before - told) > AGREEMENT * before:
        sys.exit(f"{family.name}: the error before training is {before} in PyTorch, {told} in clearform")
    peer.train()
    left, left_in_pytorch = verdict["error_after"] / told, peer.error() / before
    print(f"{family.name:8}{seed:5}{told:15.6f}{told / verdict['power']:12.1%}{left:20.2%}{left_in_pytorch:18.2%}"
          f"{left / left_in_pytorch:8.3f}", flush=True)
    return left / left_in_pytorch


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--clearform", type=Path, default=Path("target/release/clearform"))
    parser.add_argument("--families", nargs="+", default=["sd3", "pixart", "dit", "sit"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)

    print("family   seed   error before    of power   left by clearform   left by PyTorch   ratio")
    chosen = [family for family in (Sd3(), PixArt(), DiT(), SiT()) if family.name in options.families]
    ratios = [compare(options, family, seed) for family in chosen for seed in options.seeds]
    sys.exit(max(ratios) > MOST_RATIO)


if __name__ == "__main__":
    main()
