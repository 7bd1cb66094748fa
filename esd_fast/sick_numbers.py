"""Where a number that is none came from: which layer was the first to say or to learn one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .collect import predict_noise

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from .collect import TeacherSamples
    from .fit import Fitter


def where_it_began(fitter: Fitter, samples: TeacherSamples, student: torch.Tensor) -> str:
    """After a loss that is no number: the first place that holds one, in words. `student`: the
    UNet's predictions (B, C, h, w). Asks the UNet once more."""
    learnt = last_in_forward(fitter, samples, broken(fitter.subset.masters))
    if learnt:
        return (
            f"{learnt} went first, whose gradient was not finite at iteration "
            f"{len(fitter.losses) - 1}, timestep {fitter.answered}"
        )
    said = broken(vars(samples))
    layer = first_to_say(fitter, samples)
    if said:
        return f"the {said[0]} of the frozen UNet went first{of_layer(layer)}"
    if layer:
        return f"{layer} went first"
    if student.isfinite().all():
        return "the UNet's predictions are finite, but too far from the target"
    return "the UNet's predictions, though not when asked a second time"


def check_collected(fitter: Fitter | None, samples: TeacherSamples) -> None:
    """Raises NonFiniteLoss where the frozen UNet's predictions, sorted by trajectory and time,
    are no numbers; with a fitter it says the layer too."""
    from .fit import NonFiniteLoss

    names = broken(vars(samples))
    if not names:
        return
    columns = [getattr(samples, name).flatten(1).isfinite().all(1) for name in names]
    finite = torch.stack(columns).all(0)  # (N,)
    first = samples[[int(finite.long().argmin())]]
    layer = first_to_say(fitter, first) if fitter else ""
    raise NonFiniteLoss(
        f"collecting: the {broken(vars(first))[0]} of the frozen UNet is not finite at timestep "
        f"{first.timesteps.tolist()}{of_layer(layer)}; {len(finite) - int(finite.sum())} of "
        f"{len(finite)} samples are so; try dtype float32, or look at the model (esd-fast verify)"
    )


def of_layer(layer: str) -> str:
    return f", of its layers {layer}" if layer else ""


def broken(tensors: Mapping[str, Any]) -> list[str]:
    """The names of those that hold a number that is none."""
    floats = {
        name: tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    }
    return [name for name, tensor in floats.items() if not tensor.isfinite().all()]


def last_in_forward(fitter: Fitter, samples: TeacherSamples, names: Sequence[str]) -> str:
    """Of the parameters `names` the one that a backward reaches first, whose gradient spreads to
    the others; empty for none."""
    if not names:
        return ""
    done: dict[str, int] = {}
    ask(fitter, samples, lambda layer, _: done.setdefault(layer, len(done)))
    return max(names, key=lambda name: done.get(name.rpartition(".")[0], -1))


def first_to_say(fitter: Fitter, samples: TeacherSamples) -> str:
    """The first module of a forward whose output is not finite; empty where all are."""
    found: list[str] = []

    def look(layer: str, output: Any) -> None:
        said = output if isinstance(output, (tuple, list)) else [output]
        if not found and broken({str(i): value for i, value in enumerate(said)}):
            found.append(layer)

    ask(fitter, samples, look)
    return found[0] if found else ""


@torch.no_grad()
def ask(fitter: Fitter, samples: TeacherSamples, look: Callable[[str, Any], object]) -> None:
    """A forward that shows `look` every module's output, named as without adapters, when it is
    done with it."""

    def hooked(name: str, module: torch.nn.Module) -> RemovableHandle:
        layer = name.removesuffix(".base_layer")  # peft's word for the wrapped one

        def hook(_: Any, __: Any, output: Any) -> None:  # what it returned would be the output
            look(layer, output)

        return module.register_forward_hook(hook)

    hooks = [hooked(name, module) for name, module in fitter.unet.named_modules() if name]
    try:
        # a rollout hands on its bad numbers as latents: with them the very first layer would be named
        latents = samples.latents.nan_to_num(0.0, 0.0, 0.0)
        predict_noise(fitter.unet, latents, samples.timesteps, fitter.question(samples))
    finally:
        for hook in hooks:
            hook.remove()
