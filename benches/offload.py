"""Streamed blocks beside blocks in memory: one step of FLUX's width with 6 double and 12 single blocks in bf16.

    python offload.py CLEARFORM --folder /some/disk --rounds 2

CLEARFORM is the binary. Makes a file of 7.4 GB with random weights, which is read once so that it is in the page cache, and
needs as much memory again. Prints one JSON object: medians in milliseconds by grid, and their ratio. numpy.
"""

import argparse
import json
import pathlib
import statistics
import subprocess

import numpy as np

import real_size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clearform")
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--grid", nargs="+", default=["32x32", "64x64"])
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    real_size.DOUBLE, real_size.SINGLE = 6, 12
    file = args.folder / "flux-6-12.safetensors"
    args.folder.mkdir(parents=True, exist_ok=True)
    real_size.save_safetensors(file, real_size.flux(), np.random.default_rng(0).standard_normal(real_size.POOL))
    print(json.dumps({grid: row(args, file, grid) for grid in args.grid}, indent=2))


def row(args, file, grid):
    times = {"never": [], "always": []}
    for _ in range(args.rounds):
        for mode, measured in times.items():
            subprocess.run(["cat", file], check=True, stdout=subprocess.DEVNULL)
            command = [args.clearform, "bench", "model", file, "--grid", grid, "--attention", "full", "--dtype", "bf16",
                       "--repeat", "1", "--offload", mode, "--json"]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            measured.append(json.loads(printed)["rows"][0]["median_ms"])
    medians = {mode: statistics.median(measured) for mode, measured in times.items()}
    return {"resident": times["never"], "streamed": times["always"], "ratio": round(medians["always"] / medians["never"], 3)}


if __name__ == "__main__":
    main()
