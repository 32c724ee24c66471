"""The peer of `clearform distill`: the same distillation in PyTorch and diffusers, on the same samples.

    python distil.py BASE SAMPLES HELD_OUT --radius 4 --steps 120 --warmup 13 --losses 1 0.5 0.5 --every 2

Versions: torch 2.13, diffusers 0.35.2 or 0.42.1, safetensors. BASE is a FLUX pipeline folder. SAMPLES and HELD_OUT are
folders that clearform made (set.json, prompt-*.safetensors, ids.safetensors, batch-*.safetensors); HELD_OUT has names
that no sample used. Choice of samples, noise levels and noise come from torch.Generator in the same order as in
clearform, so both see the same values.

With `--student MODEL` nothing is trained: the model that clearform distilled is evaluated in the same way.

Prints one JSON object: the mean squared error of the student's prediction against the teacher's on HELD_OUT, noised by
fixed noise at fixed levels, and the PSNR of fully sampled images against the teacher's, before and after.
"""

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.models.transformers import transformer_flux
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from safetensors.torch import load_file

TRAINED = (".attn.to_q.", ".attn.to_k.", ".attn.to_v.", ".attn.to_out.")
EVALUATION_SEED = 1234
PICTURE_SEED = 0


class SampleSet:
    """A folder of samples as clearform writes it."""

    def __init__(self, folder):
        self.settings = json.loads((folder / "set.json").read_text())
        self.count, self.prompts = self.settings["count"], len(self.settings["prompts"])
        self.ids = load_file(folder / "ids.safetensors")
        self.embeddings = [load_file(path) for path in sorted(folder.glob("prompt-*.safetensors"))]
        self.latents = torch.cat([load_file(path)["latents"] for path in sorted(folder.glob("batch-*.safetensors"))])

    def conditions(self, members):
        rows = [self.embeddings[member % self.prompts] for member in members]
        text = torch.stack([row["text"] for row in rows]).float()
        conditions = dict(
            encoder_hidden_states=text,
            pooled_projections=torch.stack([row["pooled"] for row in rows]).float(),
            img_ids=self.ids["image_ids"].float(),
            txt_ids=self.ids["text_ids"].float() if "text_ids" in self.ids else torch.zeros(text.shape[1], 3),
        )
        if self.settings["guidance"] is not None:
            conditions["guidance"] = torch.full((len(members),), float(self.settings["guidance"]))
        return conditions

    def noised(self, members, t, noise):
        level = t.view(-1, 1, 1)
        x0 = self.latents[members]
        inputs = dict(hidden_states=(1 - level) * x0 + level * noise, timestep=t, **self.conditions(members))
        return inputs, noise - x0


class Clear:
    """Takes the place of diffusers' attention; `weights` are the spatial weights by layer, if pooled."""

    def __init__(self, image_ids, text, radius):
        places = image_ids[:, 1:]
        self.height, self.width = (int(extent) + 1 for extent in places.max(0).values)
        self.text = text
        self.mask = torch.ones(text + len(places), text + len(places), dtype=torch.bool)
        self.mask[text:, text:] = ((places[:, None] - places[None]) ** 2).sum(-1) < radius * radius
        self.weights, self.calls, self.on = None, 0, False

    def __call__(self, query, key, value, attn_mask=None, **_):
        if not self.on:
            return attention(query, key, value, None)
        if self.weights is None:
            return attention(query, key, value, self.mask)
        weight = self.weights[self.calls % len(self.weights)].squeeze()
        self.calls += 1
        keys, values = self.pooled(key, weight), self.pooled(value, weight)
        sees = torch.zeros(query.shape[1], keys.shape[1], dtype=torch.bool)
        sees[self.text :] = True
        return attention(query, torch.cat([key, keys], 1), torch.cat([value, values], 1), torch.cat([self.mask, sees], 1))

    def pooled(self, tensor, weight):
        """Border cells: the weights of the tokens they hold, scaled to the sum of all."""
        batch, _, heads, dim = tensor.shape
        d = weight.shape[0]
        grid = tensor[:, self.text :].reshape(batch, self.height, self.width, heads * dim).permute(0, 3, 1, 2)
        padding = (0, -self.width % d, 0, -self.height % d)
        cells = F.conv2d(F.pad(grid, padding).reshape(-1, 1, self.height + padding[3], self.width + padding[1]),
                         weight[None, None].to(grid.dtype), stride=d)
        present = F.conv2d(F.pad(torch.ones(1, 1, self.height, self.width), padding), weight[None, None], stride=d)
        cells = cells * (weight.sum() / present).to(cells.dtype)
        return cells.reshape(batch, heads, dim, -1).permute(0, 3, 1, 2)


