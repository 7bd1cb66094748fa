"""A caller's pipeline: what it may have switched on, and what has to be switched off by him first."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

TRAINABLE_DTYPES = ("float32", "bfloat16", "float16")


def check_workable(pipeline: Any) -> None:
    """Raises ValueError, with what would do, for a UNet whose weights are not there to be trained,
    or whose forward does not use them."""
    unet = plain_module(pipeline.unet)
    check_held(dict(unet.named_parameters()))
    hooks = hook_names(unet)
    for hook, call in (
        ("group_offloading", "load the pipeline without group offloading"),
        ("layerwise_casting", "load it without enable_layerwise_casting()"),
    ):
        if any(name.startswith(hook) for name in hooks):
            raise ValueError(f"the pipeline's UNet has {hook}; {call}")
    odd = {str(p.dtype).removeprefix("torch.") for p in unet.parameters()} - {*TRAINABLE_DTYPES}
    if odd:
        raise ValueError(
            f"the pipeline's UNet holds {', '.join(sorted(odd))} weights (quantized?); "
            f"load it in {', '.join(TRAINABLE_DTYPES)}"
        )
    if any(getattr(module, "fused_projections", False) for module in unet.modules()):
        raise ValueError(
            "the pipeline's UNet has fused projections, copies that would not be trained; call "
            "pipe.unfuse_qkv_projections() first"
        )
    if getattr(unet, "encoder_hid_proj", None) is not None:
        raise ValueError(
            "the pipeline has an IP-Adapter, which asks for pictures; call "
            "pipe.unload_ip_adapter() first"
        )


def check_held(parameters: Mapping[str, Any]) -> None:
    """Raises ValueError where weights are elsewhere: writing to them would change nothing."""
    if any(p.is_meta for p in parameters.values()):
        raise ValueError(
            "the UNet's weights are not in it (enable_sequential_cpu_offload, or an empty model); "
            "call pipe.remove_all_hooks() first, or use enable_model_cpu_offload()"
        )


def plain_module(module: Any) -> Any:
    """The module that torch.compile has wrapped."""
    return getattr(module, "_orig_mod", module)


def hook_names(unet: Any) -> set[str]:
    """Of diffusers' own hooks on the UNet and in it."""
    registries = [getattr(m, "_diffusers_hook", None) for m in unet.modules()]
    return {name for registry in registries if registry is not None for name in registry.hooks}


# UNets that a run works on. A set beside them: a mark on a UNet would go into its copies.
_WORKED_ON: weakref.WeakSet[Any] = weakref.WeakSet()
_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def alone(pipeline: Any) -> Iterator[None]:
    """Within: no other run works on this pipeline's UNet. Raises RuntimeError where one does."""
    unet = plain_module(pipeline.unet)
    with _ONE_AT_A_TIME:
        check_idle(unet)
        _WORKED_ON.add(unet)
    try:
        yield
    finally:
        with _ONE_AT_A_TIME:
            _WORKED_ON.discard(unet)


def check_idle(unet: Any) -> None:
    """Raises RuntimeError where a run works on `unet`: what is written to it meanwhile is lost."""
    if unet in _WORKED_ON:
        raise RuntimeError(
            "an erasure is being trained on this pipeline's UNet; wait for it, or give each thread "
            "a pipeline of its own (copy.deepcopy makes one)"
        )


@contextmanager
def onloaded(pipeline: Any) -> Iterator[None]:
    """Within: a pipeline under enable_model_cpu_offload has its UNet on the device that it runs
    on, without hooks; after: offloading as before."""
    unet = plain_module(pipeline.unet)
    hook = getattr(unet, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is None or not getattr(pipeline, "_all_hooks", None):
        yield
        return
    pipeline.remove_all_hooks()
    try:
        unet.to(device)
        yield
    finally:
        pipeline.enable_model_cpu_offload(device=device)


def onloading(function: Callable[..., Any]) -> Callable[..., Any]:
    """For functions of a Model: they run within `onloaded`, and alone."""

    @functools.wraps(function)
    def wrapper(model: Any, *arguments: Any, **settings: Any) -> Any:
        with alone(model.pipeline), onloaded(model.pipeline):
            return function(model, *arguments, **settings)

    return wrapper


def parts_to_place(pipeline: Any) -> dict[str, Any]:
    """What drawing needs on the UNet's device besides the UNet."""
    names = [n for n in pipeline.components if n == "vae" or n.startswith("text_encoder")]
    return {n: getattr(pipeline, n) for n in names if getattr(pipeline, n) is not None}
