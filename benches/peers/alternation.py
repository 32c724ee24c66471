"""What the peers' scripts share: ours and theirs are timed in turn, in the same run, and held against each other."""

import json
import statistics
import subprocess
import time

import torch

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def timed(call, device):
    """Milliseconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def synchronize(device):
    if device != "cpu":
        torch.cuda.synchronize(device)


def product_rate(dtype, device, n=2048):
    """GFLOP/s of PyTorch's own n x n x n product."""
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    call = lambda: a @ b
    call()
    return 2 * n**3 / statistics.median(timed(call, device) for _ in range(7)) / 1e6


def clearform(arguments):
    """The JSON that one `clearform bench` prints."""
    done = subprocess.run([*arguments, "--json"], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def alternate(ours, peers, args):
    """Medians of `args.rounds` rounds, in each of which everyone is called once: ours, then the peers.

    Ours give milliseconds themselves; a peer is timed here. Each peer is called once before, uncounted.
    """
    for call in peers.values():
        call()
    peers = {name: lambda call=call: timed(call, args.device) for name, call in peers.items()}
    times = {name: [] for name in (*ours, *peers)}
    for _ in range(args.rounds):
        for name, call in (ours | peers).items():
            # Threads of the one before spin for a while after their last task.
            time.sleep(0.3)
            times[name].append(call())
    return {name: statistics.median(values) for name, values in times.items()}


def report(medians, extra):
    """Prints milliseconds and how many times faster ours is."""
    ours = medians["clearform"]
    print(json.dumps({**extra, "milliseconds": medians, "peer / clearform": {k: v / ours for k, v in medians.items()}}))
