"""Puts the fast operators into a diffusers UNet, and takes them out again.

Modules keep their names, parameters and hooks: only the class of an instance is changed, to a subclass whose
forward calls ``esd_fast.ops``. diffusers itself is not patched. What has no fast way on the device, or is not
exactly what the subclass was written for, stays as it is, and the result says why.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    XFormersAttnProcessor,
)
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops

__all__ = ["Accelerated", "accelerate", "is_accelerated", "restore"]


# --- the classes -------------------------------------------------------------------------------------


class Norm(nn.GroupNorm):
    """GroupNorm that keeps channels_last."""

    def forward(self, input: Tensor) -> Tensor:  # torch's name for it
        return ops.group_norm_silu(
            input, self.weight, self.bias, self.num_groups, self.eps, silu=False
        )


class NormSiLU(nn.GroupNorm):
    """GroupNorm with the SiLU that comes after it."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.group_norm_silu(input, self.weight, self.bias, self.num_groups, self.eps)


class AppliedSiLU(nn.SiLU):
    """The SiLU that a NormSiLU has applied already."""

    def forward(self, input: Tensor) -> Tensor:
        return input


class Resnet(ResnetBlock2D):
    """ResnetBlock2D.forward for norms that are NormSiLU."""

    def forward(
        self,
        input_tensor: Tensor,
        temb: Tensor | None,
        *args: Any,  # noqa: ARG002 -- `scale`, which diffusers ignores
        **kwargs: Any,  # noqa: ARG002
    ) -> Tensor:
        hidden_states = self.conv1(self.norm1(input_tensor))
        if self.time_emb_proj is not None:
            if not self.skip_time_act:
                temb = self.nonlinearity(temb)
            temb = self.time_emb_proj(temb)[:, :, None, None]
        if temb is not None:
            hidden_states = hidden_states + temb
        hidden_states = self.conv2(self.dropout(self.norm2(hidden_states)))
        # diffusers makes input_tensor contiguous here while training, which undoes channels_last.
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        output = input_tensor + hidden_states
        # A division by 1 changes no bit and reads and writes everything once more.
        return output if self.output_scale_factor == 1 else output / self.output_scale_factor


class Activation(GEGLU):
    """GEGLU whose activation is one operator."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002
        return ops.geglu(self.proj(hidden_states))


class Transformer(Transformer2DModel):
    """Transformer2DModel that hands on its result in the layout that its input came in: channels_last without
    a copy. On the CPU one picture that is channels_last makes all after it so, and costs more than the copy."""

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> Tensor:
        def picture(x: Tensor) -> Tensor:  # (B, H W, C) -> (B, C, H, W)
            x = x.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
            return x.contiguous() if plain else x

        plain = residual.device.type == "cpu" and residual.is_contiguous()

        if self.use_linear_projection:
            return picture(self.proj_out(hidden_states)) + residual
        return self.proj_out(picture(hidden_states)) + residual


class DirectAttention(Attention):
    """Attention by SDPA without what diffusers does around it at every call: the processor's signature is
    looked up, and the result divided by a factor that is 1. Whatever else is asked for is left to diffusers.
    """

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        sdpa = type(self.processor) is AttnProcessor2_0
        if not sdpa or attention_mask is not None or cross_attention_kwargs:
            return super().forward(
                hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs
            )
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, tokens, D) -> (B, heads, ...)
            for x in (self.to_q(hidden_states), self.to_k(context), self.to_v(context))
        )
        y = F.scaled_dot_product_attention(query, key, value)
        return self.to_out[1](self.to_out[0](y.transpose(1, 2).flatten(2)))


PLAIN: dict[type, type] = {
    DirectAttention: Attention,
    Norm: nn.GroupNorm,
    NormSiLU: nn.GroupNorm,
    AppliedSiLU: nn.SiLU,
    Resnet: ResnetBlock2D,
    Activation: GEGLU,
    Transformer: Transformer2DModel,
}


def is_accelerated(unet: nn.Module) -> bool:
    return any(type(module) in PLAIN for module in unet.modules())


def restore(unet: nn.Module) -> None:
    """Every module's class as diffusers made it: for copies (deepcopy) of an accelerated UNet."""
    for module in unet.modules():
        if type(module) in PLAIN:
            module.__class__ = PLAIN[type(module)]


