"""Compiles every GPU kernel ahead of time, no GPU needed, and prints what each uses on each architecture.

    python benchmarks/compile_kernels.py            # Triton, and CUDA C++ where nvcc is there
    python benchmarks/compile_kernels.py triton     # one of them

Exits with 1 if a kernel spills registers, uses local memory, or needs more shared memory than the
architecture gives a block. A new Triton kernel gets an entry in `triton_kernels`; a new file in csrc/cuda
is found by itself.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# compute capability: shared memory a block may have, in bytes
SHARED_LIMITS = {
    75: 65536,
    80: 166912,
    86: 101376,
    89: 101376,
    90: 232448,
    100: 232448,
    120: 101376,
}


# arguments: by 16, at SD's sizes
DIVISIBLE = ("elements", "rows", "channels", "columns", "row", "name_stride")
UNALIGNED = ("index_ptr",)  # a view into a list of numbers


@dataclass(frozen=True)
class Usage:
    """What the assembler says of one kernel on one architecture."""

    kernel: str
    arch: int
    registers: int
    shared: int  # bytes
    local: int  # bytes of local memory a thread: spilled registers and indexed arrays

    def violations(self) -> list[str]:
        limit = SHARED_LIMITS[self.arch]
        found = []
        if self.local:
            found.append(f"{self.local} bytes of local memory (spills)")
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, limit {limit}")
        return found


@dataclass(frozen=True)
class TritonKernel:
    """One kernel with the types and constants it is compiled for."""

    label: str
    function: object  # what @triton.jit made
    types: dict[str, str]  # argument: Triton type; what is left out is a constant
    constants: dict[str, int | None]
    num_warps: int = 4


def triton_kernels() -> Iterator[TritonKernel]:
    """Everything in kernels/, in the dtypes it is used with."""
    yield from guidance_loss_kernels()
    yield from group_norm_silu_kernels()
    yield from geglu_kernels()


def guidance_loss_kernels() -> Iterator[TritonKernel]:
    from esd_fast.kernels import guidance_loss as m

    for student, teacher in (
        ("fp32", "fp32"),
        ("bf16", "bf16"),
        ("fp16", "fp16"),
        ("fp32", "bf16"),
    ):
        yield TritonKernel(
            f"guidance_loss {student}/{teacher}",
            m.guidance_loss_kernel,
            {
                "student_ptr": f"*{student}",
                **dict.fromkeys(("anchor_ptr", "concept_ptr", "null_ptr"), f"*{teacher}"),
                "negative_guidance_ptr": "*fp32",
                "weight_ptr": "*fp32",
                "gradient_ptr": f"*{student}",
                "partial_sums_ptr": "*fp32",
                "elements": "i32",
                "blocks": "i32",
                "scale": "fp32",
            },
            {"BLOCK": m.BLOCK},
        )
    yield TritonKernel(
        "guidance_loss sums",
        m.guidance_loss_sums_kernel,
        {
            **dict.fromkeys(
                ("partial_sums_ptr", "weight_ptr", "per_sample_ptr", "loss_ptr"), "*fp32"
            ),
            **dict.fromkeys(("batch", "elements", "blocks"), "i32"),
        },
        {"SAMPLES": m.SUMS_SAMPLES, "BLOCKS": m.SUMS_BLOCKS},
    )
    yield from guided_step_kernels()


def guided_step_kernels() -> Iterator[TritonKernel]:
    """Two prompts without samples (collect_last), two and three with them (collect_all)."""
    from esd_fast.kernels import guided_step as m

    for predictions, names, samples in (
        ("fp32", 2, False),
        ("fp32", 3, True),
        ("bf16", 2, False),
        ("bf16", 2, True),
        ("bf16", 3, True),
        ("fp16", 3, True),
    ):
        buffers = ("inputs_ptr", "seen_ptr", "said_ptr") if samples else ("inputs_ptr",)
        yield TritonKernel(
            f"guided_step {predictions} {names}{' samples' if samples else ''}",
            m.guided_step_kernel,
            {
                **dict.fromkeys(("predictions_ptr", *buffers), f"*{predictions}"),
                "index_ptr": "*i64",
                **dict.fromkeys(("table_ptr", "input_scales_ptr", "history_ptr"), "*fp32"),
                "guidance_scale": "fp32",
                **dict.fromkeys(
                    ("elements", "blocks", "row", "calls", "name_stride", "table_stride"), "i32"
                ),
            },
            {
                **({} if samples else {"seen_ptr": None, "said_ptr": None}),
                "NAMES": names,
                "ROLLED": 1,
                "BLOCK": m.BLOCK,
                "AHEAD": m.AHEAD,
            },
        )


def group_norm_silu_kernels() -> Iterator[TritonKernel]:
    """The tiles do not depend on the shape, so one entry stands for all channels from 320 to 2560."""
    from esd_fast.kernels import group_norm_silu as m

    tile = {"ROWS": m.ROWS, "CHANNELS": m.CHANNELS}
    sizes = dict.fromkeys(("rows", "channels", "members", "row_blocks", "channel_blocks"), "i32")
    moments = {"mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
    yield TritonKernel(
        "group_norm group moments",
        m.group_moments_kernel,
        {
            "means_ptr": "*fp32",
            "squares_ptr": "*fp32",
            **moments,
            **dict.fromkeys(("rows", "members", "groups", "row_blocks"), "i32"),
            "eps": "fp32",
        },
        {"ROWS": m.ROWS, "PARTIALS": m.PARTIALS},
    )
    for x, parameters in (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32")):
        label = f"{x}/{parameters}"
        of_channels = {"weight_ptr": f"*{parameters}", "bias_ptr": f"*{parameters}"}
        inputs = {"grad_ptr": f"*{x}", "x_ptr": f"*{x}", **moments, **of_channels}
        partials = {"for_bias_ptr": "*fp32", "for_weight_ptr": "*fp32"}
        means = {"level_ptr": "*fp32", "slope_ptr": "*fp32"}
        if x == parameters:
            yield TritonKernel(
                f"group_norm tile moments {x}",
                m.tile_moments_kernel,
                {
                    "x_ptr": f"*{x}",
                    "means_ptr": "*fp32",
                    "squares_ptr": "*fp32",
                    **{name: kind for name, kind in sizes.items() if name != "members"},
                },
                tile,
            )
            yield TritonKernel(
                f"group_norm group gradients {x}",
                m.group_gradients_kernel,
                {
                    **partials,
                    "weight_ptr": f"*{x}",
                    **means,
                    **dict.fromkeys(("rows", "members", "groups", "row_blocks"), "i32"),
                },
                {"PARTIALS": m.PARTIALS},
            )
        for silu in (1, 0) if label == "bf16/bf16" else (1,):  # without is with, and less
            name, constants = "group_norm" + "_silu" * silu, {"SILU": silu, **tile}
            yield TritonKernel(
                f"{name} {label}",
                m.normalise_kernel,
                {"x_ptr": f"*{x}", **moments, **of_channels, "y_ptr": f"*{x}", **sizes},
                constants,
            )
            yield TritonKernel(
                f"{name} tile gradients {label}",
                m.tile_gradients_kernel,
                {**inputs, **partials, **sizes},
                constants,
            )
            yield TritonKernel(
                f"{name} gradient {label}",
                m.input_gradient_kernel,
                {**inputs, **means, "grad_x_ptr": f"*{x}", **sizes},
                constants,
            )


def geglu_kernels() -> Iterator[TritonKernel]:
    from esd_fast.kernels import geglu as m

    sizes = dict.fromkeys(("rows", "columns", "column_blocks"), "i32")
    constants = {"ROWS": m.ROWS, "COLUMNS": m.COLUMNS}
    for x in ("fp32", "bf16", "fp16"):
        pointers = {"x_ptr": f"*{x}", "y_ptr": f"*{x}"}
        yield TritonKernel(f"geglu {x}", m.geglu_kernel, {**pointers, **sizes}, constants)
        pointers = dict.fromkeys(("grad_ptr", "x_ptr", "grad_x_ptr"), f"*{x}")
        yield TritonKernel(
            f"geglu gradient {x}", m.geglu_backward_kernel, {**pointers, **sizes}, constants
        )


def compile_triton(kernel: TritonKernel, arch: int) -> Usage:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.function.arg_names)
    signature = {name: kernel.types.get(name, "constexpr") for name in names}
    # As at a launch on torch's own allocations: pointers and the usual sizes are multiples of 16.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if (signature[name].startswith("*") and name not in UNALIGNED) or name in DIVISIBLE
    }
    compiled = triton.compile(
        ASTSource(kernel.function, signature, constexprs=kernel.constants, attrs=aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": kernel.num_warps},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    count = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", report)}
    # Shared memory is allocated at the launch, so the binary itself does not always know of it.
    shared = max(count["SHARED"], compiled.metadata.shared)
    return Usage(kernel.label, arch, count["REG"], shared, max(count["STACK"], count["LOCAL"]))


def triton_usages() -> list[Usage]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: the interpreter replaces the compiler; unset it")
    from esd_fast.operators.common import kernels

    kernels("reference")  # makes esd_fast.kernels importable in a checkout too
    return [compile_triton(kernel, arch) for kernel in triton_kernels() for arch in SHARED_LIMITS]


def cuda_usages() -> list[Usage]:
    """Compiles csrc/cuda/*.cu for every architecture at once and reads what the assembler says."""
    options = ["-fatbin", "-std=c++17", "-O3", "-Xptxas=-v", "-I", ROOT / "csrc"]
    options += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in SHARED_LIMITS]
    report = ""
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            command = ["nvcc", *options, "-o", Path(folder) / "kernels.fatbin", source]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"nvcc {source.name}:\n{done.stderr}")
            report += done.stderr
    return read_ptxas(report)


def read_ptxas(report: str) -> list[Usage]:
    """`ptxas -v`: a line with the name, one with the stack and spills, one with registers and shared memory."""
    usages, name, arch, local = [], "", 0, 0
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", line):
            name, arch = readable(found[1]), int(found[2])
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line):
            local = max(map(int, found.groups()))
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            usages.append(Usage(name, arch, int(found[1]), int(shared[1]) if shared else 0, local))
    return usages


def readable(mangled: str) -> str:
    """A C++ kernel's name with its template arguments, shortened."""
    if shutil.which("c++filt") is None:
        return mangled
    name = subprocess.run(["c++filt", mangled], check=True, capture_output=True, text=True).stdout
    name = re.sub(r"\(anonymous namespace\)::|esd::cuda::|^void |__nv_|_kernel|\(int\)", "", name)
    return name.strip().split("(")[0].replace("__half", "half")


def table(usages: list[Usage]) -> str:
    """One row a kernel, one column an architecture: registers, shared bytes, local bytes."""
    kernels = list(dict.fromkeys(u.kernel for u in usages))
    cells = {(u.kernel, u.arch): f"{u.registers} {u.shared} {u.local}" for u in usages}
    rows = [["registers shared local", *(f"sm_{arch}" for arch in SHARED_LIMITS)]]
    rows += [[k, *(cells.get((k, arch), "-") for arch in SHARED_LIMITS)] for k in kernels]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["triton", "cuda"], help="default: both")
    what = parser.parse_args().what
    usages = []
    if what != "cuda":
        usages += triton_usages()
    if what == "cuda" or (what is None and shutil.which("nvcc")):
        usages += cuda_usages()
    print(table(usages))
    bad = [f"{u.kernel} on sm_{u.arch}: {v}" for u in usages for v in u.violations()]
    for line in bad:
        print(line, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
