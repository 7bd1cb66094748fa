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
