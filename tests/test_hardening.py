"""Hardening is erasing the concept and, as one more, what textual inversion found."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import esd_fast
from esd_fast.cli import main
from esd_fast.commands import train as command
from esd_fast.commands.console import Bars
from esd_fast.config import EraseConfig
from esd_fast.esd import EraseInterrupted, Progress, run
from esd_fast.evaluation.embedded_judge import EmbeddedJudge
from esd_fast.evaluation.inversion import InversionConfig, invert
from esd_fast.evaluation.placeholder import Placeholder
from esd_fast.hardening import Adversary, harden
from esd_fast.models import load_model

from . import pipelines
from .pipelines import SHORT, assert_same_weights, weights

one_thread = pipelines.one_thread
EXAMPLES = np.random.default_rng(1).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
ADVERSARY = Adversary(EXAMPLES, ("{}", "a picture of {}"))
INVERSION = InversionConfig(steps=2, batch_size=2)
CONFIG = EraseConfig("red apple", **SHORT)


def test_a_round_erases_the_token_that_diffusers_would_load(tmp_path: Path) -> None:
    """By hand: erase, learn a token, give it to a fresh pipeline's tokenizer, erase two texts."""
    model = load_model(pipelines.pipeline(), CONFIG)
    hardened = harden(model, CONFIG, 1, [ADVERSARY], INVERSION)

    other = load_model(pipelines.pipeline(), CONFIG)
    plain = run(other, CONFIG)
    placeholder = Placeholder.beside(other.pipeline, ADVERSARY.templates)
    token = invert(other, EXAMPLES, ADVERSARY.templates, placeholder, INVERSION)
    pipe = pipelines.pipeline()
    pipe.load_textual_inversion(token.save(tmp_path / "token.safetensors", "<found>"))
    texts = ["red apple", "a picture of <found>"]
    settings = SHORT | {"iterations": 2 * SHORT["iterations"]}
    expected = esd_fast.erase(pipe, texts, preset="fast", **settings)

    assert hardened.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert pipelines.relative(hardened.tensors[name], tensor) < 1e-5, name
    moved = [n for n, t in plain.tensors.items() if not torch.equal(t, hardened.tensors[n])]
    assert moved  # the round made a difference
    told = hardened.manifest["hardening"]
    assert told["rounds"] == 1
    assert told["inversion_losses"] == [[pytest.approx(token.losses[-1])]]
    passes = [e.manifest["unet_passes"]["total"] for e in (plain, hardened)]
    assert told["unet_passes"] == sum(passes) + 2 * 2 * 2  # and forward, backward of the inversion
    assert hardened.manifest["extra_concepts"] == 1


def test_several_rounds_gather_tokens_of_every_concept() -> None:
    config = EraseConfig(["red apple", "blue car"], **SHORT)
    model = load_model(pipelines.pipeline(), config)
    seen: list[Progress] = []
    hardened = harden(model, config, 2, [ADVERSARY, ADVERSARY], INVERSION, on_progress=seen.append)
    assert hardened.manifest["extra_concepts"] == 4
    assert len(hardened.manifest["losses"]) == 3 * config.iterations
    assert [len(losses) for losses in hardened.manifest["hardening"]["inversion_losses"]] == [2, 2]
    assert sum(p.phase == "invert" for p in seen) == 2 * 2 * INVERSION.steps


def test_no_rounds_are_a_plain_run() -> None:
    config = dataclasses.replace(CONFIG)
    plain = run(load_model(pipelines.pipeline(), config), config)
    hardened = harden(load_model(pipelines.pipeline(), config), config, 0, [ADVERSARY])
    assert all(torch.equal(t, hardened.tensors[n]) for n, t in plain.tensors.items())


def test_what_was_erased_is_there_when_inversion_is_stopped() -> None:
    model = load_model(pipelines.pipeline(), CONFIG)
    before = weights(model.unet)

    def stop(progress: Progress) -> None:
        if progress.phase == "invert":
            raise KeyboardInterrupt

    with pytest.raises(EraseInterrupted) as stopped:
        harden(model, CONFIG, 1, [ADVERSARY], INVERSION, on_progress=stop)
    assert_same_weights(model.unet, before)
    plain = run(load_model(pipelines.pipeline(), CONFIG), CONFIG)
    kept = stopped.value.erasure
    assert all(torch.equal(t, kept.tensors[n]) for n, t in plain.tensors.items())


def test_the_command_draws_its_adversaries_before(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EraseConfig.from_preset("fast", ["cat", "ink style"], None)
    asked: dict[str, Any] = {}

    def noted(_: Any, __: Any, rounds: int, adversaries: Any, **___: Any) -> None:
        asked.update(rounds=rounds, adversaries=adversaries)

    monkeypatch.setattr("esd_fast.hardening.harden", noted)
    command.erased(load_model(None, config), config, 2, Bars())
    cat, ink = asked["adversaries"]
    assert asked["rounds"] == 2
    assert cat.templates[-1] == "a picture of a {}"
    assert ink.templates[-1] == "a picture in {} style"
    for concept, adversary in (("cat", cat), ("ink", ink)):
        assert adversary.examples.shape == (16, 64, 64, 3)
        assert EmbeddedJudge().shows(adversary.examples, [concept]).sum() >= 14


def test_bad_rounds_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--concept", "cat", "--harden", "-1"]) == 2
    assert "--harden is -1; it must be a whole number from 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
