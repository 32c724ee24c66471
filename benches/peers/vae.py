"""The peer of `clearform bench vae`: diffusers' AutoencoderKL on PyTorch decodes random latents of the same sizes.

    python vae.py CLEARFORM --model assets/mini-flux/base --size 512 1024
    python vae.py CLEARFORM --size 512                    # FLUX's shape, random weights

CLEARFORM is the binary. torch 2.13 and diffusers 0.42.1. Prints one JSON object: medians in milliseconds by size, and how
many times as fast ours is.
"""

import json
import pathlib
import subprocess
import tempfile

import torch
from diffusers import AutoencoderKL

import alternation

# FLUX.1's vae/config.json.
FLUX = dict(block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16, layers_per_block=2, norm_num_groups=32,
            sample_size=1024, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
            use_post_quant_conv=False)


def main():
    parser = alternation.parser(__doc__)
    parser.add_argument("--model", help="a pipeline; default: FLUX's shape with random weights")
    parser.add_argument("--size", nargs="+", type=int, default=[512])
    args = alternation.parse(parser)
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            torch.manual_seed(0)
            AutoencoderKL(**FLUX).save_pretrained(pathlib.Path(folder) / "vae")
        model = args.model or folder
        vae = AutoencoderKL.from_pretrained(model, subfolder="vae", torch_dtype=torch.float32).eval().requires_grad_(False)
        print(json.dumps({str(size): row(args, model, vae, size) for size in args.size}, indent=2))


def row(args, model, vae, size):
    edge = size // 2 ** (len(vae.config.block_out_channels) - 1)
    latents = torch.randn(1, vae.config.latent_channels, edge, edge)
    command = [args.clearform, "bench", "vae", model, "--size", str(size), "--repeat", "1", "--json"]
    command += ["--threads", str(args.threads)]

    def ours():
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        return json.loads(printed)["rows"][0]["median_ms"]

    def peer():
        with torch.inference_mode():
            return alternation.timed(lambda: vae.decode(latents), "cpu")

    medians = alternation.alternate({"clearform": ours}, {"diffusers": peer}, args.rounds)
    return medians | {"ratio": round(medians["diffusers"] / medians["clearform"], 2)}


if __name__ == "__main__":
    main()
