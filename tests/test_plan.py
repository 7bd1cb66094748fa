"""The draws of a run: numbers, ranges, and from the seed alone."""

import random
from typing import Any

import pytest
import torch

from esd_fast.config import EraseConfig
from esd_fast.plan import noise, paper_rollout, plan_rollouts

SHAPE = (4, 8, 8)
TIMESTEPS = torch.arange(981, 0, -20)  # 50


def plan(preset: str, **settings: Any) -> list[Any]:
    config = EraseConfig.from_preset(preset, "cat", model="any", **settings)
    return plan_rollouts(config, TIMESTEPS[-config.num_inference_steps :], SHAPE)


@pytest.mark.parametrize(
    ("iterations", "batch", "expected"),
    [(200, 1, 4), (201, 1, 5), (1, 1, 1), (50, 3, 3), (17, 3, 2)],
)
def test_fast_draws_no_more_trajectories_than_needed(
    iterations: int, batch: int, expected: int
) -> None:
    rollouts = plan("fast", iterations=iterations, batch_size=batch)
    assert len(rollouts) == expected
    assert all(r.steps == 50 and r.start == 0 and r.query is None for r in rollouts)
    assert all(r.noise.shape == (1, *SHAPE) for r in rollouts)


def test_fast_counts_the_real_list() -> None:
    """PNDM's list is one longer than asked."""
    config = EraseConfig(concept="cat", iterations=102, num_inference_steps=50)
    assert len(plan_rollouts(config, torch.arange(51), SHAPE)) == 2
    assert len(plan_rollouts(config, torch.arange(50), SHAPE)) == 3


@pytest.mark.parametrize("preset", ["reference", "paper", "paper-diffusers"])
def test_reference_recipes_draw_one_rollout_a_step(preset: str) -> None:
    rollouts = plan(preset, iterations=30, batch_size=2)
    assert len(rollouts) == 30
    assert all(r.noise.shape == (2, *SHAPE) for r in rollouts)
    rows = torch.cat([r.noise for r in rollouts]).flatten(1)
    assert len(rows.unique(dim=0)) == 60


def test_reference_range() -> None:
    rollouts = plan("reference", iterations=2000, num_inference_steps=10)
    assert {r.steps for r in rollouts} == set(range(10))
    timesteps = TIMESTEPS[-10:].tolist()
    assert all(r.query == timesteps[r.steps] for r in rollouts)


def test_paper_range() -> None:
    rollouts = plan("paper", iterations=3000, num_inference_steps=10)
    assert {r.steps for r in rollouts} == set(range(1, 10))  # min(9, 10 - i)
    for r in rollouts:
        index = int(r.query) // 100
        assert r.start == 1
        assert r.steps == min(9, 10 - index)
    assert {int(r.query) // 100 for r in rollouts} == set(range(10))
    assert len({r.query for r in rollouts}) > 700  # any timestep, not the list's alone
    assert paper_rollout(0, 19, 50) == {"start": 1, "steps": 49, "query": 19}
    assert paper_rollout(49, 999, 50) == {"start": 1, "steps": 1, "query": 999}


def test_paper_diffusers_range() -> None:
    rollouts = plan("paper-diffusers", iterations=2000, num_inference_steps=10)
    assert {r.steps for r in rollouts} == set(range(1, 9))  # 1 to N - 2
    assert all(r.query == 1000 - 100 * r.steps for r in rollouts)


def test_seed_decides_and_nothing_else() -> None:
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    first = plan("reference", iterations=5, seed=1)
    torch.manual_seed(6)
    random.seed(6)
    second = plan("reference", iterations=5, seed=1)
    other = plan("reference", iterations=5, seed=2)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.noise, b.noise)
        assert (a.steps, a.query) == (b.steps, b.query)
    assert not any(torch.equal(a.noise, b.noise) for a, b in zip(first, other, strict=True))
    torch.manual_seed(5)
    random.seed(5)
    plan("fast", seed=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_noise_is_float32_on_the_cpu_whatever_torchs_defaults() -> None:
    expected = noise(random.Random(0), 2, SHAPE)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            drawn = noise(random.Random(0), 2, SHAPE)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(drawn, expected)
    assert abs(expected.mean()) < 0.2
    assert abs(expected.std() - 1) < 0.1
