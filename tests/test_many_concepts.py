"""Several concepts in one run, against the plain loops of tests/truth and against runs of one."""

import collections
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from esd_fast import EraseConfig, ops
from esd_fast.collect import Teacher, TeacherSamples, collect_all, collect_last
from esd_fast.esd import encode_prompts, run
from esd_fast.fit import FitStep, shuffled
from esd_fast.graphed_steps import RunGraphs
from esd_fast.graphs import Twin
from esd_fast.models import Conditioning, load_model
from esd_fast.plan import Rollout, noise, plan_rollouts
from esd_fast.schedules import scheduler_for
from esd_fast.vocabulary import without, words_of

from . import pipelines
from .pipelines import SHAPE, SHORT, Watched, relative, same_bits, watched_run, worst_move
from .test_presets import assert_equal_steps
from .truth.reference_loops import (
    Run,
    every_state,
    frozen_rollout_reference,
    paper_diffusers,
    paper_ldm,
    select_trainable,
)

one_thread = pipelines.one_thread
WORDS = ("red apple", "a fish", "bicycle")
MIXED = ["fruit", None, "a thing"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # numpy 2 in diffusers' schedulers


@pytest.fixture
def by_torch() -> Iterator[None]:
    with ops.forced("torch"):
        yield


def several(preset: str = "fast", **settings: Any) -> EraseConfig:
    chosen: dict[str, Any] = {
        "iterations": 6,
        "batch_size": 2,
        "num_inference_steps": 5,
        "learning_rate": 1e-3,
    }
    return EraseConfig.from_preset(preset, WORDS, "any", **chosen | settings)


# --------------------------------------------------------------------------------- against the plain loops


def common_of(pipe: Any, config: EraseConfig) -> dict[str, Any]:
    return {
        "trainable": select_trainable(pipe.unet, config.train_method),
        "erase_from": config.sources,
        "negative_guidance": config.negative_guidance,
        "guidance_scale": config.guidance_scale,
        "num_inference_steps": config.num_inference_steps,
        "learning_rate": config.learning_rate,
    }


def truth_of(pipe: Any, ours: Watched) -> Run:
    """The plain loop with the draws that the package made."""
    config, rollouts = ours.config, ours.rollouts
    given = common_of(pipe, config) | {"noise": [r.noise for r in rollouts]}
    if config.samples == "all":
        count, size = config.iterations * config.batch_size, config.batch_size
        order = shuffled(len(rollouts) * len(ours.timesteps), config.seed)[:count].tolist()
        batches = [order[first : first + size] for first in range(0, count, size)]
        which = [k for r in rollouts for k in r.concepts]
        return every_state(pipe, WORDS, which=which, batches=batches, **given)
    given |= {"which": [r.concepts for r in rollouts], "indices": [r.steps for r in rollouts]}
    if config.preset == "reference":
        return frozen_rollout_reference(pipe, WORDS, **given)
    if config.preset == "paper-diffusers":
        return paper_diffusers(pipe, WORDS, **given)
    queries = [int(r.query or 0) for r in rollouts]
    indices = [t // (1000 // config.num_inference_steps) for t in queries]
    return paper_ldm(pipe, WORDS, timesteps=queries, **given | {"indices": indices})


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize(
    ("preset", "erase_from"),
    [
        ("fast", None),
        ("fast", "food"),
        ("fast", MIXED),
        ("reference", None),
        ("reference", MIXED),
        ("paper", None),
        ("paper", ["fruit", "animal", "a thing"]),
        ("paper-diffusers", None),
    ],
)
def test_the_plain_loop_over_words(preset: str, erase_from: Any) -> None:
    config = several(preset, erase_from=erase_from, seed=1)
    ours = watched_run(pipelines.pipeline(), config)
    truth = truth_of(pipelines.pipeline(), ours)
    assert len({k for r in ours.rollouts for k in r.concepts}) > 1
    assert_equal_steps(ours, truth)
    assert worst_move(ours.start, ours.erasure.tensors, truth.final) <= 1e-3
    assert ours.erasure.manifest["concepts"] == list(WORDS)


def test_a_list_of_one_is_the_one() -> None:
    one = watched_run(pipelines.pipeline(), EraseConfig("red apple", **SHORT))
    listed = watched_run(pipelines.pipeline(), EraseConfig(["red apple"], **SHORT))
    assert listed.config == one.config
    assert all(step.samples.concepts is None for step in listed.steps)
    assert all(same_bits(listed.erasure.tensors[n], t) for n, t in one.erasure.tensors.items())


# ------------------------------------------------------------------------------------------- collecting


def teacher(config: EraseConfig, by: str = "table", name: str = "sd-ddim") -> Teacher:
    model = load_model(pipelines.pipeline(name), config)
    prompts = encode_prompts(model, config, 64)
    made = Teacher(
        unet=model.unet,
        scheduler=scheduler_for(model.pipeline.scheduler, config),
        prompts=prompts,
        rolled="concept",
        asked=tuple(prompts.by_name),
        num_inference_steps=5,
        guidance_scale=3.0,
    )
    if by == "scheduler":
        made.tables[0] = "so the test wants it"
    return made


@pytest.mark.parametrize(
    ("name", "by", "last"),
    [
        ("sd-ddim", "table", False),
        ("sd-ddim", "table", True),
        ("sd-ddim", "scheduler", False),
        ("sdxl-ddim", "table", False),  # pooled embeddings of each row's own
    ],
)
def test_a_mixed_batch_is_what_each_concept_gives_alone(name: str, by: str, last: bool) -> None:
    which = (2, 0, 1, 0)
    drawn = noise(random.Random(0), 4, SHAPE)
    query = 1.0 if last else None
    collect = collect_last if last else collect_all
    together = collect(
        teacher(several(), by, name), Rollout(drawn, 5, query, concepts=which), lambda _: None
    )
    alone = [
        collect(
            teacher(EraseConfig(WORDS[k]), by, name),
            Rollout(drawn[i : i + 1], 5, query),
            lambda _: 0,
        )
        for i, k in enumerate(which)
    ]
    assert together.concepts is not None
    assert together.concepts.tolist() == [
        k for k, a in zip(which, alone, strict=True) for _ in a.latents
    ]
    assert all(a.concepts is None for a in alone)
    assert together.timesteps.tolist() == [t for a in alone for t in a.timesteps.tolist()]
    truth = TeacherSamples.join(alone)
    for column in ("latents", "noise_pred_null", "noise_pred_concept"):
        assert relative(getattr(together, column), getattr(truth, column)) <= 1e-5


def test_trajectories_are_dealt_evenly_and_words_drawn() -> None:
    timesteps = torch.arange(5)

    def counted(config: EraseConfig, **more: Any) -> list[int]:
        rollouts = plan_rollouts(config, timesteps, SHAPE, **more)
        found = collections.Counter(k for r in rollouts for k in r.concepts)
        return [found[k] for k in sorted(found)]

    # 12 samples take 3 trajectories of 5 states; 32 take 7, which does not go into 3
    assert counted(several()) == [1, 1, 1]
    assert counted(several(iterations=16)) == [3, 3, 3]
    assert counted(several(iterations=1)) == [1, 1, 1]
    assert counted(several(), concepts=5) == [1] * 5
    assert counted(several("reference", iterations=6, batch_size=1)) == [2, 2, 2]
    assert counted(several("reference", iterations=3, batch_size=2)) == [2, 2, 2]
    drawn = counted(several("paper", iterations=300, batch_size=1))
    assert sum(drawn) == 300
    assert len(set(drawn)) > 1
    assert all(70 < n < 130 for n in drawn)  # 100 each, give or take 3.7 standard deviations
    one = plan_rollouts(several("paper"), timesteps, SHAPE)
    assert all(len(set(r.concepts)) == 1 and len(r.concepts) == 2 for r in one)
    assert one[0].concepts == plan_rollouts(several("paper"), timesteps, SHAPE)[0].concepts


# --------------------------------------------------------------------------------------- graphs and fit


@pytest.mark.parametrize("preset", ["fast", "reference", "paper"])
def test_replayed_and_eager_runs_agree_in_every_bit(preset: str) -> None:
    """Buffers of the prompts change from batch to batch: a stale one would show."""
    # of 6 trajectories two at a time: concepts (0, 1), (2, 0), (1, 2)
    config = several(preset, iterations=12, concept_weights=[1.0, 0.5, 2.0], collect_batch_size=2)
    found = []
    for graphs in (RunGraphs(Twin(), Twin()), None):
        steps: list[FitStep] = []
        model = load_model(pipelines.pipeline(), config)
        found.append((run(model, config, graphs=graphs, on_step=steps.append), steps))
    (ours, steps), (own, own_steps) = found
    path = ours.manifest["paths_taken"]["cuda_graphs"]
    assert path.startswith("collect: yes (1 captured, ")  # whatever the concepts of a batch
    assert path.endswith("fit: yes (1 captured, 12 steps replayed)")
    assert all(same_bits(ours.tensors[n], t) for n, t in own.tensors.items())
    for a, b in zip(steps, own_steps, strict=True):
        for name, value in vars(b.samples).items():
            assert value is None or torch.equal(getattr(a.samples, name), value), name


def test_weights_are_those_of_the_loss() -> None:
    weights = (0.25, 1.0, 4.0)
    ours = watched_run(pipelines.pipeline(), several(concept_weights=weights))
    for step in ours.steps:
        s = step.samples
        assert s.concepts is not None
        target = s.noise_pred_concept - 2.0 * (s.noise_pred_concept - s.noise_pred_null)
        each = (step.noise_pred_student - target).square().flatten(1).mean(1)
        told = torch.tensor([weights[k] for k in s.concepts.tolist()])
        assert step.loss == pytest.approx((told * each).mean().item(), rel=1e-5)


@pytest.mark.parametrize("method", ["esd-x", "selfattn"])
def test_kept_projections_are_never_another_concepts(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import nullcontext

    from esd_fast import engine

    config = several(train_method=method, batch_size=1, collect_batch_size=2)
    ours = watched_run(pipelines.pipeline(), config).erasure
    told = ours.manifest["paths_taken"]["prompt_projections"]
    assert told.endswith("fit: anew, as batches mix concepts")
    monkeypatch.setattr(engine, "kept_projections", lambda _: nullcontext(0))
    truth = watched_run(pipelines.pipeline(), config).erasure
    assert all(same_bits(ours.tensors[n], t) for n, t in truth.tensors.items())


# ------------------------------------------------------------------------- conditionings that are no texts


def test_extra_conditionings_are_erased_like_texts() -> None:
    """The same three concepts, one of them given as what the text encoder makes of it."""
    named = several(iterations=6)
    texts = watched_run(pipelines.pipeline(), named)
    two = EraseConfig.from_preset(
        "fast", WORDS[:2], "any", iterations=6, batch_size=2, num_inference_steps=5,
        learning_rate=1e-3,
    )  # fmt: skip
    model = load_model(pipelines.pipeline(), two)
    third = model.family.encode(model.pipeline, WORDS[2], 64)
    ours = run(model, two, extra=[third])
    assert all(same_bits(ours.tensors[n], t) for n, t in texts.erasure.tensors.items())
    assert ours.manifest["extra_concepts"] == 1
    assert ours.manifest["concepts"] == list(WORDS[:2])


def test_extra_conditionings_take_the_source_of_all() -> None:
    model = load_model(pipelines.pipeline(), EraseConfig("cat"))
    extra = [model.family.encode(model.pipeline, "dog", 64)]
    config = EraseConfig(WORDS, erase_from="thing", **SHORT)
    prompts = encode_prompts(model, config, 64, extra)
    source = model.family.encode(model.pipeline, "thing", 64).encoder_hidden_states
    states = prompts["erase_from"].encoder_hidden_states
    assert torch.equal(states, source.expand(4, -1, -1))
    with pytest.raises(ValueError, match="with extra it must be one for all"):
        encode_prompts(model, EraseConfig(WORDS, erase_from=MIXED), 64, extra)


def test_rows_of_conditionings() -> None:
    rows = Conditioning(torch.arange(6.0).view(3, 1, 2), {"t": torch.arange(3.0).view(3, 1)})
    picked = rows.rows(torch.tensor([2, 0]))
    assert picked.encoder_hidden_states[:, 0, 0].tolist() == [4, 0]
    assert picked.added_cond_kwargs is not None
    assert picked.added_cond_kwargs["t"].flatten().tolist() == [2, 0]
    places = (picked.encoder_hidden_states.data_ptr(), picked.added_cond_kwargs["t"].data_ptr())
    picked.fill(rows.rows(torch.tensor([1, 1])))
    assert picked.encoder_hidden_states[:, 0, 0].tolist() == [2, 2]
    assert picked.added_cond_kwargs["t"].flatten().tolist() == [1, 1]
    assert places == (
        picked.encoder_hidden_states.data_ptr(),
        picked.added_cond_kwargs["t"].data_ptr(),
    )
    with pytest.raises(IndexError):
        rows.row(3)


# ------------------------------------------------------------------------------------------ kept words


def test_words_held_to_leave_out_all_that_are_erased() -> None:
    words = ["apple", "bicycle", "cat", "fish", "red"]
    assert without(words, ["Red apple", "a fish"]) == ["bicycle", "cat"]
    assert without(words, ["red apple"]) == words  # one alone weighs next to nothing
    pipe = pipelines.pipeline()
    own = words_of(pipe.tokenizer)
    erased = own[:3]
    config = EraseConfig(erased, keep_vocabulary=1.0, **SHORT)
    manifest = watched_run(pipe, config).erasure.manifest
    assert manifest["kept_vocabulary"]["words"] == len(own) - 3
