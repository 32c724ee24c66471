"""The peers of `clearform convert` and `verify` at size: `cat` to a file and `sha256sum`, on a checkpoint of 6 GB.

    python streaming.py CLEARFORM --folder /some/disk

CLEARFORM is the binary. Makes a FLUX transformer of random bytes in BFL's layout (4 double and 12 single blocks, 3072
wide, bf16) in the folder, which needs 20 GB, and removes everything afterwards. Needs no package. Prints one JSON object: medians
in seconds, ratios, and the largest resident memory of convert and verify.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from math import prod
from pathlib import Path

WIDTH = 3072


def linear(name, outputs, inputs):
    return {f"{name}.weight": [outputs, inputs], f"{name}.bias": [outputs]}


def shapes(double, single):
    tensors = {}
    for name, inputs in [("time_in", 256), ("vector_in", 768), ("guidance_in", 256)]:
        tensors |= linear(f"{name}.in_layer", WIDTH, inputs) | linear(f"{name}.out_layer", WIDTH, WIDTH)
    tensors |= linear("img_in", WIDTH, 64) | linear("txt_in", WIDTH, 4096)
    for block in (f"double_blocks.{index}.{stream}" for index in range(double) for stream in ("img", "txt")):
        tensors |= linear(f"{block}_mod.lin", 6 * WIDTH, WIDTH) | linear(f"{block}_attn.qkv", 3 * WIDTH, WIDTH)
        tensors |= {f"{block}_attn.norm.{name}_norm.scale": [128] for name in ("query", "key")}
        tensors |= linear(f"{block}_attn.proj", WIDTH, WIDTH)
        tensors |= linear(f"{block}_mlp.0", 4 * WIDTH, WIDTH) | linear(f"{block}_mlp.2", WIDTH, 4 * WIDTH)
    for block in (f"single_blocks.{index}" for index in range(single)):
        tensors |= linear(f"{block}.modulation.lin", 3 * WIDTH, WIDTH)
        tensors |= linear(f"{block}.linear1", 7 * WIDTH, WIDTH) | linear(f"{block}.linear2", WIDTH, 5 * WIDTH)
        tensors |= {f"{block}.norm.{name}_norm.scale": [128] for name in ("query", "key")}
    return tensors | linear("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH) | linear("final_layer.linear", 64, WIDTH)


def make(path, double, single):
    header, end = {}, 0
    for name, shape in shapes(double, single).items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * prod(shape)]}
        end += 2 * prod(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = os.urandom(1 << 26)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(block)):
            file.write(block[: end - start])


def run(*command):
    """Seconds and the largest resident memory in MB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clearform")
    parser.add_argument("--folder", type=Path, default=Path.cwd())
    parser.add_argument("--double", type=int, default=4)
    parser.add_argument("--single", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    times, memory = {name: [] for name in ("convert", "cat + sha256sum", "verify", "sha256sum")}, {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source, model, copy = (f"{folder}/{name}" for name in ("flux.safetensors", "model", "copy"))
        make(source, args.double, args.single)
        for _ in range(args.rounds):
            for name, command in {
                "cat + sha256sum": ["sh", "-c", f"cat {source} > {copy} && sha256sum {copy}"],
                "convert": [args.clearform, "convert", source, "--no-distill", "-o", model],
                "sha256sum": ["sha256sum", f"{model}/transformer/diffusion_pytorch_model.safetensors"],
                "verify": [args.clearform, "verify", model],
            }.items():
                os.sync()
                seconds, memory[name] = run(*command)
                times[name].append(seconds)
            os.remove(copy)
            shutil.rmtree(model)
        size = os.path.getsize(source)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {
        "convert / (cat + sha256sum)": medians["convert"] / medians["cat + sha256sum"],
        "verify / sha256sum": medians["verify"] / medians["sha256sum"],
    }
    print(json.dumps({"bytes": size, "seconds": medians, "all": times, "ratios": ratios, "peak MB": memory}))


if __name__ == "__main__":
    main()
