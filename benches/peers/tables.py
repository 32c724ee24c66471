"""The tables of BENCHMARKS.md that compare clearform with its peers, in Markdown, row by row as they are measured.

    python tables.py CLEARFORM [--device cuda:0] [--only attention step scaling memory] [--threads N] [--rounds 5]

CLEARFORM is the binary, on a GPU one that was built with --features cuda. torch 2.13, numpy, diffusers 0.42.1; on a GPU
also flash_attn and natten where they are installed. On a CPU: `attention`, forward and with its backward; `step`, a whole
transformer step, also without the peer at 48 x 48 tokens; `scaling`, steps of 64 x 64 and 128 x 128 tokens; `memory`. On a
GPU: `attention` up to 8K, and `step` of FLUX's shape. Both sides of a row are measured alternately, in one run, with the same number of threads.
--tiny uses sizes so small that everything runs within minutes; its figures mean nothing. Exits 1 if a row failed.
"""

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).parent
TABLES = {"cpu": ["attention", "step", "scaling", "memory"], "gpu": ["attention", "step"]}
PEERS = {"flex": "FlexAttention", "sdpa": "full SDPA", "flash": "full FlashAttention", "natten": "NATTEN"}
HEAD_DIM = 128


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clearform", type=os.path.abspath)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=TABLES["cpu"], default=[])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--double", type=int, default=19, help="double-stream blocks of a step on a GPU")
    parser.add_argument("--single", type=int, default=38, help="single-stream blocks of a step on a GPU")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    known = TABLES["cpu" if args.device == "cpu" else "gpu"]
    args.only = args.only or known
    for name in args.only:
        if name not in known:
            parser.error(f"--only {name}: measured on a CPU alone")
    return args


class Bench:
    """Runs the scripts of one table after the other, and goes on where one fails."""

    def __init__(self, args):
        self.args, self.failed = args, False
        self.on_gpu = args.device != "cpu"
        self.text = 32 if args.tiny else 512

    def grid(self, side):
        side = side // 8 if self.args.tiny else side
        return f"{side}x{side}"

    def width(self, width):
        return width // 6 if self.args.tiny else width

    def measured(self, script, *options):
        """The JSON that a script prints, or none where it fails."""
        args = self.args
        common = ["--text", self.text, "--device", args.device, "--rounds", args.rounds, "--threads", args.threads]
        command = [sys.executable, HERE / script, args.clearform, *common, "--head-dim", HEAD_DIM, *options]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True)
        return self.checked(command, done.returncode, done.stdout)

    def peak(self, *options):
        """Largest resident memory of `clearform bench`, in bytes, or none where it fails."""
        command = [self.args.clearform, "bench", *options, "--text", self.text, "--head-dim", HEAD_DIM, "--repeat", 1]
        threads = {"RAYON_NUM_THREADS": str(self.args.threads)}
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, env=os.environ | threads)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return self.checked(command, process.returncode, str(1024 * usage.ru_maxrss))

    def checked(self, command, code, printed):
        if code == 0:
            return json.loads(printed)
        print(f"exit {code}:", *command, file=sys.stderr)
        self.failed = True


def head(title, intro, *names):
    print(f"\n### {title}\n\n{intro}\n\n| {' | '.join(names)} |\n|{'---|' * len(names)}", flush=True)


