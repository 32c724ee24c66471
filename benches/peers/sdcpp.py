"""stable-diffusion.cpp as a peer: a step of FLUX with quantised weights, both from the same file.

    python sdcpp.py CLEARFORM SD_CLI --format Q8_0 Q4_0 --size 1024 --attention full
    python sdcpp.py CLEARFORM SD_CLI --format Q8_0 --size 2048 --attention clear:r=16

SD_CLI is its program, built with GGML_NATIVE; it always computes full attention, with flash attention. The files are made
anew: a transformer of FLUX's width with 1 double and 2 single blocks and random weights, and a CLIP-L and a TAE, which it
does not run without. T5 is left out, so it has 256 text tokens, as we have. Prints one JSON object: medians in
milliseconds of a step, peak resident memory in MB, and how many times as fast ours is. torch, transformers, diffusers,
gguf, numpy.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import gguf
import numpy as np

import alternation

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import real_size  # noqa: E402

TEXT_TOKENS = 256


def transformer(path, kind):
    real_size.DOUBLE, real_size.SINGLE = 1, 2
    pool = np.random.default_rng(0).standard_normal(real_size.POOL)
    real_size.save_gguf(path, real_size.flux(), pool, gguf.GGMLQuantizationType[kind])


def clip(path):
    """CLIP-L in the names of Hugging Face's files; transformers 5 saves shorter ones."""
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                            num_attention_heads=12, max_position_embeddings=77)
    tensors = CLIPTextModel(config).half().state_dict()
    save_file({f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}, path)
    return path


def tae(path):
    from diffusers import AutoencoderTiny
    from safetensors.torch import save_file

    save_file({name: tensor.half() for name, tensor in AutoencoderTiny(latent_channels=16).state_dict().items()}, path)
    return path


def run(command):
    """What it printed, and its peak resident memory in MB."""
    environment = os.environ | {"LC_ALL": "C"}
    timed = ["/usr/bin/time", "-f", "peak %M", *map(str, command)]
    done = subprocess.run(timed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stdout[-3000:])
    return done.stdout, int(re.findall(r"peak (\d+)", done.stdout)[-1]) * 1024 / 1e6


def main():
    parser = alternation.parser(__doc__)
    parser.add_argument("sd_cli")
    parser.add_argument("--format", nargs="+", default=["Q8_0"], choices=["Q8_0", "Q4_0"])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--attention", default="full")
    parser.add_argument("--steps", type=int, default=2, help="of theirs, whose mean is taken")
    args = alternation.parse(parser)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        print(json.dumps({kind: row(args, folder, kind) for kind in args.format}, indent=2))


def row(args, folder, kind):
    model = folder / f"flux-{kind}.gguf"
    transformer(model, kind)
    # Without the head size in the file it would be asked for.
    side = args.size // 16
    grid = f"{side}x{side}"
    peaks = {}

    def ours():
        printed, peaks["clearform"] = run(
            [args.clearform, "bench", "model", model, "--grid", grid, "--attention", args.attention, "--dtype", "bf16",
             "--text", TEXT_TOKENS, "--repeat", 1, "--json", "--threads", args.threads])
        return json.loads(printed[:printed.rindex("}") + 1])["rows"][0]["median_ms"]

    parts = [clip(folder / "clip_l.safetensors"), tae(folder / "tae.safetensors")]

    def theirs():
        printed, peaks["stable-diffusion.cpp"] = run(
            [args.sd_cli, "--diffusion-model", model, "--clip_l", parts[0], "--tae", parts[1], "-p", "a fox", "--cfg-scale",
             1, "--guidance", 3.5, "--steps", args.steps, "-W", args.size, "-H", args.size, "-t", args.threads,
             "--diffusion-fa", "--sampling-method", "euler", "-o", folder / "out.png", "-v"])
        return float(re.findall(r"sampling completed, taking ([\d.]+)s", printed)[-1]) * 1e3 / args.steps

    medians = alternation.alternate({"clearform": ours}, {"stable-diffusion.cpp": theirs}, args.rounds)
    ratio = round(medians["stable-diffusion.cpp"] / medians["clearform"], 2)
    return medians | {"peak MB": peaks, "ratio": ratio}


if __name__ == "__main__":
    main()
