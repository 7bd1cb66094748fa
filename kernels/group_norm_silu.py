"""GroupNorm, with SiLU behind it or without, in Triton: channels_last in and out, forward and gradient.

The formulas are ``reference.group_norm_silu`` and ``reference.group_norm_silu_backward``. A sample is a
(S, C) matrix in memory, S = H W. Programs take tiles of ROWS x CHANNELS of it, whatever the groups are: a
group of 10 channels is 20 bytes wide, too narrow to read by itself. So each direction has three steps:
tiles -> two numbers a channel (for each tile), those -> two numbers a group, tiles again -> result.

Variances are sums of squared distances from each tile's own mean, put together afterwards (Chan, Golub and
LeVeque 1983): sums of plain squares lose everything where the mean is large. No atomics, and every sum has a
fixed order, so two runs agree in every bit.
"""

import torch
import triton
import triton.language as tl

ROWS, CHANNELS = 64, 64  # 4 warps, 32 elements a thread; SD's channels are multiples of 64
PARTIALS = 512  # numbers of the tiles that are added up at once


@triton.jit
def tile_place(
    rows, channels, row_blocks, channel_blocks, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """This program's block (n row_blocks + r), sample n, channels (CHANNELS,), first element's offset,
    offsets from there and mask (ROWS, CHANNELS), and how many rows it has."""
    program = tl.program_id(0).to(tl.int64)
    block = program // channel_blocks
    n = block // row_blocks
    first = (block % row_blocks) * ROWS
    c = (program % channel_blocks).to(tl.int32) * CHANNELS + tl.arange(0, CHANNELS)
    s = tl.arange(0, ROWS)
    count = tl.minimum(rows - first, ROWS).to(tl.int32)
    inside = (s < count)[:, None] & (c < channels)[None, :]
    return (
        block,
        n,
        c,
        (n * rows + first) * channels,
        s[:, None] * channels + c[None, :],
        inside,
        count,
    )


@triton.jit
def silu_gradient(z):
    sigmoid = 1.0 / (1.0 + tl.exp(-z))
    return sigmoid * (1.0 + z * (1.0 - sigmoid))


@triton.jit
def tile_moments_kernel(
    x_ptr,  # (N, S, C)
    means_ptr,  # (N, row_blocks, C), written
    squares_ptr,  # (N, row_blocks, C), written: sums of squared distances from those means
    rows,  # S
    channels,  # C
    row_blocks,  # tiles a column of tiles
    channel_blocks,  # tiles a row of tiles
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    block, _, c, base, offsets, inside, count = tile_place(
        rows, channels, row_blocks, channel_blocks, ROWS, CHANNELS
    )
    # float32 straight after each load: the interpreter computes on the raw bits of bfloat16
    x = tl.load(x_ptr + base + offsets, mask=inside, other=0).to(tl.float32)
    rough = tl.sum(x, axis=0) / count
    distance = tl.where(inside, x - rough[None, :], 0.0)
    rest = tl.sum(distance, axis=0) / count  # what the rounding of a large sum has lost
    squares = tl.maximum(tl.sum(distance * distance, axis=0) - count * rest * rest, 0.0)
    place = block * channels + c
    tl.store(means_ptr + place, rough + rest, mask=c < channels)
    tl.store(squares_ptr + place, squares, mask=c < channels)


@triton.jit
def group_moments_kernel(
    means_ptr,  # (N, row_blocks, C)
    squares_ptr,  # (N, row_blocks, C)
    mean_ptr,  # (N, G), written
    rstd_ptr,  # (N, G), written
    rows,  # S
    members,  # C / G
    groups,  # G
    row_blocks,
    eps,
    ROWS: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)  # n G + g
    channels = groups * members
    first = (program // groups) * row_blocks * channels + (program % groups) * members
    elements = (rows * 1.0) * members

    level = tl.load(means_ptr + first)  # taken off first: sums of the means would lose digits
    sums = tl.zeros((PARTIALS,), tl.float32)
    for start in range(0, row_blocks * members, PARTIALS):
        i = start + tl.arange(0, PARTIALS)  # block by block, in each the group's channels
        inside = i < row_blocks * members
        offsets = first + (i // members) * channels + i % members
        count = tl.minimum(rows - (i // members) * ROWS, ROWS).to(tl.float32)
        distance = tl.load(means_ptr + offsets, mask=inside, other=0.0) - level
        sums += tl.where(inside, count * distance, 0.0)
    mean = level + tl.sum(sums, axis=0) / elements
    squares = tl.zeros((PARTIALS,), tl.float32)
    for start in range(0, row_blocks * members, PARTIALS):
        i = start + tl.arange(0, PARTIALS)
        inside = i < row_blocks * members
        offsets = first + (i // members) * channels + i % members
        count = tl.minimum(rows - (i // members) * ROWS, ROWS).to(tl.float32)
        distance = tl.load(means_ptr + offsets, mask=inside, other=0.0) - mean
        within = tl.load(squares_ptr + offsets, mask=inside, other=0.0)
        squares += tl.where(inside, within + count * distance * distance, 0.0)
    variance = tl.sum(squares, axis=0) / elements
    tl.store(mean_ptr + program, mean)
    tl.store(rstd_ptr + program, tl.rsqrt(variance + eps))


@triton.jit
def normalise_kernel(
    x_ptr,  # (N, S, C)
    mean_ptr,  # (N, G)
    rstd_ptr,  # (N, G)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    y_ptr,  # (N, S, C), written
    rows,  # S
    channels,  # C
    members,  # C / G
    row_blocks,
    channel_blocks,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    _, n, c, base, offsets, inside, _ = tile_place(
        rows, channels, row_blocks, channel_blocks, ROWS, CHANNELS
    )
    real = c < channels
    group = n * (channels // members) + c // members
    mean = tl.load(mean_ptr + group, mask=real, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=real, other=0.0)
    weight = tl.load(weight_ptr + c, mask=real, other=0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=real, other=0).to(tl.float32)
    x = tl.load(x_ptr + base + offsets, mask=inside, other=0).to(tl.float32)
    y = (x - mean[None, :]) * rstd[None, :] * weight[None, :] + bias[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(y_ptr + base + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


def tiles(x):  # (N, C, H, W)
    """S, row_blocks, channel_blocks and the number of programs."""
    n, channels, height, width = x.shape
    rows = height * width
    row_blocks, channel_blocks = triton.cdiv(rows, ROWS), triton.cdiv(channels, CHANNELS)
    return rows, row_blocks, channel_blocks, n * row_blocks * channel_blocks


def group_norm_silu(x, weight, bias, groups, eps, silu):  # (N, C, H, W) channels_last, (C,) x 2
    """Arguments and results as in ``reference.group_norm_silu``."""
    n, channels = x.shape[:2]
    rows, row_blocks, channel_blocks, programs = tiles(x)
    members = channels // groups
    y = torch.empty_like(x, memory_format=torch.channels_last)
    mean, rstd, means, squares = (
        torch.empty(shape, dtype=torch.float32, device=x.device)
        for shape in ((n, groups),) * 2 + ((n, row_blocks, channels),) * 2
    )
    tile_moments_kernel[(programs,)](
        x,
        means,
        squares,
        rows,
        channels,
        row_blocks,
        channel_blocks,
        ROWS=ROWS,
        CHANNELS=CHANNELS,
        num_warps=4,
    )
    group_moments_kernel[(n * groups,)](
        means,
        squares,
        mean,
        rstd,
        rows,
        members,
        groups,
        row_blocks,
        eps,
        ROWS=ROWS,
        PARTIALS=PARTIALS,
        num_warps=4,
    )
    normalise_kernel[(programs,)](
        x,
        mean,
        rstd,
        weight,
        bias,
        y,
        rows,
        channels,
        members,
        row_blocks,
        channel_blocks,
        SILU=silu,
        ROWS=ROWS,
        CHANNELS=CHANNELS,
        num_warps=4,
    )
    return y, mean, rstd


# --- gradient ----------------------------------------------------------------------------------------


@triton.jit
def gradient_tile(
    grad_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    channels,
    members,
    n,
    c,
    base,
    offsets,
    inside,
    SILU: tl.constexpr,
):
    """Of this program's tile: the gradient before the SiLU and the normalised x (ROWS, CHANNELS), both 0
    outside, and rstd and weight of its channels (CHANNELS,)."""
    real = c < channels
    group = n * (channels // members) + c // members
    mean = tl.load(mean_ptr + group, mask=real, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=real, other=0.0)
    weight = tl.load(weight_ptr + c, mask=real, other=0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=real, other=0).to(tl.float32)
    x = tl.load(x_ptr + base + offsets, mask=inside, other=0).to(tl.float32)
    grad = tl.load(grad_ptr + base + offsets, mask=inside, other=0).to(tl.float32)
    normalised = tl.where(inside, (x - mean[None, :]) * rstd[None, :], 0.0)
    if SILU:
        grad = grad * silu_gradient(normalised * weight[None, :] + bias[None, :])
        grad = tl.where(inside, grad, 0.0)
    return grad, normalised, rstd, weight


@triton.jit
def tile_gradients_kernel(
    grad_ptr,  # (N, S, C)
    x_ptr,  # (N, S, C)
    mean_ptr,  # (N, G)
    rstd_ptr,  # (N, G)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    for_bias_ptr,  # (N, row_blocks, C), written: sums of the gradient before the SiLU
    for_weight_ptr,  # (N, row_blocks, C), written: of that times the normalised x
    rows,  # S
    channels,  # C
    members,  # C / G
    row_blocks,
    channel_blocks,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    block, n, c, base, offsets, inside, _ = tile_place(
        rows, channels, row_blocks, channel_blocks, ROWS, CHANNELS
    )
    grad, normalised, _, _ = gradient_tile(
        grad_ptr,
        x_ptr,
        mean_ptr,
        rstd_ptr,
        weight_ptr,
        bias_ptr,
        channels,
        members,
        n,
        c,
        base,
        offsets,
        inside,
        SILU,
    )
    place = block * channels + c
    tl.store(for_bias_ptr + place, tl.sum(grad, axis=0), mask=c < channels)
    tl.store(for_weight_ptr + place, tl.sum(grad * normalised, axis=0), mask=c < channels)


@triton.jit
def group_gradients_kernel(
    for_bias_ptr,  # (N, row_blocks, C)
    for_weight_ptr,  # (N, row_blocks, C)
    weight_ptr,  # (C,)
    level_ptr,  # (N, G), written: mean of the normalised x's gradient
    slope_ptr,  # (N, G), written: mean of that times the normalised x
    rows,  # S
    members,  # C / G
    groups,  # G
    row_blocks,
    PARTIALS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)  # n G + g
    channels = groups * members
    own = (program % groups) * members
    first = (program // groups) * row_blocks * channels + own
    level = tl.zeros((PARTIALS,), tl.float32)
    slope = tl.zeros((PARTIALS,), tl.float32)
    for start in range(0, row_blocks * members, PARTIALS):
        i = start + tl.arange(0, PARTIALS)
        inside = i < row_blocks * members
        offsets = first + (i // members) * channels + i % members
        weight = tl.load(weight_ptr + own + i % members, mask=inside, other=0).to(tl.float32)
        level += weight * tl.load(for_bias_ptr + offsets, mask=inside, other=0.0)
        slope += weight * tl.load(for_weight_ptr + offsets, mask=inside, other=0.0)
    elements = (rows * 1.0) * members
    tl.store(level_ptr + program, tl.sum(level, axis=0) / elements)
    tl.store(slope_ptr + program, tl.sum(slope, axis=0) / elements)


@triton.jit
def input_gradient_kernel(
    grad_ptr,  # (N, S, C)
    x_ptr,  # (N, S, C)
    mean_ptr,  # (N, G)
    rstd_ptr,  # (N, G)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    level_ptr,  # (N, G)
    slope_ptr,  # (N, G)
    grad_x_ptr,  # (N, S, C), written
    rows,  # S
    channels,  # C
    members,  # C / G
    row_blocks,
    channel_blocks,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    _, n, c, base, offsets, inside, _ = tile_place(
        rows, channels, row_blocks, channel_blocks, ROWS, CHANNELS
    )
    grad, normalised, rstd, weight = gradient_tile(
        grad_ptr,
        x_ptr,
        mean_ptr,
        rstd_ptr,
        weight_ptr,
        bias_ptr,
        channels,
        members,
        n,
        c,
        base,
        offsets,
        inside,
        SILU,
    )
    group = n * (channels // members) + c // members
    level = tl.load(level_ptr + group, mask=c < channels, other=0.0)
    slope = tl.load(slope_ptr + group, mask=c < channels, other=0.0)
    away = level[None, :] + normalised * slope[None, :]  # what the mean and the variance take
    grad_x = rstd[None, :] * (grad * weight[None, :] - away)
    tl.store(grad_x_ptr + base + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)


def group_norm_silu_backward(grad, x, mean, rstd, weight, bias, groups, silu, parameters):
    """Arguments and results as in ``reference.group_norm_silu_backward``; grad and x channels_last."""
    n, channels = x.shape[:2]
    rows, row_blocks, channel_blocks, programs = tiles(x)
    members = channels // groups
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    level, slope, for_bias, for_weight = (
        torch.empty(shape, dtype=torch.float32, device=x.device)
        for shape in ((n, groups),) * 2 + ((n, row_blocks, channels),) * 2
    )
    tile_gradients_kernel[(programs,)](
        grad,
        x,
        mean,
        rstd,
        weight,
        bias,
        for_bias,
        for_weight,
        rows,
        channels,
        members,
        row_blocks,
        channel_blocks,
        SILU=silu,
        ROWS=ROWS,
        CHANNELS=CHANNELS,
        num_warps=4,
    )
    group_gradients_kernel[(n * groups,)](
        for_bias,
        for_weight,
        weight,
        level,
        slope,
        rows,
        members,
        groups,
        row_blocks,
        PARTIALS=PARTIALS,
        num_warps=4,
    )
    input_gradient_kernel[(programs,)](
        grad,
        x,
        mean,
        rstd,
        weight,
        bias,
        level,
        slope,
        grad_x,
        rows,
        channels,
        members,
        row_blocks,
        channel_blocks,
        SILU=silu,
        ROWS=ROWS,
        CHANNELS=CHANNELS,
        num_warps=4,
    )
    if not parameters:
        return grad_x, weight.new_empty(0), bias.new_empty(0)
    return (
        grad_x,
        for_weight.sum((0, 1)).to(weight.dtype),  # (N, row_blocks, C) -> (C,), in a fixed order
        for_bias.sum((0, 1)).to(bias.dtype),
    )
