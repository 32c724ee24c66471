"""Writes a pipeline of FLUX.1-dev's real size with random weights: transformer (11.9 billion parameters), T5-XXL, CLIP-L and
VAE, to measure what the program takes on models that are as large as they are in use.

    python real_size.py FOLDER --pipeline assets/mini-flux/base --transformer bf16|q8_0|q4_k|q4_0

FOLDER gets a diffusers pipeline, whose tokenizers and scheduler are those of `--pipeline`, and transformer.gguf or
transformer/. torch, numpy, safetensors, gguf; 34 GB of disk with bf16. What is there already is kept.
"""

import argparse
import json
import pathlib
import shutil

import gguf
import numpy as np

POOL = 1 << 22  # different values; tensors repeat them
WIDTH, DOUBLE, SINGLE = 3072, 19, 38
QUANTISED = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0, "q4_k": gguf.GGMLQuantizationType.Q4_K}


def linear(name, rows, columns):
    return [(f"{name}.weight", (rows, columns)), (f"{name}.bias", (rows,))]


def flux():
    """Names and shapes in the layout of Black Forest Labs."""
    tensors = linear("img_in", WIDTH, 64) + linear("txt_in", WIDTH, 4096)
    for name, columns in [("time_in", 256), ("guidance_in", 256), ("vector_in", 768)]:
        tensors += linear(f"{name}.in_layer", WIDTH, columns) + linear(f"{name}.out_layer", WIDTH, WIDTH)
    for block in range(DOUBLE):
        for stream in ["img", "txt"]:
            prefix = f"double_blocks.{block}.{stream}"
            tensors += linear(f"{prefix}_mod.lin", 6 * WIDTH, WIDTH)
            tensors += linear(f"{prefix}_attn.qkv", 3 * WIDTH, WIDTH) + linear(f"{prefix}_attn.proj", WIDTH, WIDTH)
            tensors += [(f"{prefix}_attn.norm.{norm}_norm.scale", (128,)) for norm in ["query", "key"]]
            tensors += linear(f"{prefix}_mlp.0", 4 * WIDTH, WIDTH) + linear(f"{prefix}_mlp.2", WIDTH, 4 * WIDTH)
    for block in range(SINGLE):
        prefix = f"single_blocks.{block}"
        tensors += linear(f"{prefix}.modulation.lin", 3 * WIDTH, WIDTH) + linear(f"{prefix}.linear1", 7 * WIDTH, WIDTH)
        tensors += linear(f"{prefix}.linear2", WIDTH, 5 * WIDTH)
        tensors += [(f"{prefix}.norm.{norm}_norm.scale", (128,)) for norm in ["query", "key"]]
    return tensors + linear("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH) + linear("final_layer.linear", 64, WIDTH)


def t5():
    tensors = [("shared.weight", (32128, 4096)), ("encoder.final_layer_norm.weight", (4096,)),
               ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 64))]
    for block in range(24):
        prefix = f"encoder.block.{block}.layer"
        tensors += [(f"{prefix}.0.SelfAttention.{name}.weight", (4096, 4096)) for name in "qkvo"]
        tensors += [(f"{prefix}.1.DenseReluDense.{name}.weight", (10240, 4096)) for name in ["wi_0", "wi_1"]]
        tensors += [(f"{prefix}.1.DenseReluDense.wo.weight", (4096, 10240))]
        tensors += [(f"{prefix}.{layer}.layer_norm.weight", (4096,)) for layer in [0, 1]]
    return tensors


def spread(shape):
    """Keeps activations near 1 through all layers."""
    return 0.4 / np.sqrt(shape[-1]) if len(shape) > 1 else 0.1


def values(pool, name, shape):
    """A weight of a norm is near 1."""
    count = int(np.prod(shape))
    drawn = np.resize(np.roll(pool, len(name) * 7919), count) * spread(shape)
    return (1 + drawn if len(shape) == 1 and ("norm" in name) else drawn).reshape(shape)


