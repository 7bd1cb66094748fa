"""The formulas in plain torch: what every kernel is tested against, and what runs where none is faster."""

import torch


def guidance_loss(student, anchor, concept, null, negative_guidance, weight, gradient_scale=1.0):
    """Loss of the student against the guided target, and its gradient.

    Predictions (B, ...), negative_guidance and weight (B,) float32, maths in float32. Returns

        loss        ()     mean over the samples of per_sample
        per_sample  (B,)   weight * mean((student - target)^2),
                           target = anchor - negative_guidance * (concept - null)
        gradient    (B, ...), the student's dtype: gradient_scale * d loss / d student
    """
    batch = student.shape[0]
    rows = (batch,) + (1,) * (student.dim() - 1)
    target = anchor.float() - negative_guidance.view(rows) * (concept.float() - null.float())
    error = student.float() - target
    per_sample = weight * error.square().reshape(batch, -1).mean(1)
    factor = weight * (2.0 * gradient_scale / student.numel())
    return per_sample.mean(), per_sample, (error * factor.view(rows)).to(student.dtype)


def guidance_loss_example(device):
    """Small arguments that reach every branch of a kernel: a tail, mixed dtypes, a kept sample."""
    student, anchor, concept, null = (
        torch.sin(torch.arange(2 * 35, device=device) * step + 1.0).view(2, 5, 7)
        for step in (0.7, 1.1, 1.3, 1.7)
    )
    negative_guidance = torch.tensor([1.5, 0.0], device=device)
    weight = torch.tensor([1.0, 0.5], device=device)
    return student, anchor, concept, null, negative_guidance, weight, 2.0


def guided_step(
    predictions, index, table, input_scales, rolled, guidance_scale, history, inputs, seen, said
):
    """One call of a scheduler that is a table, for B trajectories side by side; maths in float32.

        predictions   (N, B, ...)      what the UNet said for N prompts; the first is "null"
        index         () or (1,)       int64, the number i of the call, on the device
        table         (rows, columns)  float32, row i makes the state after i calls
        input_scales  (rows,)          float32, what each state is scaled with for the UNet

    Written, and returned where it is not None:

        history  (calls + 1, B, ...)     float32: the start, then every guided prediction. Row i + 1 is
                                         null + guidance_scale * (predictions[rolled] - null)
        inputs   (N, B, ...)             the scaled state after this call, N times over
        seen     (B, calls, ...)         the same at [:, i + 1], where there is a call i + 1
        said     (N, B, calls, ...)      predictions, at [:, :, i]

    Rows of the history that are yet to come are finite. On a GPU the host does not wait.
    """
    index = index.view(1)
    null, followed = predictions[0].float(), predictions[rolled].float()
    history.index_copy_(0, index + 1, (null + guidance_scale * (followed - null)).unsqueeze(0))
    if (
        history.device.type == "cpu"
    ):  # reading the index costs nothing: the sum ends there, in place
        after = int(index) + 1
        state = torch.zeros_like(null)
        for coefficient, past in zip(table[after, : after + 1].tolist(), history, strict=False):
            state.add_(past, alpha=coefficient)
    else:  # over the whole history, whose rows to come count nothing
        coefficients = table.index_select(0, index + 1)[0, : len(history)]
        state = (coefficients.view(-1, *(1,) * null.dim()) * history).sum(0)
    scaled = (state * input_scales.index_select(0, index + 1)).to(inputs.dtype)
    inputs.copy_(scaled)  # (B, ...) to each of (N, B, ...)
    if seen is not None:
        last = seen.shape[1] - 1
        after = (index + 1).clamp(max=last)
        kept = torch.where(index < last, scaled.unsqueeze(1), seen.index_select(1, after))
        seen.index_copy_(1, after, kept)
    if said is not None:
        said.index_copy_(2, index, predictions.unsqueeze(2))
    return tuple(x for x in (history, inputs, seen, said) if x is not None)


def guided_step_example(device):
    """Small arguments that reach every branch of a kernel: a tail, a table wider than the history, every
    buffer. Fresh at each call, since they are written to."""
    predictions = torch.sin(torch.arange(3 * 2 * 35, device=device) * 0.7).view(3, 2, 5, 7)
    table = torch.tril(torch.cos(torch.arange(36, device=device) * 0.9).view(6, 6))
    history = torch.sin(torch.arange(4 * 2 * 35, device=device) * 1.3).view(4, 2, 5, 7)
    inputs, seen, said = (
        torch.zeros(*shape, 5, 7, device=device) for shape in ((3, 2), (2, 3), (3, 2, 3))
    )
    index = torch.tensor([1], device=device)
    scales = table[:, 0].contiguous()
    return predictions, index, table, scales, 1, 3.0, history, inputs, seen, said


