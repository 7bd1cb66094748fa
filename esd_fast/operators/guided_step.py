"""guided_step: guidance, a scheduler's step from its table, the next UNet input and the sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import common

ARGUMENTS = (
    *("predictions", "index", "table", "input_scales"),
    *("history", "inputs", "seen", "said"),
)


def refuse_gradients(*values: Tensor | None) -> None:
    """Of what `ARGUMENTS` names."""
    for name, value in zip(ARGUMENTS, values, strict=True):
        if value is not None and value.requires_grad:
            raise ValueError(
                f"{name}: requires grad, but guided_step has no gradient: call it under torch.no_grad()"
            )


def check(
    predictions: Tensor,
    index: Tensor,
    table: Tensor,
    input_scales: Tensor,
    rolled: int,
    history: Tensor,
    inputs: Tensor,
    seen: Tensor | None,
    said: Tensor | None,
) -> None:
    """What the kernels take on trust."""
    if predictions.dim() < 2 or predictions.numel() == 0:
        raise ValueError(
            f"predictions: shape {tuple(predictions.shape)}: give them as (prompts, trajectories, ...)"
        )
    names, batch, *sample = predictions.shape
    if not min(1, names - 1) <= rolled < names:  # the only one there is, or not the first
        least = f"1 to {names - 1}" if names > 1 else "0"
        raise ValueError(f"rolled: {rolled}: use the number of a prompt, {least}")
    rows, calls = table.shape[0] if table.dim() == 2 else 0, history.shape[0] - 1
    if calls < 1 or not calls < rows <= table.shape[1]:
        raise ValueError(
            f"table: shape {tuple(table.shape)}: use (rows, columns), a row for each of history, "
            f"{history.shape[0]} (two or more), and no fewer columns than rows"
        )
    given = (predictions, index, table, input_scales, history, inputs, seen, said)
    shapes: tuple[tuple[int, ...], ...] = (
        predictions.shape,
        (1,) * index.dim() if index.dim() < 2 else (1,),
        table.shape,
        (rows,),
        (calls + 1, batch, *sample),
        predictions.shape,
        (batch, calls, *sample),
        (names, batch, calls, *sample),
    )
    low = common.DTYPES
    single = (torch.float32,)
    dtypes = (low, (torch.int64,), single, single, single, low, (inputs.dtype,))
    for name, value, shape, allowed in zip(
        ARGUMENTS, given, shapes, (*dtypes, (predictions.dtype,)), strict=True
    ):
        if value is None:
            continue
        if value.dtype not in allowed:
            would_do = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise ValueError(f"{name}: dtype {value.dtype}: use {would_do}")
        if tuple(value.shape) != tuple(shape):
            raise ValueError(f"{name}: shape {tuple(value.shape)}: use {tuple(shape)}")
        if value.device != predictions.device:
            raise ValueError(
                f"{name}: on {value.device}: move it to predictions' device, {predictions.device}"
            )
        if name in ARGUMENTS[4:] and not value.is_contiguous():
            raise ValueError(f"{name}: strides {value.stride()}: use a contiguous tensor")


PLAIN = common.plain("guided_step")
TRITON = common.triton("guided_step", "guided_step")


def native(
    predictions: Tensor,
    index: Tensor,
    table: Tensor,
    input_scales: Tensor,
    rolled: int,
    guidance_scale: float,
    history: Tensor,
    inputs: Tensor,
    seen: Tensor | None,
    said: Tensor | None,
) -> tuple[Tensor, ...]:
    prompts, batch = predictions.shape[:2]
    common.native().guided_step_cpu(
        common.address("predictions", predictions),
        common.address("index", index)[0],
        common.address("table", table, None)[0],  # its rows may lie apart
        table.stride(0),
        common.address("input_scales", input_scales)[0],
        rolled,
        guidance_scale,
        common.address("history", history)[0],
        common.address("inputs", inputs),
        common.address("seen", seen) if seen is not None else (0, common.DTYPE_CODES[inputs.dtype]),
        common.address("said", said)
        if said is not None
        else (0, common.DTYPE_CODES[predictions.dtype]),
        (prompts, batch, predictions[0, 0].numel(), history.shape[0] - 1),
        torch.get_num_threads(),
    )
    return tuple(x for x in (history, inputs, seen, said) if x is not None)


def example(device: torch.device) -> tuple[Any, ...]:
    return tuple(common.kernels("reference").guided_step_example(device))


# --- for torch ---------------------------------------------------------------------------------------


def fake(
    predictions: Tensor,
    index: Tensor,
    table: Tensor,
    input_scales: Tensor,
    rolled: int,
    guidance_scale: float,  # noqa: ARG001
    history: Tensor,
    inputs: Tensor,
    seen: Tensor | None = None,
    said: Tensor | None = None,
) -> None:
    check(predictions, index, table, input_scales, rolled, history, inputs, seen, said)


def register(library: torch.library.Library, chosen: Callable[[torch.device], Any]) -> None:
    """With torch; `chosen(device)` gives what runs there."""

    def real(
        predictions: Tensor,
        index: Tensor,
        table: Tensor,
        input_scales: Tensor,
        rolled: int,
        guidance_scale: float,
        history: Tensor,
        inputs: Tensor,
        seen: Tensor | None = None,
        said: Tensor | None = None,
    ) -> None:
        check(predictions, index, table, input_scales, rolled, history, inputs, seen, said)
        written = chosen(predictions.device)(
            predictions.contiguous(),
            index,
            table if table.stride(1) == 1 else table.contiguous(),
            input_scales.contiguous(),
            rolled,
            guidance_scale,
            history,
            inputs,
            seen,
            said,
        )
        # a kernel's writes are not counted by themselves
        torch.autograd.graph.increment_version(written)

    library.define(
        "guided_step(Tensor predictions, Tensor index, Tensor table, Tensor input_scales, int rolled, "
        "float guidance_scale, Tensor(a!) history, Tensor(b!) inputs, Tensor(c!)? seen=None, "
        "Tensor(d!)? said=None) -> ()"
    )
    library.impl("guided_step", real, "CompositeExplicitAutograd")
    torch.library.register_fake("esd_fast::guided_step", fake, lib=library)
