"""A whole model in one file, in the original layout: .safetensors, or a pickled .ckpt.

What it is follows from its tensors' names and shapes, before a weight is read. diffusers' own
converters name its tensors, and every component must get all of its tensors in the right shape.
Nothing here asks the network: the families' configurations ship with the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .base import Described, Family
from .checkpoint import Checkpoint, first_line, open_checkpoint
from .families import family_of, family_of_file
from .folder import described_at
from .prediction import declared, has_zero_snr
from .tokenizer import tokenizer_for

if TYPE_CHECKING:
    from esd_fast.config import Loading

CONFIGS = Path(__file__).parent / "configs"
UNET, EMA = "model.diffusion_model.", "model_ema."
VAE = "first_stage_model."
OPEN_CLIP = {
    "text_encoder": "cond_stage_model.model.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
# Noise levels of a model that was trained down to pure noise, as diffusers documents them
ZERO_SNR = {
    "_class_name": "DDIMScheduler",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
UNUSED = ("position_ids",)  # a buffer that is computed


@dataclass(frozen=True)
class SingleFile:
    """A file of which names, shapes and metadata are known."""

    source: str
    family: Family
    described: Described
    loading: Loading
    checkpoint: Checkpoint
    configs: str
    """The folder (or hub id) that its configurations are from."""
    blank: Blank

    def load(self, dtype: torch.dtype) -> Any:
        """The family's pipeline, on the CPU."""
        import diffusers

        self.blank.fill(chosen(self.checkpoint.read(), self.loading.ema), dtype)
        index = diffusers.StableDiffusionPipeline.load_config(self.configs)
        parts = {name: value for name, value in index.items() if isinstance(value, (list, tuple))}
        settings = {n: v for n, v in index.items() if n not in parts and not n.startswith("_")}
        components: dict[str, Any] = dict.fromkeys(parts)  # those that are not there are None
        components |= self.blank.models
        for name in ("tokenizer", "tokenizer_2"):
            if parts.get(name, (None,))[0]:
                components[name] = tokenizer_for(self.configs, name)
        scheduler = dict(self.described.scheduler)
        components["scheduler"] = getattr(diffusers, scheduler["_class_name"]).from_config(
            scheduler
        )
        pipeline_class = getattr(diffusers, self.family.pipeline_class)
        return pipeline_class(**{**settings, **components, **self.family.load_options})


def look_at_file(path: Path, loading: Loading) -> SingleFile:
    """Raises ValueError, with the reason, where the file is damaged, is no model of a known
    family, or does not fit its configurations."""
    if loading.variant is not None:
        raise ValueError(
            f"variant is {loading.variant!r}, which only a model in diffusers' layout has; "
            f"{path} is a single file"
        )
    checkpoint = open_checkpoint(path, loading.allow_pickle)
    family = family_of_file(checkpoint)
    configs = loading.model_config or str(CONFIGS / family.name)
    described = described_at(configs)
    if family_of(described) is not family:
        raise ValueError(
            f"model_config is {configs!r}, which is {family_of(described).title}; "
            f"{path} is {family.title}"
        )
    described = described.changed(
        "scheduler", prediction_type=prediction_type(checkpoint, family, described, loading)
    )
    if has_zero_snr(checkpoint):
        described = described.changed("scheduler", **ZERO_SNR)
    size = family.sample_sizes.get(described.prediction_type or "")
    if loading.model_config is None and size is not None:
        described = described.changed("unet", sample_size=size)
    made = blank(configs, described)
    check_fits(checkpoint, made, loading.ema)
    return SingleFile(str(path), family, described, loading, checkpoint, configs, made)


def prediction_type(
    checkpoint: Checkpoint, family: Family, described: Described, loading: Loading
) -> str | None:
    """What is asked for, what the file says, what the given configuration says, what all of the
    family's published models do; None where these differ."""
    if loading.prediction_type != "auto":
        return loading.prediction_type
    said = declared(checkpoint)
    if said is None and (loading.model_config is not None or len(family.sample_sizes) == 1):
        return described.prediction_type
    return said


def chosen(tensors: Mapping[str, torch.Tensor], ema: str) -> dict[str, torch.Tensor]:
    """The tensors with the UNet that is asked for, under its usual names.

    A training checkpoint holds the UNet twice: as it was trained, and its running average
    (EMA). "auto" and "no" take the first, as diffusers, A1111 and ComfyUI do; "yes" the average.
    Raises ValueError where "yes" is asked of a file that has none, or not all of it.
    """
    kept = {name: t for name, t in tensors.items() if not name.startswith(EMA)}
    if ema == "yes":
        averages = {name: EMA + flat(name) for name in kept if name.startswith(UNET)}
        missing = [name for name, average in averages.items() if average not in tensors]
        if missing:
            there = len(averages) - len(missing)
            raise ValueError(
                f"ema is 'yes'; this file has EMA weights for {there} of the UNet's "
                f"{len(averages)} tensors; 'no' takes its plain weights"
            )
        kept |= {name: tensors[average] for name, average in averages.items()}
    return {usual_name(name): tensor for name, tensor in kept.items()}