def group_norm_silu(x, weight, bias, groups, eps, silu):
    """GroupNorm, and SiLU behind it if `silu`.

    x (N, C, H, W), weight and bias (C,), maths in float32. Returns

        y     (N, C, H, W), x's dtype
        mean  (N, groups) float32, and
        rstd  (N, groups) float32, 1 / sqrt(variance + eps): all that the gradient needs besides x
    """
    grouped = x.float().reshape(x.shape[0], groups, -1)  # (N, groups, C / groups H W)
    variance, mean = torch.var_mean(grouped, 2, correction=0)
    rstd = torch.rsqrt(variance + eps)
    z = _normalised(x, mean, rstd, groups) * _channels(weight) + _channels(bias)
    y = torch.nn.functional.silu(z) if silu else z
    return y.to(x.dtype), mean, rstd


def group_norm_silu_backward(grad, x, mean, rstd, weight, bias, groups, silu, parameters):
    """The gradients of x, weight and bias, each in its dtype; the last two empty unless `parameters`.

    grad (N, C, H, W) is that of group_norm_silu's y, from x, weight and bias as there and its mean and rstd.
    """
    normalised = _normalised(x, mean, rstd, groups)
    grad = grad.float()
    if silu:
        z = normalised * _channels(weight) + _channels(bias)
        sigmoid = torch.sigmoid(z)
        grad = grad * sigmoid * (1 + z * (1 - sigmoid))
    grouped = (x.shape[0], groups, -1)
    of_normalised = (grad * _channels(weight)).reshape(grouped)
    flat = normalised.reshape(grouped)
    level = of_normalised.mean(2, keepdim=True)
    slope = (of_normalised * flat).mean(2, keepdim=True)
    of_x = rstd[:, :, None] * (of_normalised - level - flat * slope)
    of_x = of_x.reshape(x.shape).to(x.dtype)
    if not parameters:
        return of_x, weight.new_empty(0), bias.new_empty(0)
    of_weight, of_bias = (grad * normalised).sum((0, 2, 3)), grad.sum((0, 2, 3))
    return of_x, of_weight.to(weight.dtype), of_bias.to(bias.dtype)


def _normalised(x, mean, rstd, groups):
    grouped = x.float().reshape(x.shape[0], groups, -1)
    return ((grouped - mean[:, :, None]) * rstd[:, :, None]).reshape(x.shape)


def _channels(vector):  # (C,) -> (C, 1, 1)
    return vector.float()[:, None, None]


def group_norm_silu_example(device):
    """Small arguments that reach every branch of a kernel: tails of rows and of channels, more than one
    tile each way, groups of eleven across a tile's edge; and a gradient of y."""
    return _norm_example((2, 66, 5, 13), 6, device)


def group_norm_silu_even_example(device):
    """The same for kernels that take channels four at a time: these are a multiple of it, on more rows."""
    return _norm_example((1, 44, 15, 13), 4, device)


def _norm_example(shape, groups, device):
    n, channels, height, width = shape
    x, grad = (
        torch.sin(torch.arange(n * channels * height * width, device=device) * step + 1.0)
        .view(n, height, width, channels)
        .permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W), channels_last
        for step in (0.7, 1.1)
    )
    weight, bias = (
        torch.cos(torch.arange(channels, device=device) * step + 1.0) for step in (0.3, 0.5)
    )
    return (x, weight, bias, groups, 1e-5, True), grad


def geglu(x):
    """hidden * gelu(gate), the two halves of x (..., 2 D); the GELU by the error function, maths in float32.

    Returns y (..., D) in x's dtype, in a tuple of one.
    """
    hidden, gate = x.float().chunk(2, -1)
    return ((hidden * torch.nn.functional.gelu(gate)).to(x.dtype),)


def geglu_backward(grad, x):
    """The gradient of x (..., 2 D), from grad (..., D), that of geglu's y; in a tuple of one."""
    hidden, gate = x.float().chunk(2, -1)
    grad = grad.float()
    below = 0.5 + 0.5 * torch.erf(gate * 0.5**0.5)
    slope = below + gate * torch.exp(-0.5 * gate.square()) * (2 * torch.pi) ** -0.5
    return (torch.cat((grad * gate * below, grad * hidden * slope), -1).to(x.dtype),)


def geglu_example(device):
    """Small arguments with tails of rows and columns and more than one tile; and a gradient of y."""
    x = 3 * torch.sin(torch.arange(5 * 2 * 259, device=device) * 0.7 + 1.0)
    grad = torch.sin(torch.arange(5 * 259, device=device) * 1.1 + 1.0)
    return (x.view(1, 5, 518),), grad.view(1, 5, 259)
