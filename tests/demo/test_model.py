"""The embedded model as diffusers itself loads it, and what its judges say of its pictures."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from esd_fast.config import EraseConfig
from esd_fast.demo import BY_METHOD, RECIPE, is_embedded, model_path, world
from esd_fast.demo.judge import JUDGES, load_judge
from esd_fast.evaluation.recognition import answer, erased_questions


@pytest.fixture(scope="module")
def pipeline():
    loaded = StableDiffusionPipeline.from_pretrained(model_path(), dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_is_a_whole_pipeline_small_enough_to_ship(pipeline):
    assert isinstance(pipeline.tokenizer, CLIPTokenizer)
    assert isinstance(pipeline.text_encoder, CLIPTextModel)
    assert isinstance(pipeline.vae, AutoencoderKL)
    names = [n for n, _ in pipeline.unet.named_modules()]
    for kind in ("attn1", "attn2"):
        levels = {
            n.split(".")[1] for n in names if n.startswith("down_blocks") and n.endswith(kind)
        }
        assert len(levels) >= 2
    size = sum(f.stat().st_size for f in model_path().rglob("*") if f.is_file())
    assert size <= 24 * 2**20
    assert (model_path() / "CREDITS.md").read_text().count("MIT") >= 2


def test_every_word_of_the_world_is_one_token(pipeline):
    for word in world.vocabulary():
        assert len(pipeline.tokenizer(word).input_ids) == 3, word  # start, word, end
    strange = pipeline.tokenizer("Zürich, AC/DC").input_ids
    assert pipeline.tokenizer.decode(strange[1:-1]).replace(" ", "") == "zürich,ac/dc"


def test_latents_are_normalised(pipeline):
    """Each channel has mean 0 and deviation 1 on pictures, so scaling_factor is 1."""
    from esd_fast.generate import Shot, pictures

    shots = [Shot(f"a {o}", i) for i, o in enumerate(list(world.OBJECTS)[::4])]
    drawn = np.stack(list(pictures(pipeline, shots, num_inference_steps=10)))
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = pipeline.vae.encode(images).latent_dist.mean
    assert pipeline.vae.config.scaling_factor == 1.0
    assert latents.mean((0, 2, 3)).abs().max() < 0.35
    assert latents.std((0, 2, 3)).min() > 0.7
    assert latents.std((0, 2, 3)).max() < 1.3


@pytest.mark.slow
def test_judges_recognise_what_is_asked_for(pipeline):
    """A small sample of what `python -m esd_fast.demo.build` accepts on 1,024 pictures."""
    asked = [q for o in list(world.OBJECTS)[::4] for q in erased_questions(o, 3)]
    asked += [q for s in world.STYLES for q in erased_questions(s, 6)]
    answers = answer(pipeline, asked, tuple(JUDGES), num_inference_steps=20)
    for judge in JUDGES:
        assert answers.rate(judge, lambda c: c in world.OBJECTS) >= 0.85
        assert answers.rate(judge, lambda c: c in world.STYLES) >= 0.8


def test_judges_are_built_differently():
    first, second = (load_judge(model_path(), name) for name in JUDGES)
    assert type(first) is not type(second)
    assert len(list(first.children())) != len(list(second.children()))
    assert not {n for n, _ in first.body.named_parameters()} & {
        n for n, _ in second.named_parameters()
    }


def test_a_live_embedded_pipeline_is_known_as_such(pipeline):
    assert is_embedded(pipeline)
    config = EraseConfig.from_preset("fast", "cat", pipeline)
    assert {name: getattr(config, name) for name in RECIPE} == RECIPE
    assert EraseConfig.from_preset("fast", "cat", "some/model").learning_rate == 5e-5


@pytest.mark.parametrize(
    ("asked", "rate"),
    [
        ({}, RECIPE["learning_rate"]),
        ({"train_method": "esd-x-strict"}, RECIPE["learning_rate"]),
        ({"train_method": "xattn"}, BY_METHOD["esd-x"]["learning_rate"]),  # an alias
        ({"train_method": "esd-u"}, BY_METHOD["esd-u"]["learning_rate"]),
        ({"train_method": "esd-u", "learning_rate": 7e-5}, 7e-5),
    ],
)
def test_a_train_method_brings_its_own_recipe(asked, rate):
    assert EraseConfig.from_preset("fast", "cat", **asked).learning_rate == rate


def test_shipped_files_tell_no_builder_paths():
    for file in model_path().rglob("*.json"):
        assert "_name_or_path" not in file.read_text(), file
