"""The peers of `clearform bench attention`: PyTorch's full SDPA, and compiled FlexAttention with the same mask.

    python attention.py CLEARFORM --grid 64x64 --radius 16 --heads 4 --dtype f32 [--backward] [--attention full]

CLEARFORM is the binary. torch 2.13, numpy. On a GPU (--device cuda:0) also FlashAttention, in the package flash_attn where
it is installed and else in PyTorch, and NATTEN where it is installed; its window is the square of 2 r - 1 tokens, without
text, so it does a little more image work and no text work. Prints one JSON object: medians in milliseconds, how many
times slower the peers are, our GFLOP/s on visited pairs, that of a matmul, and the ratio of the two.
"""

import json

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import alternation


def arguments():
    parser = alternation.parser(__doc__)
    parser.add_argument("--grid", default="64x64")
    parser.add_argument("--radius", type=float, default=16)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--attention", help="clearform's, instead of --radius")
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--without", nargs="*", default=[], help="peers to leave out: sdpa, flex, flash, natten")
    return alternation.parse(parser)


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
    found = {}
    # FlexAttention has no backward on a CPU.
    if "flex" not in args.without and not (args.backward and args.device == "cpu"):
        mask, flex = block_mask(args, tokens), torch.compile(flex_attention)
        found["flex"] = (lambda: flex(q, k, v, block_mask=mask)), (q, k, v)
    found["sdpa"] = (lambda: F.scaled_dot_product_attention(q, k, v)), (q, k, v)
    if args.device != "cpu":
        found |= on_gpu(args, (q, k, v), (height, width))
    return {name: peer(args, *found[name]) for name in found if name not in args.without}


def on_gpu(args, qkv, grid):
    leaf = lambda x: x.detach().contiguous().requires_grad_(args.backward)
    by_token = [leaf(x.transpose(1, 2)) for x in qkv]
    found = {}
    try:
        from flash_attn import flash_attn_func
        found["flash"] = (lambda: flash_attn_func(*by_token)), by_token
    except ImportError:
        def flash():
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(*qkv)
        found["flash"] = flash, qkv
    try:
        from natten import na2d
        image = [leaf(x[:, args.text:].reshape(1, *grid, args.heads, args.head_dim)) for x in by_token]
        found["natten"] = (lambda: na2d(*image, kernel_size=min(int(2 * args.radius - 1), *grid))), image
    except ImportError:
        pass
    return found


def peer(args, attention, inputs):
    """Gives its milliseconds."""
    def forward():
        with torch.no_grad():
            attention()

    def backward():
        torch.autograd.grad(attention().sum(), inputs)

    call = backward if args.backward else forward
    return lambda: alternation.timed(call, args.device, repeats(args))


def repeats(args):
    """Calls on a GPU are too short to be timed once."""
    return 1 if args.device == "cpu" else 5


def main():
    args = arguments()
    plan = ["--attention", args.attention] if args.attention else ["--radius", str(args.radius)]
    options = ["--grid", args.grid, *plan, "--heads", str(args.heads)] + ["--backward"] * args.backward
    flops = []

    def ours():
        found = alternation.clearform(args, "attention", *options, repeat=repeats(args))
        flops.append(found["visited_gflops"] * found["median_ms"])
        return found["median_ms"]

    medians = alternation.alternate({"clearform": ours}, peers(args), args.rounds)
    rates = alternation.product_rates(args)
    visited = flops[-1] / medians["clearform"]
    ratios = {name: median / medians["clearform"] for name, median in medians.items()}
    found = {"milliseconds": medians, "peer / clearform": ratios, "visited_gflops": visited, "product_gflops": rates}
    print(json.dumps(found | {"share": visited / max(rates.values())}))


if __name__ == "__main__":
    main()