def bf16(array):
    return (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def save_safetensors(path, tensors, pool):
    if path.exists():
        return
    header, end = {}, 0
    for name, shape in tensors:
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors:
            bf16(values(pool, name, shape)).tofile(file)


def save_gguf(path, tensors, pool, kind):
    if path.exists():
        return
    writer = gguf.GGUFWriter(path, "flux")
    blocks = gguf.quants.quantize(pool[: 1 << 20].astype(np.float32), kind) if kind.name != "Q4_K" else q4_k()
    block_size, type_size = gguf.GGML_QUANT_SIZES[kind]
    for name, shape in tensors:
        if len(shape) == 1 or shape[-1] % block_size:
            writer.add_tensor(name, values(pool, name, shape).astype(np.float32))
            continue
        row = shape[-1] // block_size * type_size
        scaled = scaled_blocks(blocks.reshape(-1, type_size), kind, spread(shape))
        writer.add_tensor(name, np.resize(scaled, (shape[0], row)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def q4_k(count=4096):
    """Blocks of Q4_K, which the gguf package cannot quantise: scales of 8 and minima of 60 of 64, so that values lie around 0."""
    generator = np.random.default_rng(1)
    blocks = generator.integers(0, 256, (count, 144), dtype=np.uint8)
    blocks[:, 4:16] = 8
    return blocks


def scaled_blocks(blocks, kind, scale):
    """The blocks with a scale that gives values of this spread."""
    blocks = blocks.copy()
    unit = {"Q8_0": 1.0, "Q4_0": 1.0, "Q4_K": 1.0}[kind.name]
    if kind.name == "Q4_K":
        blocks[:, 0:2] = np.frombuffer(np.float16(scale / 40).tobytes(), np.uint8)
        blocks[:, 2:4] = np.frombuffer(np.float16(scale / 5.3).tobytes(), np.uint8)
        return blocks
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float32) * scale * unit
    blocks[:, :2] = scales.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return blocks


def save_components(folder, pipeline, pool):
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    for name in ["tokenizer", "tokenizer_2", "scheduler"]:
        shutil.copytree(pipeline / name, folder / name, dirs_exist_ok=True)
    shutil.copy(pipeline / "model_index.json", folder)
    if not (folder / "vae").exists():
        AutoencoderKL(block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
                      up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16, layers_per_block=2, sample_size=1024,
                      scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
                      use_post_quant_conv=False).save_pretrained(folder / "vae")
    if not (folder / "text_encoder").exists():
        small = json.loads((pipeline / "text_encoder/config.json").read_text())
        CLIPTextModel(CLIPTextConfig(**{key: small[key] for key in ["bos_token_id", "eos_token_id", "pad_token_id"]},
                                     vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                     num_attention_heads=12, max_position_embeddings=77)).save_pretrained(folder / "text_encoder")
    (folder / "text_encoder_2").mkdir(exist_ok=True)
    config = {"architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64,
              "num_layers": 24, "vocab_size": 32128, "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 32}
    (folder / "text_encoder_2/config.json").write_text(json.dumps(config))
    save_safetensors(folder / "text_encoder_2/model.safetensors", t5(), pool)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--pipeline", type=pathlib.Path, required=True)
    parser.add_argument("--transformer", choices=["bf16", *QUANTISED], default="bf16")
    args = parser.parse_args()
    pool = np.random.default_rng(0).standard_normal(POOL)
    args.folder.mkdir(parents=True, exist_ok=True)
    save_components(args.folder, args.pipeline, pool)
    if args.transformer == "bf16":
        save_safetensors(args.folder / "transformer.safetensors", flux(), pool)
    else:
        save_gguf(args.folder / f"transformer-{args.transformer}.gguf", flux(), pool, QUANTISED[args.transformer])


if __name__ == "__main__":
    main()
