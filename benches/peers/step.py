"""The peer of `clearform bench step`: the same FLUX transformer in diffusers on PyTorch, with full attention.

    python step.py CLEARFORM --grid 64x64 --width 1536 --double 2 --single 4 --dtype f32

CLEARFORM is the binary. torch 2.13 and, except with --alone, diffusers 0.35.2 or 0.42.1. Both have random weights of the
same sizes. Prints one JSON object: medians in milliseconds, grid by grid, ours under each of --attention.
"""

import json

import torch

import alternation


def arguments():
    parser = alternation.parser(__doc__)
    parser.add_argument("--grid", nargs="+", default=["64x64"])
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--double", type=int, default=2)
    parser.add_argument("--single", type=int, default=4)
    parser.add_argument("--attention", nargs="+", default=["full", "clear:r=16"])
    parser.add_argument("--alone", action="store_true", help="without diffusers")
    return alternation.parse(parser)


def transformer(args):
    from diffusers import FluxTransformer2DModel  # --alone goes without

    axis = args.head_dim * 7 // 16 // 2 * 2
    sizes = dict(in_channels=64, num_layers=args.double, num_single_layers=args.single, guidance_embeds=True,
                 attention_head_dim=args.head_dim, num_attention_heads=args.width // args.head_dim,
                 joint_attention_dim=4096, pooled_projection_dim=768,
                 axes_dims_rope=(args.head_dim - 2 * axis, axis, axis))
    # Created on its device and in its dtype: in f32 the largest would not fit together with a copy.
    torch.set_default_dtype(alternation.DTYPES[args.dtype])
    with torch.device(args.device):
        model = FluxTransformer2DModel(**sizes).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return model


def inputs(args, grid):
    dtype, device = alternation.DTYPES[args.dtype], args.device
    height, width = map(int, grid.split("x"))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float().to(device)
    random = lambda *shape: torch.randn(*shape, dtype=dtype, device=device)
    return dict(hidden_states=random(1, height * width, 64), encoder_hidden_states=random(1, args.text, 4096),
                pooled_projections=random(1, 768), timestep=torch.tensor([0.5], dtype=dtype, device=device),
                guidance=torch.tensor([3.5], dtype=dtype, device=device), img_ids=ids,
                txt_ids=torch.zeros(args.text, 3, device=device))


def peers(args):
    if args.alone:
        return {}
    model = transformer(args)

    def peer(given):
        def call():
            with torch.no_grad():
                model(**given)

        def milliseconds():
            model.to(args.device)
            found = alternation.timed(call, args.device)
            if args.device != "cpu":
                # Ours needs the memory.
                model.to("cpu")
                torch.cuda.empty_cache()
            return found

        return milliseconds

    return {(grid, "diffusers"): peer(inputs(args, grid)) for grid in args.grid}


def main():
    args = arguments()
    sizes = ["--width", str(args.width), "--double", str(args.double), "--single", str(args.single)]
    ours = lambda grid, plan: lambda: alternation.clearform(
        args, "step", *sizes, "--grid", grid, "--attention", plan)["median_ms"]
    ours = {(grid, plan): ours(grid, plan) for grid in args.grid for plan in args.attention}
    medians = alternation.alternate(ours, peers(args), args.rounds)
    by_grid = {grid: {name: ms for (of, name), ms in medians.items() if of == grid} for grid in args.grid}
    print(json.dumps({"milliseconds": by_grid}))


if __name__ == "__main__":
    main()
