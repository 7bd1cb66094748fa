"""What every GPU kernel uses on each architecture, ahead of time and without a GPU.

    python benchmarks/compile_kernels.py            # Triton, and CUDA C++ where the native module has it
    python benchmarks/compile_kernels.py triton     # one of them

Triton's kernels are compiled here; those in CUDA C++ are read out of the installed native module, as it is
shipped. Both need Triton, which brings cuobjdump.

Exits with 1 if a kernel spills registers, uses local memory, needs more shared memory than the architecture
gives a block, or is not in the module for some architecture (CUDAARCHS leaves some out). A new Triton kernel
gets an entry in `triton_kernels`; a new CUDA kernel is found by itself.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
        (usage,) = read_usages(cuobjdump("-res-usage", cubin))
    # Shared memory is allocated at the launch, so the binary itself does not always know of it.
    shared = max(usage.shared, compiled.metadata.shared)
    # of a lone cubin the report names no architecture
    return replace(usage, kernel=kernel.label, arch=arch, shared=shared)


def triton_usages() -> list[Usage]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: the interpreter replaces the compiler; unset it")
    from esd_fast.operators.common import kernels

    kernels("reference")  # makes esd_fast.kernels importable in a checkout too
    return [compile_triton(kernel, arch) for kernel in triton_kernels() for arch in SHARED_LIMITS]


def cuda_module() -> Path | None:
    """The native module's file, if the CUDA kernels are in it."""
    try:
        from esd_fast import _native
    except ImportError:
        return None
    return Path(_native.__file__) if hasattr(_native, "cuda_unavailable") else None


def cuda_usages() -> list[Usage]:
    """Of the kernels in the native module."""
    module = cuda_module()
    if module is None:
        raise RuntimeError("the native module has no CUDA kernels: install again where nvcc is")
    return read_usages(cuobjdump("-res-usage", module))


def cuobjdump(*arguments: str | Path) -> str:
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read_usages(report: str) -> list[Usage]:
    """`cuobjdump -res-usage`: a line with the architecture, and for each kernel one with its name, one with numbers."""
    usages, name, arch = [], "", 0
    for line in readable(report).splitlines():
        if found := re.match(r"arch = sm_(\d+)", line):
            arch = int(found[1])
        elif found := re.match(r" Function (.+):$", line):
            name = found[1].split("(")[0]
        elif found := re.match(r"  REG:\d", line):
            count = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            local = max(count["STACK"], count["LOCAL"])
            usages.append(Usage(name, arch, count["REG"], count["SHARED"], local))
    return usages


def readable(report: str) -> str:
    """C++ kernels' names with their template arguments, shortened."""
    if shutil.which("c++filt") is None:
        return report
    names = subprocess.run(["c++filt"], input=report, check=True, capture_output=True, text=True)
    noise = (
        r"\(anonymous namespace\)::|esd::cuda::|(?<=Function )void |__nv_|_kernel(?=[<(])|\(int\)"
    )
    return re.sub(noise, "", names.stdout).replace("__half", "half")


def missing(usages: list[Usage]) -> list[tuple[str, int]]:
    """Kernels, and architectures that they were not compiled for."""
    there = {(u.kernel, u.arch) for u in usages}
    kernels = dict.fromkeys(u.kernel for u in usages)
    return [(k, arch) for k in kernels for arch in SHARED_LIMITS if (k, arch) not in there]


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
    if what == "cuda" or (what is None and cuda_module()):
        usages += cuda_usages()
    print(table(usages))
    bad = [f"{u.kernel} on sm_{u.arch}: {v}" for u in usages for v in u.violations()]
    bad += [f"{kernel} on sm_{arch}: not compiled for it" for kernel, arch in missing(usages)]
    for line in bad:
        print(line, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
