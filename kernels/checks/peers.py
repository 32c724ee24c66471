"""Times PyTorch's attention beside the kernels: SDPA, and compiled FlexAttention with the window's mask, at 64 x 64 and
128 x 128 tokens with 512 of text, r = 16, 24 heads of 128 in bf16. Prints a row of Markdown for each."""

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

TEXT, RADIUS, HEADS, HEAD_DIM, REPEAT = 512, 16, 24, 128, 10


def median_ms(call):
    call()
    times = []
    for _ in range(REPEAT):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[REPEAT // 2]


def window_mask(side, tokens):
    def visible(batch, head, query, key):
        image_query, image_key = query - TEXT, key - TEXT
        rows = image_query // side - image_key // side
        columns = image_query % side - image_key % side
        return (query < TEXT) | (key < TEXT) | (rows * rows + columns * columns < RADIUS**2)

    return create_block_mask(visible, None, None, tokens, tokens, device="cuda", _compile=True)


def main():
    flex = torch.compile(flex_attention)
    for side in (64, 128):
        tokens = TEXT + side * side
        q, k, v = (torch.randn(1, HEADS, tokens, HEAD_DIM, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        calls = {
            "full, SDPA": lambda: F.scaled_dot_product_attention(q, k, v),
            f"r = {RADIUS}, FlexAttention": lambda mask=window_mask(side, tokens): flex(q, k, v, block_mask=mask),
        }
        for name, call in calls.items():
            print(f"| {side} x {side}, {name}, torch {torch.__version__} | {median_ms(call):.3f} |", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