def flat(name: str) -> str:
    """A UNet tensor's name among the averages: without `model.` and dots."""
    return name.removeprefix("model.").replace(".", "")


def usual_name(name: str) -> str:
    """Some 1.x files, of an older transformers, lack a level in the text encoder's names."""
    old = "cond_stage_model.transformer."
    rest = name.removeprefix(old)
    if rest != name and rest.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
        return f"{old}text_model.{rest}"
    return name


@dataclass(frozen=True)
class Blank:
    """Components made from configurations, on the meta device: no weight in them yet."""

    models: dict[str, torch.nn.Module]
    configs: dict[str, Any]

    def fill(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Give each component its weights."""
        for name, own in self.converted(tensors):
            model = self.models[name]
            weights = {n: own[n].to(dtype) for n in model.state_dict()}
            model.load_state_dict(weights, strict=True, assign=True)
            model.eval()

    def converted(
        self, tensors: dict[str, torch.Tensor]
    ) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Each component's tensors under its own names, by diffusers' converters."""
        from diffusers.loaders import single_file_utils as converters

        for name, model in self.models.items():
            if name == "unet":
                # the UNet's converter looks for names anywhere in a key: it is given its own
                own = {n: t for n, t in tensors.items() if n.startswith(UNET)}
                made = converters.convert_ldm_unet_checkpoint(own, self.configs[name])
            elif name == "vae":
                own = {n: t for n, t in tensors.items() if n.startswith(VAE)}
                made = converters.convert_ldm_vae_checkpoint(own, self.configs[name])
            else:
                made = converted_text_encoder(name, model, tensors)
            # what a file lacks is None in some of theirs
            yield name, {n: t for n, t in made.items() if t is not None}


def converted_text_encoder(
    name: str, model: Any, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    from diffusers.loaders import single_file_utils as converters

    prefix = OPEN_CLIP[name]
    if any(n.startswith(prefix) for n in tensors):
        made = converters.convert_open_clip_checkpoint(model, tensors, prefix=prefix)
    else:
        made = converters.convert_ldm_clip_checkpoint(tensors)
    # CLIPTextModel lost a level in transformers 5.6; the one with a projection keeps it
    if not hasattr(model, "text_model"):
        made = {n.removeprefix("text_model."): t for n, t in made.items()}
    return made


def blank(configs: str, described: Described) -> Blank:
    """The UNet, the VAE and the text encoders that the folder (or hub id) `configs` describes."""
    import diffusers
    import transformers
    from accelerate import init_empty_weights

    index = diffusers.StableDiffusionPipeline.load_config(configs)
    models: dict[str, Any] = {}
    read: dict[str, Any] = {"unet": dict(described.unet), "vae": dict(described.vae)}
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        library, class_name = index.get(name) or ("", "")
        if not library:
            continue
        with init_empty_weights():
            if library == "diffusers":
                kind = getattr(diffusers, class_name)
                models[name] = kind.from_config(read[name])
            else:
                kind = getattr(transformers, class_name)
                read[name] = kind.config_class.from_pretrained(configs, subfolder=name)
                models[name] = kind(read[name])
    return Blank(models, read)


def check_fits(checkpoint: Checkpoint, parts: Blank, ema: str) -> None:
    """ValueError where a component would not get exactly its tensors; by names and shapes."""
    given = chosen(checkpoint.tensors, ema)
    try:
        converted = list(parts.converted(given))
    except Exception as error:  # noqa: BLE001 -- what converters raise for what a file lacks
        reason = f"no {error.args[0]}" if isinstance(error, KeyError) else first_line(error)
        raise ValueError(
            f"{checkpoint.path} does not fit its configuration: {reason}; --config FOLDER gives "
            "another one"
        ) from None
    for component, tensors in converted:
        wanted = {n: t.shape for n, t in parts.models[component].state_dict().items()}
        missing = [n for n in wanted if n not in tensors]
        surplus = [n for n in tensors if n not in wanted and not n.endswith(UNUSED)]
        if component == "unet":  # its converter passes over names that it does not know
            taken = {id(t) for t in tensors.values()}
            surplus += [n for n, t in given.items() if n.startswith(UNET) and id(t) not in taken]
        bent = [n for n in wanted if n in tensors and tensors[n].shape != wanted[n]]
        if missing or surplus or bent:
            example = (bent or missing or surplus)[0]
            shapes = f": {list(tensors[example].shape)} for {list(wanted[example])}" if bent else ""
            raise ValueError(
                f"{checkpoint.path} does not fit the {component} of its configuration: "
                f"{len(missing)} tensors missing, {len(surplus)} unknown, {len(bent)} of another "
                f"shape ({example[:200]}{shapes}); --config FOLDER gives another one"
            )
