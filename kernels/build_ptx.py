#!/usr/bin/env python3
"""Compiles every kernel to PTX with NVRTC, which needs no GPU, and those for one compute capability to machine code too.

    build_ptx.py LIBNVRTC            writes <kernel>/*.ptx, <kernel>/*.cubin and registers.json
    build_ptx.py LIBNVRTC --check    writes nothing; fails if a committed file differs from what would be written

Sources whose names end in sm90a are compiled for compute capability 9.0, all others for 8.0 and newer. Fails if an entry
point spills registers, uses more of them than BOUNDS allows, or has wgmma instructions that the compiler serializes.
LIBNVRTC is libnvrtc.so.12 of the wheel nvidia-cuda-nvrtc-cu12==12.4.127, whose PTX drivers from 550 on can read.
"""
import ctypes
import hashlib
import json
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).parent
OPTIONS = ["--std=c++17", "--use_fast_math", "--device-as-default-execution-space"]
# The most registers per thread, by entry point. They let one block of 384 threads fit on a multiprocessor, and 2, 4, 3, 4
# and 8 blocks of 128 threads in the order of the lines that follow.
BOUNDS = [
    (r"forward_sm90a_", 168),
    (r"(forward|query|key)_.*_128", 255),
    (r"forward_.*_64", 128),
    (r"(query|key)_.*_64", 168),
    (r"modulated_", 128),
    (r"", 64),
]


# The files that precede a source; prelude.cuh and rows.cuh for all others.
ATTENTION = ["prelude.cuh", "clear_attention/common.cuh"]
BEFORE = {
    "clear_attention/forward.cu": [*ATTENTION, "clear_attention/softmax.cuh"],
    "clear_attention/forward_sm90a.cu": [
        "prelude.cuh", "sm90a.cuh", *ATTENTION[1:], "clear_attention/softmax.cuh", "clear_attention/pairs.cuh",
    ],
    "clear_attention/backward.cu": ATTENTION,
}


def sources(unit):
    name = str(unit.relative_to(HERE))
    return [*BEFORE.get(name, ["prelude.cuh", "rows.cuh"]), name]


def target(unit):
    """Compute capability as in NVRTC's options."""
    return "90a" if unit.stem.endswith("sm90a") else "80"


def text(unit):
    return "".join((HERE / name).read_text(encoding="utf-8") for name in sources(unit))


def compiled(nvrtc, unit, architecture, kind):
    """Returns a source's PTX or cubin, and the compiler's log."""
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text(unit).encode(), unit.name.encode(), 0, None, None)
    options = OPTIONS + [f"--gpu-architecture={architecture}"]
    options += ["--ptxas-options=-v"] if kind == "CUBIN" else []
    array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    status = nvrtc.nvrtcCompileProgram(program, len(options), array)
    log = fetched(nvrtc, program, "ProgramLog").decode().rstrip("\0")
    if status != 0:
        sys.exit(f"{unit}: {log}")
    return fetched(nvrtc, program, kind), log


def fetched(nvrtc, program, kind):
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{kind}")(program, buffer)
    return buffer.raw


def usage(log):
    """Parses the log of ptxas: entry point -> registers and spilled bytes."""
    found, name = {}, None
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            name = entry[1]
        if spills := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            found[name] = {"stack": int(spills[1]), "spill_stores": int(spills[2]), "spill_loads": int(spills[3])}
        if registers := re.search(r"Used (\d+) registers", line):
            found[name] |= {"registers": int(registers[1]), "at_most": bound(name)}
    if serialized := re.search(r".*wgmma.mma_async instructions are serialized.*", log):
        sys.exit(serialized[0])
    return found


def bound(name):
    return next(limit for pattern, limit in BOUNDS if re.match(pattern, name))


def outputs(nvrtc, units):
    """Returns the content of each file to commit, and the register usage by source and entry point."""
    files, report = {}, {}
    for unit in units:
        ptx = compiled(nvrtc, unit, f"compute_{target(unit)}", "PTX")[0].decode().rstrip("\0")
        digest = hashlib.sha256(text(unit).encode()).hexdigest()
        files[unit.with_suffix(".ptx")] = f"// sources sha256 {digest}\n{ptx}".encode()
        cubin, log = compiled(nvrtc, unit, f"sm_{target(unit)}", "CUBIN")
        report[str(unit.relative_to(HERE))] = usage(log)
        if target(unit) == "90a":
            files[unit.with_suffix(".cubin")] = cubin
    files[HERE / "registers.json"] = (json.dumps(report, indent=1) + "\n").encode()
    return files, report


def over_bounds(units, report):
    """Lists entry points that spill, use too many registers, or were not compiled."""
    broken = []
    for unit, entries in report.items():
        for name, used in entries.items():
            spilled = used["spill_stores"] + used["spill_loads"] + used["stack"]
            print(f"{unit} {name}: {used['registers']} registers (at most {used['at_most']}), {spilled} bytes spilled")
            if spilled or used["registers"] > used["at_most"]:
                broken.append(name)
    declared = {name for unit in units for name in re.findall(r"^ENTRY\((\w+)", unit.read_text(encoding="utf-8"), re.M)}
    return broken + sorted(declared - {name for entries in report.values() for name in entries})


def main():
    units = sorted(HERE.glob("*/*.cu"))
    files, report = outputs(ctypes.CDLL(sys.argv[1]), units)
    broken = over_bounds(units, report)
    if "--check" in sys.argv:
        broken += [str(path.relative_to(HERE)) for path, content in files.items() if not path.exists() or path.read_bytes() != content]
    else:
        for path, content in files.items():
            path.write_bytes(content)
    if broken:
        sys.exit(f"out of bounds, not compiled, or stale: {broken}")
    print(f"{sum(map(len, report.values()))} entry points compiled")


if __name__ == "__main__":
    main()
