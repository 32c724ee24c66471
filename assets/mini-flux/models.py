"""The parts of a FLUX pipeline at toy size: tokenizers, configurations, and
the arithmetic of `FluxPipeline` that training has to repeat exactly."""

import io
import json
import math
import re
from collections import Counter
from dataclasses import dataclass

import sentencepiece
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

import dataset

TOKENS = 16  # text tokens, for CLIP and for T5
GRID = 16  # image tokens along a side, each 2 x 2 latents of 4 channels
BATCH = 16
TEXT = 96  # width of both text encoders
SHIFT = 3.0  # of the noise schedule, at 256 image tokens
CLIP_MERGES = 300
T5_VOCABULARY = 512


def corpus():
    lines = [line for name in dataset.names() for line in dataset.prompts(name)]
    return lines + [line.capitalize() for line in lines]


def clip_merges(words, count):
    """Byte-pair merges, most frequent first, the way CLIP's were learnt."""
    split = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    merges = []
    for _ in range(count):
        pairs = Counter()
        for word, parts in split.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        split = {word: merge(parts, best) for word, parts in split.items()}
    return merges


def merge(parts, pair):
    out, i = [], 0
    while i < len(parts):
        step = 2 if parts[i : i + 2] == pair else 1
        out.append("".join(parts[i : i + step]))
        i += step
    return tuple(out)


def clip_tokenizer(folder):
    """Bytes, bytes that end a word, merges, and the end token last of all."""
    words = Counter(re.findall(r"[a-z]+|[^\sa-z]", " ".join(corpus()).lower()))
    merges = clip_merges(words, CLIP_MERGES)
    letters = list(bytes_to_unicode().values())
    tokens = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, rules = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    rules.write_text("\n".join(["#version: 0.2", *(" ".join(m) for m in merges)]) + "\n")
    return CLIPTokenizer(str(vocabulary), str(rules), model_max_length=TOKENS)


def t5_tokenizer(folder):
    """A SentencePiece Unigram model with T5's special tokens."""
    model = io.BytesIO()
    printable = "".join(map(chr, range(33, 127)))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, model_type="unigram",
        vocab_size=T5_VOCABULARY - 112, hard_vocab_limit=False, required_chars=printable,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "spiece.model"
    path.write_bytes(model.getvalue())
    return T5TokenizerFast(vocab_file=str(path), model_max_length=TOKENS)


def new_vae():
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[16, 32, 64], layers_per_block=1, latent_channels=4,
        norm_num_groups=8, sample_size=dataset.SIZE, mid_block_add_attention=True,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0, scaling_factor=1.0)


def new_transformer():
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=4,
        attention_head_dim=32, num_attention_heads=6, joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT, guidance_embeds=False, axes_dims_rope=(8, 12, 12))
    start_as_identity(transformer)
    return transformer


@torch.no_grad()
def start_as_identity(transformer):
    """Zeros in every modulation and in the last layer, as DiT starts (adaLN-Zero)."""
    for name, parameter in transformer.named_parameters():
        if re.search(r"norm(1|1_context|_out)?\.linear\.|^proj_out\.", name):
            parameter.zero_()


def new_clip(tokenizer):
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT, projection_dim=TEXT, intermediate_size=256,
        num_hidden_layers=1, num_attention_heads=3, max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def new_t5(tokenizer):
    assert len(tokenizer) <= T5_VOCABULARY
    return T5EncoderModel(T5Config(
        vocab_size=T5_VOCABULARY, d_model=TEXT, d_kv=32, d_ff=256, num_layers=1, num_heads=3,
        feed_forward_proj="gated-gelu", dropout_rate=0.0))


def new_scheduler():
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift=SHIFT, base_shift=math.log(SHIFT), max_shift=1.15,
        base_image_seq_len=GRID * GRID, max_image_seq_len=4096)


def new_pipeline(work):
    tokenizer = clip_tokenizer(work / "tokenizers" / "clip")
    tokenizer_2 = t5_tokenizer(work / "tokenizers" / "t5")
    return FluxPipeline(
        scheduler=new_scheduler(), vae=new_vae(), text_encoder=new_clip(tokenizer),
        tokenizer=tokenizer, text_encoder_2=new_t5(tokenizer_2), tokenizer_2=tokenizer_2,
        transformer=new_transformer())


def token_table(pipe):
    """Token ids of every form of every name, for CLIP and T5: `[name, form, token]`."""
    lines = [line for name in dataset.names() for line in dataset.prompts(name)]
    options = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
    tables = [t(lines, **options).input_ids for t in (pipe.tokenizer, pipe.tokenizer_2)]
    return [table.view(-1, len(dataset.FORMS), TOKENS) for table in tables]


def encode(vae, pictures):
    """Scaled and packed latents, `[n, 256, 16]`, of the posterior's mean."""
    z = torch.cat([vae.encode(x).latent_dist.mean for x in pictures.split(16)])
    z = (z - vae.config.shift_factor) * vae.config.scaling_factor
    return FluxPipeline._pack_latents(z, len(z), 4, 2 * GRID, 2 * GRID)


def positions():
    text = torch.zeros(TOKENS, 3)
    return text, FluxPipeline._prepare_latent_image_ids(1, GRID, GRID, "cpu", torch.float32)


@dataclass
class Batch:
    """Pictures on their straight path to noise, at the image tokens `kept`."""

    index: torch.Tensor  # of the pictures
    form: torch.Tensor  # of their prompts
    x: torch.Tensor
    t: torch.Tensor
    velocity: torch.Tensor
    kept: torch.Tensor


def batch_of(latents, step, seed, tokens, generator):
    """`BATCH` of the latents `[n, 256, 16]`, each with `tokens` random image tokens.

    t is logit-normal and shifted, one draw from each of `BATCH` equal strata.
    """
    index = next_indices(len(latents), step, seed)
    form = torch.multinomial(torch.tensor(dataset.FORM_ODDS), BATCH, replacement=True, generator=generator)
    level = (torch.randperm(BATCH, generator=generator) + torch.rand(BATCH, generator=generator)) / BATCH
    t = torch.sigmoid(torch.special.ndtri(level.clamp(1e-4, 1 - 1e-4)))
    t = SHIFT * t / (1 + (SHIFT - 1) * t)
    kept = torch.randperm(latents.shape[1], generator=generator)[:tokens].sort().values
    clean = latents[index][:, kept]
    noise = torch.randn(clean.shape, generator=generator)
    x = torch.lerp(clean, noise, t.view(-1, 1, 1))
    return Batch(index, form, x, t, noise - clean, kept)


def next_indices(count, step, seed):
    """The step's indices: every item once before any comes again."""
    start = step * BATCH
    orders = [torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_000 + epoch))
              for epoch in (start // count, start // count + 1)]
    return torch.cat(orders)[start % count :][:BATCH]


def encode_text(pipe, ids):
    """What `FluxPipeline.encode_prompt` makes of CLIP's and T5's tokens: no mask."""
    pooled = pipe.text_encoder(ids[0]).pooler_output
    return pipe.text_encoder_2(ids[1])[0], pooled


def inputs(batch, text):
    """The arguments that a transformer and a ControlNet have in common."""
    text_ids, image_ids = positions()
    return {"hidden_states": batch.x, "timestep": batch.t, "encoder_hidden_states": text[0],
            "pooled_projections": text[1], "txt_ids": text_ids, "img_ids": image_ids[batch.kept],
            "return_dict": False}


def flow_loss(transformer, batch, text, **residuals):
    got = transformer(**inputs(batch, text), **residuals)[0]
    return (got - batch.velocity).square().mean()
