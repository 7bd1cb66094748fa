"""Attacks before and after: what is asked, that the model stays as it is, and the command."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

import esd_fast
from esd_fast.cli import main
from esd_fast.config import EraseConfig
from esd_fast.demo import world
from esd_fast.erasure import Erasure
from esd_fast.evaluation.attacks import Attack, attacks_on
from esd_fast.evaluation.clip import TEMPLATES
from esd_fast.evaluation.inversion import InversionConfig
from esd_fast.evaluation.resistance import Resistance, Target, Witness
from esd_fast.generate import Shot, pictures
from esd_fast.models import load_model

from . import pipelines
from .evaluation.tiny_clip import write_tiny_clip
from .pipelines import assert_same_weights, weights

one_thread = pipelines.one_thread
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SETTINGS = {"num_inference_steps": 2, "guidance_scale": 7.5, "batch_size": 2}
TINY = Resistance(2, 0, SETTINGS, InversionConfig(steps=2, batch_size=1))
ATTACKS = (
    Attack("no attack", ("red apple",)),
    Attack("as negative prompt", ("",), "red apple"),
    Attack("concept inversion", ("a {}",), learned=True),
)
EXAMPLES = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)


class Brightness:
    """Recognises an apple in pictures that are brighter than a grey."""

    told: ClassVar[dict[str, Any]] = {"detector": "brightness", "version": "1", "threshold": 127}

    def knows(self, concept: str) -> bool:
        return concept == "apple"

    def shows(self, pictures: Sequence[np.ndarray], concepts: Sequence[str]) -> np.ndarray:
        assert list(concepts) == ["apple"]
        return np.array([[p.mean() > 127] for p in pictures])


def moved() -> Erasure:
    """Of the golden pipeline, strong enough to be seen."""
    torch.manual_seed(0)
    pipe = pipelines.pipeline()
    tensors = {
        n: p.detach() + torch.randn_like(p) * p.std()
        for n, p in pipe.unet.named_parameters()
        if "attn2.to_v" in n
    }
    return Erasure(tensors, {"concept": "red apple"})


def test_every_attack_before_and_after() -> None:
    pipe = pipelines.pipeline()
    pipe.set_progress_bar_config(disable=True)
    model = load_model(pipe, EraseConfig(concept="x"))
    erasure, before = moved(), weights(pipe)
    target = Target("red apple", ATTACKS, EXAMPLES, Witness(Brightness(), "apple"))
    plain, negative, inversion = TINY.measure(model, erasure, target)
    assert_same_weights(pipe, before)
    for outcome in (plain, negative, inversion):
        assert outcome.before.shape == outcome.after.shape == (2, 64, 64, 3)
        assert (outcome.before != outcome.after).any()
        assert outcome.seen_after == tuple(p.mean() > 127 for p in outcome.after)
    assert [len(o.tokens) for o in (plain, negative, inversion)] == [0, 0, 2]
    was, now = (token.vectors["text_encoder"] for token in inversion.tokens)
    assert not torch.equal(was, now)  # learnt against other weights
    erasure.apply(pipe)  # what "after" has to be: the erased model's own pictures
    shots = [Shot("red apple", 0), Shot("red apple", 1)]
    own = np.stack(list(pictures(pipe, shots, **SETTINGS)))
    assert np.array_equal(plain.after, own)


def test_without_a_recogniser_no_rate_is_claimed() -> None:
    model = load_model(pipelines.pipeline(), EraseConfig(concept="x"))
    target = Target("red apple", ATTACKS[:1], EXAMPLES)
    (outcome,) = TINY.measure(model, moved(), target)
    assert outcome.seen_before is None
    assert outcome.seen_after is None


def test_the_erasure_comes_off_when_it_is_stopped() -> None:
    model = load_model(pipelines.pipeline(), EraseConfig(concept="x"))
    before = weights(model.unet)
    drawn = []

    def stop(*_: object) -> None:
        drawn.append(weights(model.unet))
        if len(drawn) == 2:  # the first picture after
            raise KeyboardInterrupt

    target = Target("red apple", ATTACKS[:1], EXAMPLES)
    with pytest.raises(KeyboardInterrupt):
        TINY.measure(model, moved(), target, stop)
    name = next(iter(moved().tensors))
    assert not torch.equal(drawn[1][name], before[name])
    assert_same_weights(model.unet, before)


def test_negative_prompts_are_diffusers_own() -> None:
    pipe = pipelines.pipeline()
    pipe.set_progress_bar_config(disable=True)
    ours = np.stack(
        list(pictures(pipe, [Shot("", 3), Shot("", 4)], negative_prompt="red apple", **SETTINGS))
    )
    theirs = pipe(
        "",
        negative_prompt="red apple",
        generator=torch.Generator().manual_seed(4),
        num_inference_steps=2,
        guidance_scale=7.5,
        output_type="np",
    ).images[0]
    assert np.abs(ours[1].astype(int) - (theirs * 255).round().astype(int)).max() <= 1


@pytest.mark.parametrize("concept", ["cat", "umbrella", "flat"])
def test_attacks_on_the_embedded_world(concept: str) -> None:
    asked = f"{concept} style" if concept in world.STYLES else concept
    plain, others, negated, negative, inversion = attacks_on(asked, concept)
    assert all(concept in prompt.split() for prompt in plain.prompts)
    assert not set(plain.prompts) & set(others.prompts)
    if concept in world.OBJECTS:
        assert any(world.OBJECTS[concept][1] in prompt for prompt in others.prompts)
    assert (
        f"a picture without {'' if concept == 'flat' else world.article(concept) + ' '}{asked}"
        in (negated.prompts)
    )
    assert negative.negative_prompt == asked
    assert not any(concept in p for a in (negative, inversion) for p in a.prompts)
    assert {p.format(concept) for p in inversion.prompts} >= {plain.prompts[0]}


def test_paraphrases_of_ones_own() -> None:
    attacks = attacks_on("Van Gogh", None, "style", ["a starry night"])
    assert attacks[1].prompts == ("a starry night",)
    assert all("style of {}" in prompt for prompt in attacks[-1].prompts)


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def erased_cat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"iterations": 2, "num_inference_steps": 2}
    return esd_fast.erase(None, "cat", **settings).save(tmp_path_factory.mktemp("erased"))


QUICK = ("--images", 2, "--num-inference-steps", 2, "--max-train-steps", 2, "--train-batch-size", 1)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setattr("esd_fast.commands.attack.keep_pages", lambda: None)
    monkeypatch.setattr("esd_fast.commands.attack.quiet_libraries", lambda: None)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: main(["attack", *map(str, arguments)])


def test_command_on_the_embedded_model(
    run: Any, erased_cat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(erased_cat, *QUICK, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    names = [(row["concept"], row["attack"]) for row in told["attacks"]]
    assert names == [
        *(("cat", a.name) for a in attacks_on("cat", "cat")),
        ("dog", "control: concept inversion"),
    ]
    for row in told["attacks"]:
        for when in ("before", "after"):
            rate = row[when]
            assert rate["images"] == 2
            assert 0 <= rate["low"] <= rate["rate"] == rate["recognised"] / 2 <= rate["high"] <= 1
    folder = tmp_path / "attack-cat"
    assert json.loads((folder / "attack.json").read_text()) == told
    with Image.open(folder / "attack.png") as grid:
        assert grid.width > 300
    tokens = sorted(folder.glob("*.safetensors"))
    assert [t.name for t in tokens] == [
        "cat-concept-inversion-after.safetensors",
        "cat-concept-inversion-before.safetensors",
        *(f for f in sorted(p.name for p in tokens) if f.startswith("dog")),
    ]
    assert load_file(tokens[0])["<concept>"].shape == (192,)


def test_command_on_another_model_with_pictures_of_ones_own(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    erasure = moved().save(tmp_path)
    (tmp_path / "mine").mkdir()
    for i in range(2):
        Image.fromarray(EXAMPLES[i]).resize((40, 20)).save(tmp_path / "mine" / f"{i}.png")
    (tmp_path / "list.txt").write_text("a pippin\nsomething red\n")
    model = pipelines.GOLDEN / "sd-ddim"
    arguments = (erasure, "--model", model, *QUICK, "--train-data-dir", "mine")
    assert run(*arguments, "--paraphrases", "list.txt", "--output", "out") == 0
    assert "no rate is claimed" in capsys.readouterr().out
    told = json.loads((tmp_path / "out" / "attack.json").read_text())
    assert told["recogniser"] is None
    assert {row["before"] for row in told["attacks"]} == {None}
    assert told["attacks"][1]["prompts"] == ["a pippin", "something red"]
    assert len(list((tmp_path / "out" / "after").glob("*.png"))) == 2 * len(told["attacks"])


def test_what_the_judge_does_not_know_is_not_counted(
    run: Any, erased_cat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(erased_cat, *QUICK, "--concept", "a mountain", "--control", "ink style") == 0
    assert "not known to it" in capsys.readouterr().out
    told = json.loads((tmp_path / "attack-a-mountain" / "attack.json").read_text())
    assert told["recogniser"]["detector"] == "the embedded model's judge"
    *mountain, ink = told["attacks"]
    assert {row["before"] for row in mountain} == {None}
    assert ink["before"]["images"] == 2


@torch.no_grad()
def clips_choice(clip: Path, pictures: Sequence[Path], sentences: Sequence[str]) -> list[int]:
    """Which sentence CLIPModel's own logits prefer for each picture."""
    words = CLIPTokenizer.from_pretrained(clip)(sentences, padding=True, return_tensors="pt")
    images = CLIPImageProcessorPil.from_pretrained(clip)(
        [Image.open(p) for p in pictures], return_tensors="pt"
    )
    model = CLIPModel.from_pretrained(clip).eval()
    return model(**words, **images).logits_per_image.argmax(-1).tolist()


