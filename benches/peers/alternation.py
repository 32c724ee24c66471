"""Shared by the peer scripts: both sides are timed alternately, in the same run, with the same number of threads."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def parser(description):
    """The arguments that every script has."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("clearform")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="for both sides; default: all cores")
    return parser


def parse(parser):
    """Parses the arguments and sets the number of threads for both sides."""
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ |= {name: str(args.threads) for name in ("RAYON_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return args


def clearform(args, subject, *options, repeat=1):
    """The JSON that one `clearform bench` prints."""
    command = [args.clearform, "bench", subject, "--head-dim", str(args.head_dim), "--text", str(args.text)]
    command += ["--dtype", args.dtype, "--device", args.device, "--repeat", str(repeat), "--json", *options]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def timed(call, device, repeat=1):
    """Milliseconds of one call, the median of `repeat`, or of as many as fit into a second."""
    times = []
    while len(times) < repeat and sum(times) < 1e3:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def synchronize(device):
    if device != "cpu":
        torch.cuda.synchronize(device)


def alternate(ours, peers, rounds):
    """Medians of `rounds` rounds, in each of which everyone gives its milliseconds once: ours, then the peers. Each peer
    is called once before, uncounted; ours warm up themselves."""
    for call in peers.values():
        call()
    times = {name: [] for name in (*ours, *peers)}
    for _ in range(rounds):
        for name, call in (ours | peers).items():
            # Threads of the one before spin for a while after their last task.
            time.sleep(0.3)
            times[name].append(call())
    return {name: statistics.median(values) for name, values in times.items()}


def product_rates(args):
    """GFLOP/s of an n x n x n product, by library. PyTorch's in f32 is not the best on every CPU."""
    n = 2048 if args.device == "cpu" else 8192
    a, b = (torch.randn(n, n, dtype=DTYPES[args.dtype], device=args.device) for _ in range(2))
    timed(lambda: a @ b, args.device)
    rates = {"torch": 2e-6 * n**3 / timed(lambda: a @ b, args.device, repeat=7)}
    if args.device == "cpu" and args.dtype == "f32":
        # In a process of its own, where the threads of PyTorch do not spin.
        found = subprocess.run([sys.executable, "-c", OPENBLAS, str(n)], check=True, stdout=subprocess.PIPE, text=True)
        rates["numpy"] = 2e-6 * n**3 / float(found.stdout)
    return rates


OPENBLAS = """
import statistics, sys, time
import numpy
n = int(sys.argv[1])
a, b = (numpy.random.default_rng(seed).standard_normal((n, n), dtype=numpy.float32) for seed in (0, 1))
times = []
for _ in range(8):
    start = time.perf_counter()
    a @ b
    times.append((time.perf_counter() - start) * 1e3)
print(statistics.median(times[1:]))
"""
