"""guided_step in Triton: guidance, the scheduler's step, the next UNet input and the sample, in one launch.

The formula is ``reference.guided_step``. Each program takes BLOCK elements of one trajectory and is alone
with them: no atomics, every sum in a fixed order. The number of the call is read from the device, so a
captured graph can be replayed for every call; one that is not in the history writes nothing.
"""

import triton
import triton.language as tl

BLOCK = 512  # 4 warps, 4 elements a thread: one 16-byte access for float32
AHEAD = 8  # rows of the history in flight at once


# One binary, whatever the length of a trajectory and the place of the index.
@triton.jit(
    do_not_specialize=["blocks", "calls", "table_stride"],
    do_not_specialize_on_alignment=["index_ptr"],
)
def guided_step_kernel(
    predictions_ptr,  # (N, B, M)
    index_ptr,  # (1,) int64
    table_ptr,  # (rows, columns)
    input_scales_ptr,  # (rows,)
    history_ptr,  # (calls + 1, B, M), row index + 1 written
    inputs_ptr,  # (N, B, M), written
    seen_ptr,  # (B, calls, M), column index + 1 written; or None
    said_ptr,  # (N, B, calls, M), column index written; or None
    guidance_scale,
    elements,  # M
    blocks,  # programs a trajectory
    row,  # B M
    calls,
    name_stride,  # B calls M
    table_stride,
    NAMES: tl.constexpr,  # N
    ROLLED: tl.constexpr,  # which of them is followed
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks
    offsets = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(index_ptr).to(tl.int64)
    known = (index >= 0) & (index < calls)
    inside = (offsets < elements) & known
    here = b * elements + offsets  # in (B, M)
    there = b * calls * elements + offsets  # in (B, calls, M)

    # float32 straight after each load: the interpreter computes on the raw bits of bfloat16
    null = tl.load(predictions_ptr + here, mask=inside, other=0).to(tl.float32)
    rolled = null
    at, column = here, there + index * elements  # sums, not products: those of int32 could overflow
    for name in tl.static_range(NAMES):
        prediction = tl.load(predictions_ptr + at, mask=inside, other=0)
        if said_ptr is not None:
            tl.store(said_ptr + column, prediction, mask=inside)
        if name == ROLLED:
            rolled = prediction.to(tl.float32)
        at += row
        column += name_stride
    guided = null + guidance_scale * (rolled - null)
    tl.store(history_ptr + (index + 1) * row + here, guided, mask=inside)

    coefficients_ptr = table_ptr + (index + 1) * table_stride
    state = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, tl.where(known, index + 1, 0), AHEAD):
        for ahead in tl.static_range(AHEAD):
            k = first + ahead
            coefficient = tl.load(coefficients_ptr + k, mask=k <= index, other=0.0)
            past = tl.load(history_ptr + k * row + here, mask=inside & (k <= index), other=0.0)
            state += coefficient * past
    state += tl.load(coefficients_ptr + index + 1, mask=known, other=0.0) * guided

    scaled = state * tl.load(input_scales_ptr + index + 1, mask=known, other=0.0)
    scaled = scaled.to(inputs_ptr.dtype.element_ty)
    at = here
    for _ in tl.static_range(NAMES):
        tl.store(inputs_ptr + at, scaled, mask=inside)
        at += row
    if seen_ptr is not None:
        column = there + (index + 1) * elements
        tl.store(seen_ptr + column, scaled, mask=inside & (index + 1 < calls))


def guided_step(
    predictions, index, table, input_scales, rolled, guidance_scale, history, inputs, seen, said
):
    """Arguments and results as in ``reference.guided_step``; all but `table` contiguous, and its rows."""
    names, batch = predictions.shape[:2]
    row = predictions[0].numel()
    elements, calls = row // batch, history.shape[0] - 1
    blocks = triton.cdiv(elements, BLOCK)
    guided_step_kernel[(batch * blocks,)](
        predictions,
        index,
        table,
        input_scales,
        history,
        inputs,
        seen,
        said,
        guidance_scale,
        elements,
        blocks,
        row,
        calls,
        row * calls,
        table.stride(0),
        NAMES=names,
        ROLLED=rolled,
        BLOCK=BLOCK,
        AHEAD=AHEAD,
        num_warps=4,
    )
    return tuple(x for x in (history, inputs, seen, said) if x is not None)
