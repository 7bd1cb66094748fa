"""GEGLU's activation in Triton: hidden * gelu(gate) of the two halves of one tensor, forward and gradient.

The formulas are ``reference.geglu`` and ``reference.geglu_backward``: the GELU by the error function, as
diffusers has it. Programs take ROWS x COLUMNS; nothing is summed, so two runs agree in every bit.
"""

import torch
import triton
import triton.language as tl

ROWS, COLUMNS = (
    4,
    256,
)  # 4 warps, 8 elements a thread; the halves are multiples of 256 in SD and SDXL
SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)  # of the normal distribution at 0: 1 / sqrt(2 pi)


@triton.jit
def place(rows, columns, column_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's rows (ROWS, 1), columns (1, COLUMNS) and mask (ROWS, COLUMNS)."""
    program = tl.program_id(0).to(tl.int64)
    m = (program // column_blocks) * ROWS + tl.arange(0, ROWS)
    d = (program % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    return m[:, None], d[None, :], (m < rows)[:, None] & (d < columns)[None, :]


@triton.jit
def geglu_kernel(
    x_ptr,  # (M, 2 D): hidden, gate
    y_ptr,  # (M, D), written
    rows,  # M
    columns,  # D
    column_blocks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    m, d, inside = place(rows, columns, column_blocks, ROWS, COLUMNS)
    offsets = m * (2 * columns) + d
    # float32 straight after each load: the interpreter computes on the raw bits of bfloat16
    hidden = tl.load(x_ptr + offsets, mask=inside, other=0).to(tl.float32)
    gate = tl.load(x_ptr + offsets + columns, mask=inside, other=0).to(tl.float32)
    y = hidden * (gate * (0.5 + 0.5 * tl.erf(gate * SQRT_HALF)))
    tl.store(y_ptr + m * columns + d, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def geglu_backward_kernel(
    grad_ptr,  # (M, D)
    x_ptr,  # (M, 2 D): hidden, gate
    grad_x_ptr,  # (M, 2 D), written
    rows,  # M
    columns,  # D
    column_blocks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    m, d, inside = place(rows, columns, column_blocks, ROWS, COLUMNS)
    offsets = m * (2 * columns) + d
    grad = tl.load(grad_ptr + m * columns + d, mask=inside, other=0).to(tl.float32)
    hidden = tl.load(x_ptr + offsets, mask=inside, other=0).to(tl.float32)
    gate = tl.load(x_ptr + offsets + columns, mask=inside, other=0).to(tl.float32)
    below = 0.5 + 0.5 * tl.erf(gate * SQRT_HALF)
    slope = below + gate * (DENSITY * tl.exp(-0.5 * gate * gate))
    of_hidden = grad * (gate * below)
    of_gate = grad * hidden * slope
    kind = grad_x_ptr.dtype.element_ty
    tl.store(grad_x_ptr + offsets, of_hidden.to(kind), mask=inside)
    tl.store(grad_x_ptr + offsets + columns, of_gate.to(kind), mask=inside)


def tiles(x):  # (..., 2 D)
    """M, D, column_blocks and the number of programs."""
    columns = x.shape[-1] // 2
    rows = x.numel() // x.shape[-1]
    column_blocks = triton.cdiv(columns, COLUMNS)
    return rows, columns, column_blocks, triton.cdiv(rows, ROWS) * column_blocks


def geglu(x):  # (..., 2 D) contiguous
    """Argument and result as in ``reference.geglu``."""
    *shape, programs = tiles(x)
    y = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)
    geglu_kernel[(programs,)](x, y, *shape, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4)
    return (y,)


def geglu_backward(grad, x):  # (..., D), (..., 2 D), both contiguous
    """Arguments and result as in ``reference.geglu_backward``."""
    *shape, programs = tiles(x)
    grad_x = torch.empty_like(x)
    geglu_backward_kernel[(programs,)](
        grad, x, grad_x, *shape, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4
    )
    return (grad_x,)