def test_clip_counts_on_another_model(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pictures that were counted, written by a run that nobody counts, shown to CLIPModel."""
    erasure = Erasure(moved().tensors, {"concept": "Van Gogh"}).save(tmp_path)
    (tmp_path / "mine").mkdir()
    Image.fromarray(EXAMPLES[0]).save(tmp_path / "mine" / "0.png")
    clip = write_tiny_clip(tmp_path / "clip")
    common = (erasure, "--model", pipelines.GOLDEN / "sd-ddim", *QUICK, "--images", 3)
    common += ("--learnable-property", "style", "--train-data-dir", "mine")
    assert run(*common, "--output", "uncounted") == 0
    capsys.readouterr()
    styles = ["Monet", "Hokusai", "Van Gogh"]
    named = ("--style", styles[0], "--style", styles[1])
    assert run(*common, "--clip", clip, *named, "--output", "counted") == 0
    text = capsys.readouterr().out
    assert f"recognised by CLIP {clip} (clip, transformers" in text
    assert "the most similar of 3 styles" in text

    told = json.loads((tmp_path / "counted" / "attack.json").read_text())
    assert told["recogniser"]["detector"] == f"CLIP {clip}"
    sentences = [TEMPLATES["style"].format(style) for style in styles]
    assert sentences[2] == "a picture in the style of Van Gogh"
    for row in told["attacks"]:
        name = f"Van-Gogh-{row['attack'].replace(' ', '-')}"
        for when in ("before", "after"):
            files = [tmp_path / "uncounted" / when / f"{name}-{i}.png" for i in range(3)]
            expected = clips_choice(clip, files, sentences).count(2)
            assert row[when]["recognised"] == expected, (row["attack"], when)


def test_clip_is_refused_where_it_has_nothing_to_choose_from(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esd_fast.models.load_model", lambda *_: pytest.fail("loaded"))
    erasure = moved().save(tmp_path)
    (tmp_path / "clip").mkdir()
    model = ("--model", pipelines.GOLDEN / "sd-ddim", "--clip", "clip")
    refusal = "--clip has nothing to tell the object 'red apple' from; name other objects"
    assert run(erasure, *model) == 2
    error = capsys.readouterr().err
    assert refusal in error
    assert "--learnable-property" not in error
    assert run(erasure, *model, "--style", "Monet", "--style", "ink") == 2
    error = capsys.readouterr().err
    assert refusal in error
    assert error.endswith("; where it is a style: --learnable-property style\n")
    assert run(erasure, *model, "--object", "pear", "--control", "ink style") == 2
    assert "to tell the style 'ink style' from; name other styles" in capsys.readouterr().err
    assert run(erasure, *model, "--object", "pear") == 1
    assert "clip" in capsys.readouterr().err  # an empty folder is no CLIP, before anything else
    assert not (tmp_path / "attack-red-apple").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--clip", "./no/clip"), "--clip './no/clip' is no folder"),
        (("--object", "dog"), "--object and --style say what --clip tells apart; give --clip too"),
        (("--images", 0), "--images is 0; it must be a whole number from 1"),
        (("--max-train-steps", 0), "--max-train-steps is 0; it must be a whole number from 1"),
        (("--learning-rate", "nan"), "--learning-rate is nan; it must be a finite number"),
        (("--train-batch-size", -1), "--train-batch-size is -1"),
        (("--control", " "), "--control is ' '; it must name something"),
        (("--paraphrases", "gone.txt"), "prompt list 'gone.txt' does not exist"),
        (("--train-data-dir", "."), "--train-data-dir is '.'; it must be a folder with pictures"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(
    run: Any,
    erased_cat: Path,
    arguments: Any,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("esd_fast.models.load_model", lambda *_: pytest.fail("loaded"))
    assert run(erased_cat, *arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_other_bad_input(
    run: Any, erased_cat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("gone.safetensors") == 2
    assert "erasure 'gone.safetensors' does not exist" in capsys.readouterr().err
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "no.png").write_text("no picture")
    assert run(erased_cat, *QUICK, "--train-data-dir", "pictures") == 2
    assert "no.png is no whole picture" in capsys.readouterr().err
    assert run(erased_cat, *QUICK, "--initializer-token", "a cat") == 2
    assert "initializer is 'a cat'; it must be one token" in capsys.readouterr().err
