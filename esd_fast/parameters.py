"""The trainable subset: which parameters, their float32 masters, teacher and student values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .exact_copies import ExactCopies
from .terminal import quoted

if TYPE_CHECKING:
    import torch

ALIASES = {
    "xattn": "esd-x",
    "xattn-strict": "esd-x-strict",
    "noxattn": "esd-u",
    "full": "esd-all",
    "esd-a": "esd-all",  # as esd_sd.py's help calls it
}
# What each method is for, as shown by `esd-fast info` and in error messages.
METHODS = {
    "esd-x": "cross-attention: erases what the words ask for (styles, names)",
    "esd-x-strict": "keys and values of cross-attention only",
    "esd-u": "all but cross-attention: erases whatever the words (nudity, objects)",
    "esd-all": "every convolution and matrix",
    "selfattn": "self-attention",
    "ldm-xattn": "the paper's script: all cross-attention parameters",
    "ldm-noxattn": "the paper's script: all but cross-attention, output and time embedding",
    "ldm-selfattn": "the paper's script: all self-attention parameters",
    "ldm-notime": "the paper's script: all but output and time embedding",
    "ldm-full": "the paper's script: every parameter",
    "ldm-xlayer": "the paper's script: cross-attention of output blocks 6 and 8",
    "ldm-selflayer": "the paper's script: self-attention of input blocks 4 and 7",
}

# words of the module names of diffusers' UNets, for telling a misspelt method from an expression
MODULE_NAMES = (
    *("conv_in", "conv_out", "time_embedding", "add_embedding", "class_embedding", "linear_1"),
    *("linear_2", "down_blocks", "mid_block", "up_blocks", "attentions", "transformer_blocks"),
    *("attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out", "resnets"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers", "upsamplers"),
    *("encoder_hid_proj", "ff", "net"),
)


def canonical_method(method: str) -> str:
    return ALIASES.get(method, method)


def check_method(method: object) -> None:
    """A known name, an alias, or a regular expression. A plain word that is in no module's name
    is a misspelt method, and found out here, before anything is loaded."""
    if not isinstance(method, str) or not method.strip():
        raise ValueError(
            f"train_method is {quoted(method)}; it must be one of {', '.join(METHODS)}"
        )
    if canonical_method(method) in METHODS:
        return
    if re.fullmatch(r"[\w-]+", method) and not any(method in name for name in MODULE_NAMES):
        known = ", ".join([*METHODS, *ALIASES])
        raise ValueError(
            f"train_method is {quoted(method)}; it must be one of {known}, "
            "or a regular expression over module names such as 'up_blocks.*attn2'"
        )
    try:
        re.compile(method)
    except (re.error, RecursionError, OverflowError) as error:
        said = quoted(method)
        raise ValueError(f"train_method {said} is no regular expression: {error}") from None


def plain_parameters(unet: Any) -> dict[str, torch.nn.Parameter]:
    """The model's own parameters under the names that they have without adapters: peft wraps a
    layer, whose weight is then called `...base_layer.weight`, and puts its own beside it."""
    wrapped = [n for n, m in unet.named_modules() if hasattr(m, "base_layer")]
    found = {}
    for name, parameter in unet.named_parameters():
        around = next((w for w in wrapped if name.startswith(w + ".")), None)
        if around is None or name.startswith(around + ".base_layer."):
            found[name.replace(".base_layer.", ".")] = parameter
    return found


def trainable_names(unet: torch.nn.Module, method: str, family: str = "sd") -> list[str]:
    """State-dict names of the parameters that `method` trains, in the UNet's order.

    Raises ValueError where nothing is selected, with examples of what there is.
    """
    from torch import nn

    method = canonical_method(method)
    plain = plain_parameters(unet)
    if method in LDM_RULES:
        names = [n for n in plain if LDM_RULES[method](n)]
    else:
        selects = ESD_RULES.get(method) or re.compile(method).search
        sdxl = family == "sdxl" and method in ("esd-u", "esd-all")  # its script's further rule
        of_modules = {
            id(parameter)
            for module in unet.modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))
            for parameter in module.parameters(recurse=False)
        }
        names = [
            name
            for name, parameter in plain.items()
            if id(parameter) in of_modules
            and selects(module_name := name.rpartition(".")[0])
            and (not sdxl or ("block" in module_name and "emb" not in module_name))
        ]
    if not names:
        examples = [n for n, m in unet.named_modules() if isinstance(m, nn.Linear)][:3]
        raise ValueError(
            f"train_method {method!r} selects no parameter of this UNet; "
            f"its module names look like {', '.join(examples)}"
        )
    return names


ESD_RULES: dict[str, Callable[[str], object]] = {
    "esd-x": lambda n: "attn2" in n,
    "esd-x-strict": lambda n: "attn2.to_k" in n or "attn2.to_v" in n,
    "esd-u": lambda n: "attn2" not in n,
    "esd-all": lambda n: True,  # noqa: ARG005
    "selfattn": lambda n: "attn1" in n,
}


def is_output(name: str) -> bool:
    return name.startswith(("conv_norm_out.", "conv_out."))  # CompVis: `out.`


def is_time_embedding(name: str) -> bool:
    return name.startswith("time_embedding.")  # CompVis: `time_embed`


# The paper's script speaks CompVis names; where blocks are numbered, SD's four levels of three
# input and three output blocks: output 6 and 8 are up block 2's first and last, input 4 and 7
# the first of down blocks 1 and 2.
LDM_RULES: dict[str, Callable[[str], bool]] = {
    "ldm-xattn": lambda n: "attn2" in n,
    "ldm-selfattn": lambda n: "attn1" in n,
    "ldm-noxattn": lambda n: "attn2" not in n and not is_output(n) and not is_time_embedding(n),
    "ldm-notime": lambda n: not is_output(n) and not is_time_embedding(n),
    "ldm-full": lambda n: True,  # noqa: ARG005
    "ldm-xlayer": lambda n: (
        "attn2" in n and n.startswith(("up_blocks.2.attentions.0.", "up_blocks.2.attentions.2."))
    ),
    "ldm-selflayer": lambda n: (
        "attn1" in n
        and n.startswith(("down_blocks.1.attentions.0.", "down_blocks.2.attentions.0."))
    ),
}


PART_BYTES = 32 * 2**20  # of float32 gradients at a time


@dataclass
class TrainableSubset:
    """The parameters in training. Adam moves float32 masters; the UNet computes in its own dtype.

    `masters` are the parameters themselves where the UNet is float32 already. `frozen` holds
    exact copies of the starting values (the teacher's, and what `restore` puts back).

    A matrix with a filter F (D, D; vocabulary.py) is `frozen + master F`: its master starts at
    zero, and gets the gradient times F. Filtering Adam's gradient alone would be undone by its
    division by each element's own size.
    """

    parameters: dict[str, torch.nn.Parameter]
    masters: dict[str, torch.Tensor]
    frozen: Mapping[str, torch.Tensor]
    filters: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        unet: torch.nn.Module,
        names: list[str],
        filters: dict[str, torch.Tensor] | None = None,
    ) -> TrainableSubset:
        import torch

        every = plain_parameters(unet)
        parameters = {n: every[n] for n in names}
        masters = {
            n: torch.zeros_like(p, dtype=torch.float32)
            if n in (filters or {})
            else (p if p.dtype == torch.float32 else p.detach().float().clone())
            for n, p in parameters.items()
        }
        return cls(parameters, masters, ExactCopies(parameters), filters or {})

    def value(self, name: str) -> torch.Tensor:
        """What parameter `name` is now, float32."""
        import torch

        master = self.masters[name]
        if name not in self.filters:
            return master
        return torch.addmm(self.frozen[name].float(), master, self.filters[name])

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None = None,
        max_grad_norm: float | None = None,
        averaged: bool = False,
    ) -> None:
        """Gradients (of the loss times the scaler's scale) to the masters, one optimizer step,
        masters back into the UNet. Where gradients overflowed, an enabled scaler skips the step.

        `max_grad_norm`: of the masters' gradients together, of the loss itself; longer ones are
        shortened to it. `averaged`: the masters have their gradients already, all of them.
        """
        import torch

        scaler = scaler or torch.amp.GradScaler(enabled=False)
        # where no number of all gradients is asked for, nor are they all there
        parted = max_grad_norm is None and not scaler.is_enabled() and not averaged
        for names in self.in_parts() if parted else [list(self.parameters)]:
            if not averaged:
                self.gradients_to_masters(names)
            if max_grad_norm is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(self.masters.values(), max_grad_norm)
            scaler.step(optimizer)  # of those masters that have gradients
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            self.masters_to_parameters(names)

    def in_parts(self) -> list[list[str]]:
        """All names, in parts of about PART_BYTES of float32: Adam knows no tensor but the one it
        moves, so gradients need not all be there in float32 at once."""
        parts: list[list[str]] = [[]]
        there = 0
        for name, parameter in self.parameters.items():
            size = 0 if self.masters[name] is parameter else self.masters[name].nbytes
            if there and there + size > PART_BYTES:
                parts.append([])
                there = 0
            parts[-1].append(name)
            there += size
        return parts

    def gradients_to_masters(self, names: Iterable[str]) -> None:
        """Parameters' gradients, filtered, to those masters that are not parameters themselves."""
        for name in names:
            parameter, master = self.parameters[name], self.masters[name]
            if master is not parameter:
                master.grad = self.master_gradient(name, parameter.grad)
                parameter.grad = None

    def gradients(self) -> list[torch.Tensor]:
        """The masters', float32."""
        return [m.grad for m in self.masters.values() if m.grad is not None]

    def master_gradient(self, name: str, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Float32, and laid out as the master is: torch's fused Adam on the CPU takes that on
        trust."""
        import torch

        if gradient is None:
            return None
        if name in self.filters:
            gradient = gradient.float() @ self.filters[name]
        master = self.masters[name]
        if gradient.dtype == master.dtype and gradient.stride() == master.stride():
            return gradient
        return torch.empty_like(master, requires_grad=False).copy_(gradient)

    def masters_to_parameters(self, names: Iterable[str] | None = None) -> None:
        """What the masters say (of `names`, or all), rounded to the UNet's dtype."""
        import torch

        with torch.no_grad():
            for name in self.parameters if names is None else names:
                parameter = self.parameters[name]
                if self.masters[name] is not parameter:
                    parameter.copy_(self.value(name))

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Within: the UNet holds its starting values (pointers are swapped)."""
        trained = {n: p.data for n, p in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self.frozen[name]
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = trained[name]

    def trained(self) -> dict[str, torch.Tensor]:
        """Copies of the values on the CPU, float32."""
        values = {n: self.value(n).detach() for n in self.parameters}
        return {n: v.to("cpu", copy=True).contiguous() for n, v in values.items()}

    def restore(self) -> None:
        """The starting values, bit for bit."""
        import torch

        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.frozen[name])


@contextmanager
def only_trainable(unet: torch.nn.Module, subset: TrainableSubset) -> Iterator[None]:
    """Within: gradients for the subset alone (a frozen weight's gradient is a third of the
    backward), in eval mode; after: every flag and every gradient as it was."""
    flags = [(p, p.requires_grad, p.grad) for p in unet.parameters()]
    modes = [(m, m.training) for m in unet.modules()]
    try:
        unet.requires_grad_(False).eval()
        for parameter, _, _ in flags:
            parameter.grad = None
        for parameter in subset.parameters.values():
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag, gradient in flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        for module, training in modes:
            module.training = training
