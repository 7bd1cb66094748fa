"""guidance_loss in Triton: one pass over the four predictions, loss and student gradient out.

The formula is ``reference.guidance_loss``. Each program takes BLOCK elements of one sample, writes their
gradient and one partial sum of squared errors; one more program adds the partial sums up. There are no
atomics and every sum has a fixed order, so two runs agree in every bit.
"""

import torch
import triton
import triton.language as tl

BLOCK = (
    1024  # 4 warps, 8 elements a thread: one 16-byte access for the 2-byte dtypes, two for float32
)
SUMS_SAMPLES, SUMS_BLOCKS = 16, 16  # partial sums at once; more spills (Triton 3.6, sm_90)


@triton.jit
def guidance_loss_kernel(
    student_ptr,  # (B, M)
    anchor_ptr,  # (B, M)
    concept_ptr,  # (B, M)
    null_ptr,  # (B, M)
    negative_guidance_ptr,  # (B,)
    weight_ptr,  # (B,)
    gradient_ptr,  # (B, M), written
    partial_sums_ptr,  # (B, blocks), written
    elements,  # M
    blocks,  # programs a sample
    scale,  # 2 gradient_scale / (B M)
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks
    offsets = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < elements
    offsets += b * elements

    # float32 straight after each load: the interpreter computes on the raw bits of bfloat16
    student = tl.load(student_ptr + offsets, mask=inside, other=0).to(tl.float32)
    anchor = tl.load(anchor_ptr + offsets, mask=inside, other=0).to(tl.float32)
    concept = tl.load(concept_ptr + offsets, mask=inside, other=0).to(tl.float32)
    null = tl.load(null_ptr + offsets, mask=inside, other=0).to(tl.float32)
    negative_guidance = tl.load(negative_guidance_ptr + b)
    weight = tl.load(weight_ptr + b)

    error = student - (anchor - negative_guidance * (concept - null))  # 0 outside
    gradient = error * (weight * scale)
    tl.store(gradient_ptr + offsets, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
    # The mask again: 0 * (an infinite negative_guidance) is no 0.
    squares = tl.where(inside, error * error, 0.0)
    tl.store(partial_sums_ptr + program, tl.sum(squares, axis=0))


@triton.jit
def guidance_loss_sums_kernel(
    partial_sums_ptr,  # (B, blocks)
    weight_ptr,  # (B,)
    per_sample_ptr,  # (B,), written
    loss_ptr,  # (), written
    batch,  # B
    elements,  # M
    blocks,  # partial sums a sample
    SAMPLES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    total = tl.zeros((SAMPLES,), tl.float32)
    for first in range(0, batch, SAMPLES):
        b = first + tl.arange(0, SAMPLES)
        sums = tl.zeros((SAMPLES,), tl.float32)
        for start in range(0, blocks, BLOCKS):
            c = start + tl.arange(0, BLOCKS)
            inside = (b < batch)[:, None] & (c < blocks)[None, :]
            offsets = b.to(tl.int64)[:, None] * blocks + c[None, :]
            sums += tl.sum(tl.load(partial_sums_ptr + offsets, mask=inside, other=0.0), axis=1)
        weight = tl.load(weight_ptr + b, mask=b < batch, other=0.0)
        per_sample = weight * (sums / elements)
        tl.store(per_sample_ptr + b, per_sample, mask=b < batch)
        total += tl.where(b < batch, per_sample, 0.0)
    tl.store(loss_ptr, tl.sum(total, axis=0) / batch)


def guidance_loss(
    student, anchor, concept, null, negative_guidance, weight, gradient_scale
):  # (B, ...) x 4, (B,) x 2
    """Arguments and results as in ``reference.guidance_loss``; the predictions share one dense layout."""
    batch = student.shape[0]
    elements = student.numel() // batch
    blocks = triton.cdiv(elements, BLOCK)
    gradient = torch.empty_like(student)
    loss, per_sample, partial_sums = (
        torch.empty(shape, dtype=torch.float32, device=student.device)
        for shape in ((), (batch,), (batch, blocks))
    )
    guidance_loss_kernel[(batch * blocks,)](
        student,
        anchor,
        concept,
        null,
        negative_guidance,
        weight,
        gradient,
        partial_sums,
        elements,
        blocks,
        2.0 * gradient_scale / student.numel(),
        BLOCK=BLOCK,
        num_warps=4,
    )
    guidance_loss_sums_kernel[(1,)](
        partial_sums,
        weight,
        per_sample,
        loss,
        batch,
        elements,
        blocks,
        SAMPLES=SUMS_SAMPLES,
        BLOCKS=SUMS_BLOCKS,
        num_warps=4,
    )
    return loss, per_sample, gradient