# --- what was done -----------------------------------------------------------------------------------


@dataclass
class Accelerated:
    """What `accelerate` changed and what not; `undo`, or the end of a `with`, puts all of it back."""

    unet: nn.Module
    changed: dict[str, str] = field(default_factory=dict)  # what: how many, and by which path
    skipped: dict[str, str] = field(default_factory=dict)  # what: why not
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def paths_taken(self) -> dict[str, str]:
        """For a report: one line for each thing that was or could have been changed."""
        names = dict.fromkeys((*self.changed, *self.skipped))
        return {name: self._line(name) for name in names}

    def _line(self, name: str) -> str:
        if name not in self.skipped:
            return self.changed[name]
        left = f"as it was ({self.skipped[name]})"
        return f"{self.changed[name]}; the rest {left}" if name in self.changed else left

    def undo(self) -> None:
        """The UNet as it was, bit for bit in what it computes. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def accelerate(
    unet: nn.Module,
    *,
    latent_size: tuple[int, int] | None = None,
    batch: int = 1,
    always: bool = False,
) -> Accelerated:
    """Fast GroupNorm with SiLU, GEGLU, memory layout and attention in `unet`, where they are faster.

    The UNet must lie on the device and in the dtype it will be used with. `latent_size` (h, w) and `batch` are
    the shape that xformers, where it is installed, is tried with; the UNet's own sample_size by default.
    `always` changes the modules even where torch runs the operators and nothing is won (for tests).
    """
    if is_accelerated(unet):
        raise ValueError("unet: is accelerated already; undo that, or restore(unet), first")
    done = Accelerated(unet)
    device = next(unet.parameters()).device
    try:
        fast = _operator(done, "group_norm_silu", _norms, device, always)
        _operator(done, "geglu", _geglus, device, always)
        # Without a GroupNorm that keeps it, channels_last is a copy at every norm.
        if fast and (always or device.type == "cuda"):
            _channels_last(done)
        elif fast:
            done.skipped["channels_last"] = f"not on {device.type}"
        else:
            done.skipped["channels_last"] = "torch's GroupNorm does not keep it"
        _attention(done, device, latent_size, batch)
        if {type(p) for p in done.unet.attn_processors.values()} == {AttnProcessor2_0}:  # type: ignore[operator]
            _places(done, "attention_calls", _attentions(unet), "direct")
    except BaseException:
        done.undo()
        raise
    return done


# --- operators ---------------------------------------------------------------------------------------

Swap = list[tuple[nn.Module, type]]  # modules that change together, and their new classes


def _operator(
    done: Accelerated,
    op: str,
    places: Callable[[nn.Module], Iterator[Swap | str]],
    device: torch.device,
    always: bool,
) -> bool:
    """Changes every place that `op` can take; whether there was one."""
    path = ops.path_of(op, device)
    if path.name == "torch" and not always:
        done.skipped[op] = str(path)
        return False
    return _places(done, op, places(done.unet), str(path))


def _places(done: Accelerated, what: str, places: Iterator[Swap | str], path: str) -> bool:
    """Changes every place; whether there was one."""
    count, reasons = 0, Counter[str]()
    for swap in list(places):
        if isinstance(swap, str):
            reasons[swap] += 1
            continue
        _swap(done, swap)
        count += 1
    if count:
        done.changed[what] = f"{count} places: {path}"
    if reasons:
        done.skipped[what] = "; ".join(f"{n}: {why}" for why, n in reasons.items())
    elif not count:
        done.skipped[what] = "the UNet has no place for it"
    return count > 0


def _swap(done: Accelerated, swap: Swap) -> None:
    for module, new in swap:
        done._undo.append(functools.partial(setattr, module, "__class__", type(module)))
        module.__class__ = new


def _norms(unet: nn.Module) -> Iterator[Swap | str]:
    """Resnets with their two norms, transformers with theirs, and the pair before the last convolution."""
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            why = _why_not_resnet(module)
            norms: Swap = [(module.norm1, NormSiLU), (module.norm2, NormSiLU)]
            yield why or [*norms, (module, Resnet)]
        elif isinstance(module, Transformer2DModel) and module.is_input_continuous:
            why = _why_not((module, Transformer2DModel), (module.norm, nn.GroupNorm))
            yield why or [(module.norm, Norm), (module, Transformer)]
    norm: Any = getattr(unet, "conv_norm_out", None)
    activation: Any = getattr(unet, "conv_act", None)
    if norm is not None:
        last: Swap = [(norm, NormSiLU), (activation, AppliedSiLU)]
        yield _why_not((norm, nn.GroupNorm), (activation, nn.SiLU)) or last


def _geglus(unet: nn.Module) -> Iterator[Swap | str]:
    for module in unet.modules():
        if isinstance(module, GEGLU):
            yield _why_not((module, GEGLU)) or [(module, Activation)]


def _attentions(unet: nn.Module) -> Iterator[Swap | str]:
    for module in unet.modules():
        if isinstance(module, Attention):
            yield _why_not_attention(module) or [(module, DirectAttention)]


def _why_not_attention(module: Any) -> str:
    for part in ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k"):
        if getattr(module, part, None) is not None:
            return f"Attention with {part}"
    if module.residual_connection or module.rescale_output_factor != 1:
        return "Attention that adds or scales"
    return _why_not((module, Attention))


def _why_not_resnet(module: Any) -> str:
    if module.time_embedding_norm != "default":
        return f"time_embedding_norm {module.time_embedding_norm!r}"
    if module.upsample is not None or module.downsample is not None:
        return "resamples inside"
    return _why_not(
        (module, ResnetBlock2D),
        (module.norm1, nn.GroupNorm),
        (module.norm2, nn.GroupNorm),
        (module.nonlinearity, nn.SiLU),
    )


def _why_not(*expected: tuple[Any, type]) -> str:
    """Exact types, since a subclass may do something else. Nothing that watches a module or has replaced
    its forward (accelerate's offloading does): it would see a norm with the SiLU in it, or hide ours."""
    for module, kind in expected:
        found = type(module)
        if found is not kind:
            return f"{found.__name__} where {kind.__name__} was expected"
        if "forward" in vars(module):
            return f"{kind.__name__} with a forward of its own"
        if kind in (nn.GroupNorm, nn.SiLU) and _hooked(module):
            return f"{kind.__name__} with hooks"
        if kind is nn.GroupNorm and not module.affine:
            return "GroupNorm without weight and bias"
    return ""


def _hooked(module: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


# --- memory layout -----------------------------------------------------------------------------------


def _channels_last(done: Accelerated) -> None:
    """The weights of the convolutions; what goes through them then follows."""
    weights = [p for p in done.unet.parameters() if p.dim() == 4]
    for weight in weights:
        done._undo.append(functools.partial(_strided, weight, weight.stride()))
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    done.changed["channels_last"] = f"{len(weights)} weights"


def _strided(weight: nn.Parameter, stride: tuple[int, ...]) -> None:
    """What `weight` holds now (it may have been trained), in the layout that it had."""
    plain = torch.empty_strided(weight.shape, stride, dtype=weight.dtype, device=weight.device)
    weight.data = plain.copy_(weight.data)


# --- attention ---------------------------------------------------------------------------------------


def _attention(
    done: Accelerated, device: torch.device, latent_size: tuple[int, int] | None, batch: int
) -> None:
    """xformers where it works on this very UNet's shapes, else SDPA."""
    unet: Any = done.unet
    before = dict(unet.attn_processors)
    others = {type(p) for p in before.values()} - {AttnProcessor, AttnProcessor2_0}
    if others:
        done.skipped["attention"] = f"{', '.join(sorted(t.__name__ for t in others))} was chosen"
        return
    shapes = tuple(dict.fromkeys(attention_shapes(unet, latent_size, batch)))
    why = _why_no_xformers(device, next(unet.parameters()).dtype, shapes)
    wanted = AttnProcessor2_0 if why else XFormersAttnProcessor
    if why:
        done.skipped["xformers"] = why
    if {type(p) for p in before.values()} == {wanted}:
        done.skipped["attention"] = "SDPA already"
        return
    done._undo.append(lambda: unet.set_attn_processor(dict(before)))
    unet.set_attn_processor(wanted())
    done.changed["attention"] = "SDPA" if why else "xformers"


Shape = tuple[int, int, int, int]  # batch times heads, queries, keys, numbers a head


def attention_shapes(
    unet: Any, latent_size: tuple[int, int] | None = None, batch: int = 1, text_tokens: int = 77
) -> Iterator[Shape]:
    """What each attention of `unet` works on, for latents of `latent_size` (h, w)."""
    if latent_size is None:
        size = unet.config.sample_size
        latent_size = (size, size) if isinstance(size, int) else tuple(size)
    last = len(unet.down_blocks) - 1
    for name, module in unet.named_modules():
        if not isinstance(module, Attention):
            continue
        part, index, *_ = name.split(".")
        level = last  # of mid_block
        if part in ("down_blocks", "up_blocks"):
            level = int(index) if part == "down_blocks" else last - int(index)
        height, width = (-(-n // 2**level) for n in latent_size)  # halved, rounded up
        tokens = height * width
        keys = text_tokens if module.is_cross_attention else tokens
        yield batch * module.heads, tokens, keys, module.inner_dim // module.heads


@functools.cache
def _why_no_xformers(device: torch.device, dtype: torch.dtype, shapes: tuple[Shape, ...]) -> str:
    if device.type != "cuda":
        return f"not on {device.type}"
    if importlib.util.find_spec("xformers") is None:
        return "not installed"
    try:
        attention = importlib.import_module("xformers.ops").memory_efficient_attention
    except Exception as error:  # noqa: BLE001 -- built for another torch, as a rule
        return f"does not import: {type(error).__name__}: {str(error).strip()[:200]}"
    return next(filter(None, (why_wrong(attention, s, device, dtype) for s in shapes)), "")


def why_wrong(
    attention: Callable[..., Tensor], shape: Shape, device: torch.device, dtype: torch.dtype
) -> str:
    """Runs `attention` on (batch times heads, tokens, numbers a head), forward and backward, and compares
    it with SDPA: some builds have a forward for a shape and no backward."""
    rows, queries, keys, size = shape
    generator = torch.Generator(device).manual_seed(0)
    query, key, value, grad = (
        torch.randn(rows, tokens, size, generator=generator, device=device, dtype=dtype)
        for tokens in (queries, keys, keys, queries)
    )
    inputs = [x.requires_grad_() for x in (query, key, value)]
    try:
        with torch.enable_grad():
            results = [
                (y, *torch.autograd.grad(y, inputs, grad))
                for y in (f(*inputs) for f in (attention, _sdpa))
            ]
        right = all(
            (x - y).float().norm() <= 16 * torch.finfo(dtype).eps * y.float().norm()
            for x, y in zip(*results, strict=True)
        )
    except Exception as error:  # noqa: BLE001 -- whatever it is, SDPA does the work
        return f"failed when tried on {shape}: {type(error).__name__}: {str(error).strip()[:200]}"
    return "" if right else f"gave wrong results when tried on {shape}"


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """With a batch dimension, without which torch has no fast kernel: (1, rows, tokens, size)."""
    return F.scaled_dot_product_attention(query[None], key[None], value[None])[0]
