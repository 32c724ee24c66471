"""Times PyTorch's attention beside the kernels: SDPA, and compiled FlexAttention with the window's mask, at 64 x 64 and
128 x 128 tokens with 512 of text, r = 16, 24 heads of 128 in bf16. Prints a row of Markdown for each."""

import torch
import torch.nn.functional as F

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


def flex_call(side, q, k, v):
    # Older versions of torch have SDPA only, which is timed before.
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(batch, head, query, key):
        image_query, image_key = query - TEXT, key - TEXT
        rows = image_query // side - image_key // side
        columns = image_query % side - image_key % side
        return (query < TEXT) | (key < TEXT) | (rows * rows + columns * columns < RADIUS**2)

    tokens = q.shape[2]
    mask = create_block_mask(visible, None, None, tokens, tokens, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask)


def main():
    inputs = {
        side: [torch.randn(1, HEADS, TEXT + side * side, HEAD_DIM, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
        for side in (64, 128)
    }
    for side, qkv in inputs.items():
        report(side, "full, SDPA", lambda: F.scaled_dot_product_attention(*qkv))
    for side, qkv in inputs.items():
        report(side, f"r = {RADIUS}, FlexAttention", flex_call(side, *qkv))


def report(side, name, call):
    print(f"| {side} x {side}, {name}, torch {torch.__version__} | {median_ms(call):.3f} |", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
