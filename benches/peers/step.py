"""The peer of `clearform bench step`: the same FLUX transformer in diffusers on PyTorch, with full attention.

    python step.py CLEARFORM --grid 64x64 --width 1536 --double 2 --single 4 --dtype f32

CLEARFORM is the binary. torch 2.13, diffusers 0.35.2 or 0.42.1. Both have random weights of the same sizes. Prints one
JSON object: medians in milliseconds and ratios; ours with full attention and with each of --attention.
"""

import argparse

import torch
from diffusers import FluxTransformer2DModel

import alternation


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clearform")
    parser.add_argument("--grid", default="64x64")
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--double", type=int, default=2)
    parser.add_argument("--single", type=int, default=4)
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--dtype", choices=alternation.DTYPES, default="f32")
    parser.add_argument("--attention", nargs="*", default=["clear:r=16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def peer(args):
    axis = args.head_dim * 7 // 16 // 2 * 2
    dtype, device = alternation.DTYPES[args.dtype], args.device
    sizes = dict(in_channels=64, num_layers=args.double, num_single_layers=args.single, guidance_embeds=True,
                 attention_head_dim=args.head_dim, num_attention_heads=args.width // args.head_dim,
                 joint_attention_dim=4096, pooled_projection_dim=768,
                 axes_dims_rope=(args.head_dim - 2 * axis, axis, axis))
    model = FluxTransformer2DModel(**sizes).to(device, dtype).eval().requires_grad_(False)
    height, width = map(int, args.grid.split("x"))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float().to(device)
    random = lambda *shape: torch.randn(*shape, dtype=dtype, device=device)
    inputs = dict(hidden_states=random(1, height * width, 64), encoder_hidden_states=random(1, args.text, 4096),
                  pooled_projections=random(1, 768), timestep=torch.tensor([0.5], dtype=dtype, device=device),
                  guidance=torch.tensor([3.5], dtype=dtype, device=device), img_ids=ids,
                  txt_ids=torch.zeros(args.text, 3, device=device))

    def call():
        with torch.no_grad():
            model(**inputs)

    return call


def main():
    args = arguments()
    if args.device == "cpu":
        torch.set_num_threads(2)
    command = [args.clearform, "bench", "step", "--grid", args.grid, "--width", str(args.width), "--repeat", "1",
               "--head-dim", str(args.head_dim), "--double", str(args.double), "--single", str(args.single),
               "--text", str(args.text), "--dtype", args.dtype]
    command += ["--device", args.device] if args.device != "cpu" else []
    with_plan = lambda plan: lambda: alternation.clearform([*command, "--attention", plan])["median_ms"]
    windowed = {f"clearform {plan}": with_plan(plan) for plan in args.attention}
    medians = alternation.alternate({"clearform": with_plan("full"), **windowed}, {"diffusers": peer(args)}, args)
    alternation.report(medians, {"grid": args.grid, "width": args.width, "dtype": args.dtype})


if __name__ == "__main__":
    main()