def row(*cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def figure(value):
    """At least three digits below 10, whole numbers above."""
    return f"{value:.0f}" if value >= 10 else f"{value:.3g}"


def times(ratio):
    return f"{ratio:.1f}x" if ratio >= 10 else f"{ratio:.2f}x"


def seconds(milliseconds):
    return f"{milliseconds / 1e3:.1f} s" if milliseconds >= 1e3 else f"{milliseconds:.0f} ms"


def spaced(grid):
    return grid.replace("x", " x ")


def attention(bench):
    if bench.on_gpu:
        rows = [(side, 16, 24) for side in (64, 128, 256, 512)] + [(512, 8, 24), (512, 32, 24)]
        forward, backward, dtypes = rows, rows, ["bf16"]
    else:
        forward = [(64, 16, 4), (64, 16, 24), (128, 16, 4), (128, 16, 24), (128, 8, 4), (64, "full", 4), (128, "full", 4)]
        backward, dtypes = [(64, 16, 4), (64, 16, 24)], ["f32", "bf16"]
    attention_table(bench, "Attention", dtypes, forward, [])
    attention_table(bench, "Attention, forward and backward", dtypes, backward, ["--backward"])


def attention_table(bench, title, dtypes, rows, options):
    names = {name: PEERS[name] for name in (PEERS if bench.on_gpu else ("flex", "sdpa"))}
    if options and not bench.on_gpu:
        del names["flex"]
    head(title, "Milliseconds, and how many times faster clearform is; last, GFLOP/s on visited pairs as a share of the best "
         "product's.", "grid, r, heads", "number format", "clearform", *names.values(), "of the product's rate")
    for dtype in dtypes:
        for side, radius, heads in rows:
            grid = bench.grid(side)
            of_row = ["--grid", grid, "--heads", heads, "--dtype", dtype, *options]
            of_row += ["--attention", "full", "--without", "flex"] if radius == "full" else ["--radius", radius]
            found = bench.measured("attention.py", *of_row)
            label = f"{spaced(grid)}, {radius}, {heads}"
            if found is None:
                row(label, dtype, "failed", *[""] * len(names), "")
                continue
            ms, ratios = found["milliseconds"], found["peer / clearform"]
            cells = [f"{figure(ms[name])} ({times(ratios[name])})" if name in ms else "" for name in names]
            row(label, dtype, figure(ms["clearform"]), *cells, f"{100 * found['share']:.0f}%")


def step(bench):
    if bench.on_gpu:
        return step_on_gpu(bench)
    head("A whole step", "Beside diffusers, full, how many times faster clearform's full attention is.",
         "width, number format", "clearform, full", "clearform, r = 16", "diffusers, full")
    for width, dtype, found in steps(bench, 64):
        ours = found["full"], found["clear:r=16"], found["diffusers"]
        row(f"{width}, {dtype}", *map(seconds, ours[:2]), f"{seconds(ours[2])} ({times(ours[2] / ours[0])})")
    head(f"A step of {spaced(bench.grid(48))} tokens", "Beside r = 16, how many times faster it is.",
         "width, number format", "clearform, full", "clearform, r = 16")
    for width, dtype, found in steps(bench, 48, "--alone"):
        full, windowed = found["full"], found["clear:r=16"]
        row(f"{width}, {dtype}", seconds(full), f"{seconds(windowed)} ({times(full / windowed)})")


def steps(bench, side, *options):
    """Width, number format and milliseconds of 2 double and 4 single blocks."""
    for dtype in ("f32", "bf16"):
        for width in (1536, 3072):
            grid, width = bench.grid(side), bench.width(width)
            found = bench.measured("step.py", "--grid", grid, "--width", width, "--dtype", dtype, *options)
            if found is None:
                row(f"{width}, {dtype}", "failed")
            else:
                yield width, dtype, found["milliseconds"][grid]


def step_on_gpu(bench):
    args, plans = bench.args, [f"clear:r={radius}" for radius in (8, 16, 32)]
    double, single, width = (1, 1, 512) if args.tiny else (args.double, args.single, 3072)
    head("A step of FLUX's shape", f"{double} double and {single} single blocks, {width} wide, bf16; how many times faster than"
         " diffusers, whose attention is what PyTorch's SDPA takes, FlashAttention or a faster one.", "grid", "diffusers, full",
         *(f"clearform, r = {plan.split('=')[1]}" for plan in plans))
    for side in (64, 128, 256, 512):
        grid = bench.grid(side)
        sizes = ["--grid", grid, "--width", width, "--double", double, "--single", single]
        found = bench.measured("step.py", *sizes, "--dtype", "bf16", "--attention", *plans)
        if found is None:
            row(spaced(grid), "failed", *[""] * len(plans))
            continue
        ms = found["milliseconds"][grid]
        full = ms["diffusers"]
        row(spaced(grid), seconds(full), *(f"{seconds(ms[plan])} ({times(full / ms[plan])})" for plan in plans))


def scaling(bench):
    small, large, width = bench.grid(64), bench.grid(128), bench.width(1536)
    head("Scaling", f"A step {width} wide at r = 8, of four times as many tokens.", "number format", spaced(small),
         spaced(large), "times as long")
    for dtype in ("f32", "bf16"):
        sizes = ["--grid", small, large, "--width", width, "--dtype", dtype]
        found = bench.measured("step.py", *sizes, "--attention", "clear:r=8", "--alone")
        if found is None:
            row(dtype, "failed", "", "")
            continue
        ms = [found["milliseconds"][grid]["clear:r=8"] for grid in (small, large)]
        row(dtype, *map(seconds, ms), f"{ms[1] / ms[0]:.2f}")


def memory(bench):
    head("Memory", "The whole process of `clearform bench attention --radius 16 --heads 4`, in f32, at its peak.", "grid", "peak",
         "of it queries, keys, values and output", "a matrix of tokens by tokens")
    for side in (128, 256):
        grid = bench.grid(side)
        height, width = map(int, grid.split("x"))
        tokens = height * width + bench.text
        peak = bench.peak("attention", "--grid", grid, "--radius", 16, "--heads", 4)
        needed = 4 * 4 * HEAD_DIM * tokens * 4
        peak = "failed" if peak is None else f"{peak / 1e6:.0f} MB"
        row(spaced(grid), peak, f"{needed / 1e6:.0f} MB", f"{4 * 4 * tokens**2 / 1e9:.1f} GB")


def installed(name):
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


def main():
    args = arguments()
    bench = Bench(args)
    versions = ", ".join(map(installed, ("torch", "diffusers")))
    print(f"{versions}; {args.threads} threads; median of {args.rounds} rounds", flush=True)
    for name in args.only:
        {"attention": attention, "step": step, "scaling": scaling, "memory": memory}[name](bench)
    sys.exit(bench.failed)


if __name__ == "__main__":
    main()