def attention(query, key, value, mask):
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


class Distillation:
    def __init__(self, arguments, samples):
        self.arguments = arguments
        self.samples = samples
        self.teacher = FluxTransformer2DModel.from_pretrained(arguments.base / "transformer").float().requires_grad_(False)
        self.student = copy.deepcopy(self.teacher)
        text = samples.embeddings[0]["text"].shape[0]
        self.clear = Clear(samples.ids["image_ids"].float(), text, arguments.radius)
        transformer_flux.dispatch_attention_fn = self.clear
        self.trained = [p for name, p in self.student.named_parameters() if any(part in name for part in TRAINED)]
        if arguments.pool:
            d, layers = arguments.pool, len(self.student.transformer_blocks) + len(self.student.single_transformer_blocks)
            self.clear.weights = [torch.full((d, d), 1 / d**2) for _ in range(layers)]
            self.trained += self.clear.weights
        for parameter in self.trained:
            parameter.requires_grad_(True)
        self.kept = []
        for model in (self.teacher, self.student):
            for block in list(model.single_transformer_blocks)[:: arguments.every]:
                block.attn.register_forward_hook(lambda _module, _inputs, out: self.kept.append(out))

    def predict(self, model, inputs):
        """The prediction, and the attention outputs of the watched blocks."""
        self.clear.on = model is self.student
        self.kept.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.arguments.bf16):
            out = model(**inputs, return_dict=False)[0]
        return out.float(), [kept.float() for kept in self.kept]

    def loss(self, inputs, target):
        with torch.no_grad():
            taught, taught_attention = self.predict(self.teacher, inputs)
        own, own_attention = self.predict(self.student, inputs)
        denoising, prediction, attention = self.arguments.losses
        loss = denoising * ((own - target) ** 2).mean() + prediction * ((own - taught) ** 2).mean()
        if attention == 0:
            return loss
        terms = [((a - b) ** 2).mean() for a, b in zip(own_attention, taught_attention, strict=True)]
        return loss + attention * sum(terms) / len(terms)

    def draw(self, random):
        """In clearform's order: members one by one, levels, noise."""
        count = self.arguments.batch
        members = [torch.randint(0, self.samples.count, (1,), generator=random).item() for _ in range(count)]
        t = torch.rand(count, generator=random)
        noise = torch.randn(count, *self.samples.latents.shape[1:], generator=random)
        return self.samples.noised(members, t, noise)

    def rate(self, step):
        a = self.arguments
        rise = min(1, (step + 1) / a.warmup) if a.warmup else 1
        return a.lr * rise * (a.floor + (1 - a.floor) * 0.5 * (1 + math.cos(math.pi * step / a.steps)))

    def read(self, model):
        """Takes the student's parameters from a portable model."""
        tensors = {}
        for path in sorted((model / "transformer").glob("*.safetensors")):
            tensors.update({name: value.float() for name, value in load_file(path).items()})
        blocks = [("transformer_blocks", len(self.student.transformer_blocks)),
                  ("single_transformer_blocks", len(self.student.single_transformer_blocks))]
        layers = [f"{kind}.{n}.attn.processor.spatial_weight" for kind, count in blocks for n in range(count)]
        if self.clear.weights is not None:
            self.clear.weights = [tensors.pop(layer).squeeze() for layer in layers]
        self.student.load_state_dict(tensors)

    def train(self):
        random = torch.Generator().manual_seed(self.arguments.seed)
        optimizer = torch.optim.AdamW(self.trained, lr=self.arguments.lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
        for step in range(self.arguments.steps):
            optimizer.param_groups[0]["lr"] = self.rate(step)
            loss = self.loss(*self.draw(random))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            optimizer.step()
            if step % 20 == 0 or step + 1 == self.arguments.steps:
                print(f"step {step} loss {loss.item():.6f}", file=sys.stderr, flush=True)


@torch.no_grad()
def prediction_error(distillation, held_out, batch):
    """Every sample once, as clearform's `noised`: levels, then noise, batch by batch."""
    random = torch.Generator().manual_seed(EVALUATION_SEED)
    total, count = 0.0, 0
    for first in range(0, held_out.count, batch):
        members = list(range(first, min(first + batch, held_out.count)))
        t = torch.rand(len(members), generator=random)
        noise = torch.randn(len(members), *held_out.latents.shape[1:], generator=random)
        inputs, _ = held_out.noised(members, t, noise)
        taught, own = (distillation.predict(model, inputs)[0] for model in (distillation.teacher, distillation.student))
        total += ((own - taught) ** 2).double().sum().item()
        count += own.numel()
    return total / count


def packed_noise(held_out, height, width, channels):
    """Noise of each held-out sample from a seed of its own, drawn as latents and packed to tokens."""
    one = lambda seed: torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(seed))
    noise = torch.cat([one(PICTURE_SEED + index) for index in range(held_out.count)])
    packed = noise.view(-1, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return packed.reshape(held_out.count, -1, channels * 4)


@torch.no_grad()
def pictures(distillation, model, held_out, vae, scheduler, steps, noise=None):
    """Fully sampled images of the held-out names in 0..1, each from its own noise."""
    height, width = 2 * distillation.clear.height, 2 * distillation.clear.width
    channels = held_out.latents.shape[-1] // 4
    x = packed_noise(held_out, height, width, channels) if noise is None else noise
    config = scheduler.config
    mu = calculate_shift(x.shape[1], config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    conditions = held_out.conditions(range(held_out.count))
    for t in scheduler.timesteps:
        inputs = dict(hidden_states=x, timestep=(t / 1000).expand(len(x)), **conditions)
        x = scheduler.step(distillation.predict(model, inputs)[0], t, x, return_dict=False)[0]
    x = x.view(-1, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)
    decoded = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
    return (decoded / 2 + 0.5).clamp(0, 1)


def psnr(a, b):
    return -10 * math.log10(max(((a - b) ** 2).mean().item(), 1e-12))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--student", type=Path, help="a model that clearform distilled, instead of training")
    parser.add_argument("--radius", type=float, default=16.0)
    parser.add_argument("--pool", type=int)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--floor", type=float, default=0.02, help="share of the learning rate left at the end")
    parser.add_argument("--losses", type=float, nargs=3, default=(0.0, 1.0, 0.0), help="target, prediction, attention")
    parser.add_argument("--every", type=int, default=4, help="watch the attention of every so many-th single block")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture-steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="activations in bf16")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    distillation = Distillation(arguments, SampleSet(arguments.samples))
    held_out = SampleSet(arguments.held_out)
    vae = AutoencoderKL.from_pretrained(arguments.base / "vae").float()
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(arguments.base / "scheduler")
    draw = lambda model: pictures(distillation, model, held_out, vae, scheduler, arguments.picture_steps)
    wanted = draw(distillation.teacher)

    error_before, psnr_before = prediction_error(distillation, held_out, arguments.batch), psnr(draw(distillation.student), wanted)
    begun = time.monotonic()
    distillation.read(arguments.student) if arguments.student else distillation.train()
    seconds = time.monotonic() - begun
    error_after, psnr_after = prediction_error(distillation, held_out, arguments.batch), psnr(draw(distillation.student), wanted)
    print(json.dumps(dict(
        radius=arguments.radius, pool=arguments.pool, steps=arguments.steps, batch=arguments.batch, seconds=round(seconds, 1),
        error_before=error_before, error_after=error_after, error_share=error_after / error_before,
        psnr_before=psnr_before, psnr_after=psnr_after, psnr_gain=psnr_after - psnr_before,
    ), indent=2))


if __name__ == "__main__":
    main()
