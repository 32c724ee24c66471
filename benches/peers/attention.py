"""The peers of `clearform bench attention`: PyTorch's full SDPA, and compiled FlexAttention with the same mask.

    python attention.py CLEARFORM --grid 64x64 --radius 16 --heads 4 --dtype f32 [--backward] [--attention full]

CLEARFORM is the binary. torch 2.13. On a GPU (--device cuda:0) also FlashAttention and NATTEN, where they are installed;
NATTEN's window is the square of 2 r - 1 tokens, without text, so it does a little more image work and no text work.
Prints one JSON object: medians in milliseconds, ratios, visited GFLOP/s of ours, and PyTorch's product rate.
"""

import argparse

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import alternation


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clearform")
    parser.add_argument("--grid", default="64x64")
    parser.add_argument("--radius", type=float, default=16)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--dtype", choices=alternation.DTYPES, default="f32")
    parser.add_argument("--attention", help="clearform's, instead of --radius")
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without", nargs="*", default=[], help="peers to leave out")
    return parser.parse_args()


def block_mask(args, tokens):
    width, text, limit = int(args.grid.split("x")[1]), args.text, args.radius**2

    def visible(batch, head, query, key):
        image_query, image_key = query - text, key - text
        rows = image_query // width - image_key // width
        columns = image_query % width - image_key % width
        return (query < text) | (key < text) | (rows * rows + columns * columns < limit)

    # Compiled, it never holds the whole mask; on a CPU that takes longer than it saves.
    return create_block_mask(visible, None, None, tokens, tokens, device=args.device, _compile=args.device != "cpu")


def peers(args):
    height, width = map(int, args.grid.split("x"))
    tokens = args.text + height * width
    shape = (1, args.heads, tokens, args.head_dim)
    dtype = alternation.DTYPES[args.dtype]
    q, k, v = (torch.randn(shape, dtype=dtype, device=args.device, requires_grad=args.backward) for _ in range(3))
    found = {"sdpa full": lambda: F.scaled_dot_product_attention(q, k, v)}
    # FlexAttention has no backward on a CPU.
    if "flex" not in args.without and not (args.backward and args.device == "cpu"):
        mask, flex = block_mask(args, tokens), torch.compile(flex_attention)
        found["flex"] = lambda: flex(q, k, v, block_mask=mask)
    if args.device != "cpu":
        found |= on_gpu(args, (q, k, v), (height, width))
    return {name: with_gradients(call, args.backward) for name, call in found.items() if name not in args.without}


def on_gpu(args, qkv, grid):
    found = {}
    q, k, v = (x.transpose(1, 2).contiguous() for x in qkv)
    try:
        from flash_attn import flash_attn_func
        found["flash full"] = lambda: flash_attn_func(q, k, v)
    except ImportError:
        pass
    try:
        from natten import na2d
        image = [x[:, args.text:].reshape(1, *grid, args.heads, args.head_dim) for x in (q, k, v)]
        found["natten"] = lambda: na2d(*image, kernel_size=min(int(2 * args.radius - 1), *grid))
    except ImportError:
        pass
    return found


def with_gradients(call, backward):
    if backward:
        return lambda: call().sum().backward()

    def forward():
        with torch.no_grad():
            call()

    return forward


def main():
    args = arguments()
    if args.device == "cpu":
        torch.set_num_threads(2)
    command = [args.clearform, "bench", "attention", "--grid", args.grid, "--radius", str(args.radius), "--repeat", "1"]
    command += ["--heads", str(args.heads), "--head-dim", str(args.head_dim), "--text", str(args.text)]
    command += ["--dtype", args.dtype] + ["--backward"] * args.backward
    command += ["--attention", args.attention] if args.attention else []
    command += ["--device", args.device] if args.device != "cpu" else []
    flops = []

    def ours():
        found = alternation.clearform(command)
        flops.append(found["visited_gflops"] * found["median_ms"])
        return found["median_ms"]

    medians = alternation.alternate({"clearform": ours}, peers(args), args)
    rate = alternation.product_rate(alternation.DTYPES[args.dtype], args.device)
    visited = flops[-1] / medians["clearform"]
    alternation.report(medians, {"visited_gflops": visited, "product_gflops": rate, "share": visited / rate})


if __name__ == "__main__":
    main()
