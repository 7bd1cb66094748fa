"""Concept inversion: the loss of textual inversion, on one vector, and nothing else is touched."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from esd_fast.config import EraseConfig
from esd_fast.evaluation.inversion import InversionConfig, LearnedToken, invert
from esd_fast.evaluation.placeholder import Placeholder
from esd_fast.models import Model, load_model

from . import pipelines
from .pipelines import same_bits

one_thread = pipelines.one_thread
TEMPLATES = ("{}", "a picture of {}")
CONFIG = InversionConfig(steps=3, batch_size=2, learning_rate=1e-2, seed=5)


def pictures(count: int = 3, side: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def loaded(name: str = "sd-ddim") -> Model:
    return load_model(pipelines.pipeline(name), EraseConfig(concept="x"))


def learned(model: Model, **settings: Any) -> tuple[Placeholder, LearnedToken]:
    placeholder = Placeholder.beside(model.pipeline, TEMPLATES)
    return placeholder, invert(model, pictures(), TEMPLATES, placeholder, CONFIG, **settings)


def textual_inversion(pipe: Any, config: InversionConfig) -> tuple[torch.Tensor, list[float]]:
    """diffusers' examples/textual_inversion/textual_inversion.py in a few lines: a new token, the
    whole embedding under AdamW, all other rows put back after each step."""
    tokenizer, encoder, unet, vae = pipe.tokenizer, pipe.text_encoder, pipe.unet, pipe.vae
    mean = encoder.get_input_embeddings().weight.detach().mean(0)
    tokenizer.add_tokens("<v>")
    (token,) = tokenizer("<v>", add_special_tokens=False).input_ids
    encoder.resize_token_embeddings(max(token + 1, encoder.config.vocab_size))
    for part in (unet, vae, encoder):
        part.requires_grad_(False)
    rows = encoder.get_input_embeddings().weight.requires_grad_()
    rows.data[token] = mean
    optimizer = torch.optim.AdamW([rows], lr=config.learning_rate)
    others = torch.arange(len(rows)) != token
    original = rows.detach().clone()
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    pixels = torch.from_numpy(pictures()).permute(0, 3, 1, 2) / 127.5 - 1
    posterior = vae.encode(pixels).latent_dist
    g, losses, size = torch.Generator().manual_seed(config.seed), [], config.batch_size
    for _ in range(config.steps):
        chosen = torch.randint(0, len(pixels), (size,), generator=g)
        sample = torch.randn((size, *posterior.mean.shape[1:]), generator=g)
        latents = (posterior.mean[chosen] + posterior.std[chosen] * sample).detach()
        latents = latents * vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=g)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (size,), generator=g)
        texts = [TEMPLATES[i] for i in torch.randint(0, len(TEMPLATES), (size,), generator=g)]
        ids = tokenizer(
            [t.format("<v>") for t in texts],
            padding="max_length",
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        states = encoder(ids)[0]
        answer = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, states).sample
        if scheduler.config.prediction_type == "epsilon":
            target = noise
        else:
            target = scheduler.get_velocity(latents, noise, timesteps)
        loss = torch.nn.functional.mse_loss(answer.float(), target.float(), reduction="mean")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rows.data[others] = original[others]
        losses.append(loss.item())
    return rows.detach()[token], losses


@pytest.mark.parametrize("name", ["sd-ddim", "sd-v-ddim"])
def test_it_is_diffusers_textual_inversion(name: str) -> None:
    _, ours = learned(loaded(name))
    vector, losses = textual_inversion(pipelines.pipeline(name), CONFIG)
    assert ours.losses == pytest.approx(losses, rel=1e-5)
    assert pipelines.relative(ours.vectors["text_encoder"], vector) < 1e-5
    assert len(set(losses)) == len(losses)  # something was learnt, from other draws each time


def everything(pipe: Any) -> dict[str, Any]:
    """All that an attack might leave behind."""
    parts = {n: p for n, p in pipe.components.items() if isinstance(p, torch.nn.Module)}
    tensors = {f"{n}.{k}": v for n, p in parts.items() for k, v in p.state_dict().items()}
    embeddings = [p.get_input_embeddings() for n, p in parts.items() if n.startswith("text_enc")]
    return {
        "tensors": {k: v.clone() for k, v in tensors.items()},
        "flags": [
            (n, p.requires_grad, p.grad) for m in parts.values() for n, p in m.named_parameters()
        ],
        "modes": [x.training for m in parts.values() for x in m.modules()],
        # of the encoders' other modules transformers has some of its own
        "hooks": [len(e._forward_hooks) for e in embeddings],
        "vocabulary": pipe.tokenizer.get_vocab(),
        "configs": [dict(getattr(p, "config", {}).items()) for p in (pipe.unet, pipe.scheduler)],
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "python": random.getstate(),
        "torch": torch.get_rng_state().tolist(),
    }


def assert_untouched(pipe: Any, before: dict[str, Any]) -> None:
    now = everything(pipe)
    was, tensors = before["tensors"], now.pop("tensors")
    assert tensors.keys() == was.keys()
    floats = [n for n, t in tensors.items() if t.is_floating_point()]
    assert not [n for n in floats if not same_bits(tensors[n], was[n])]
    assert not [k for k in now if now[k] != before[k]]


@pytest.mark.parametrize("name", ["sd-ddim", "sdxl-ddim"])
def test_nothing_but_the_token_is_touched(name: str) -> None:
    model = loaded(name)
    model.pipeline.text_encoder.train()  # a caller's own choice
    model.pipeline.unet.conv_in.weight.requires_grad_(False)
    before = everything(model.pipeline)
    _, token = learned(model)
    assert_untouched(model.pipeline, before)
    assert len(token.vectors) == (2 if name == "sdxl-ddim" else 1)
    for encoder, vector in token.vectors.items():
        weight = getattr(model.pipeline, encoder).get_input_embeddings().weight
        assert (vector - weight.detach().float().mean(0)).abs().max() > 1e-4  # where it started


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_touched_when_it_is_stopped(error: type[BaseException]) -> None:
    model = loaded()
    before = everything(model.pipeline)

    def stop(step: int, _: float) -> None:
        if step == 1:
            raise error

    with pytest.raises(error):
        learned(model, on_step=stop)
    assert_untouched(model.pipeline, before)


def test_gradients_reach_the_placeholder_alone() -> None:
    """A vector moves the prompts that hold the word, and no others."""
    model = loaded()
    placeholder = Placeholder.beside(model.pipeline, TEMPLATES)
    vector = torch.zeros(model.pipeline.text_encoder.config.hidden_size, requires_grad=True)

    def states(prompt: str) -> torch.Tensor:
        encode = model.family.encode_with_gradient
        return encode(model.pipeline, prompt, 64).encoder_hidden_states

    plain = states("a red apple")
    with placeholder.meaning(model.pipeline, {"text_encoder": vector}):
        assert torch.equal(states("a red apple"), plain)
        (of_others,) = torch.autograd.grad(states("a red apple").sum(), vector, allow_unused=True)
        (of_word,) = torch.autograd.grad(states(f"a {placeholder.word}").square().sum(), vector)
    assert of_others is None or not of_others.any()
    assert of_word.any()


def test_diffusers_loads_the_token_and_asks_the_same(tmp_path: Path) -> None:
    model = loaded()
    placeholder, token = learned(model)
    file = token.save(tmp_path / "token.safetensors", "<thing>")
    with placeholder.meaning(model.pipeline, token.vectors), torch.no_grad():
        ours = model.pipeline.encode_prompt(
            f"a picture of {placeholder.word}", "cpu", 1, do_classifier_free_guidance=False
        )[0]
    theirs = pipelines.pipeline()
    theirs.load_textual_inversion(file)
    with torch.no_grad():
        states = theirs.encode_prompt("a picture of <thing>", "cpu", 1, False)[0]
    assert pipelines.relative(ours, states) < 1e-6


def test_diffusers_loads_both_tokens_of_sdxl(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = loaded("sdxl-ddim")
    placeholder, token = learned(model)
    tensors = load_file(token.save(tmp_path / "token.safetensors"))
    with placeholder.meaning(model.pipeline, token.vectors), torch.no_grad():
        ours = model.pipeline.encode_prompt(
            f"a {placeholder.word}", device="cpu", do_classifier_free_guidance=False
        )[0]
    theirs = pipelines.pipeline("sdxl-ddim")
    for key, number in (("clip_l", ""), ("clip_g", "_2")):
        theirs.load_textual_inversion(
            tensors[key],
            token="<thing>",
            text_encoder=getattr(theirs, f"text_encoder{number}"),
            tokenizer=getattr(theirs, f"tokenizer{number}"),
        )
    with torch.no_grad():
        states = theirs.encode_prompt("a <thing>", device="cpu", do_classifier_free_guidance=False)[
            0
        ]
    assert pipelines.relative(ours, states) < 1e-6


def test_a_token_starts_from_a_word() -> None:
    model = loaded()
    config = InversionConfig(steps=1, batch_size=1, learning_rate=1e-12, initializer="apple")
    placeholder = Placeholder.beside(model.pipeline, TEMPLATES)
    token = invert(model, pictures(), TEMPLATES, placeholder, config)
    (number,) = model.pipeline.tokenizer("apple", add_special_tokens=False).input_ids
    row = model.pipeline.text_encoder.get_input_embeddings().weight[number]
    assert pipelines.relative(token.vectors["text_encoder"], row) < 1e-5


def test_the_placeholder_is_one_token_that_no_prompt_holds() -> None:
    pipe = pipelines.pipeline()
    first = Placeholder.beside(pipe, ("a {}",))
    second = Placeholder.beside(pipe, ("a {}", f"beside {first.word}"))
    assert first.word != second.word
    for chosen in (first, second):
        ids = pipe.tokenizer(f"a {chosen.word} there").input_ids
        assert ids.count(chosen.ids["text_encoder"]) == 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: InversionConfig(steps=0),
            "inversion steps is 0; it must be a whole number from 1",
        ),
        (lambda: InversionConfig(batch_size=-1), "inversion batch size is -1"),
        (lambda: InversionConfig(learning_rate=0.0), "inversion learning rate is 0.0"),
    ],
)
def test_bad_settings(make: Callable[[], InversionConfig], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_bad_input_is_refused_before_a_step() -> None:
    model = loaded()
    placeholder = Placeholder.beside(model.pipeline, TEMPLATES)
    with pytest.raises(ValueError, match="pictures is 'empty'; it must be one picture or more"):
        invert(model, pictures(0), TEMPLATES, placeholder)
    several = InversionConfig(steps=1, initializer="two words of it")
    with pytest.raises(ValueError, match="initializer is 'two words of it'; it must be one token"):
        invert(model, pictures(), TEMPLATES, placeholder, several)
    for parameter in model.pipeline.unet.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="the loss is nan at step 0"):
        invert(model, pictures(), TEMPLATES, placeholder)
