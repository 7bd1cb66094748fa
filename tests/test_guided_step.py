"""ops.guided_step on the CPU; tests/kernels runs this file again through Triton's interpreter."""

import os

import pytest
import torch

from esd_fast import ops

guided_step = ops.guided_step
SHAPE = (3, 2, 4, 5, 6)


# --- results -----------------------------------------------------------------------------------------


def test_matches_float64(some_step):
    some_step.check(guided_step)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("index", [0, 6, 7, 10])  # the first and the last; 8 rows are read at once
def test_every_call(index, keep, step_case):
    step_case(SHAPE, index=index, keep=keep).check(guided_step)


def test_two_runs_agree_in_every_bit(step_case):
    first, second = (step_case(SHAPE).arguments() for _ in range(2))
    guided_step(**first)
    guided_step(**second)
    for name in ("history", "inputs", "seen", "said"):
        assert torch.equal(first[name], second[name])


def test_a_number_that_is_a_view(step_case):
    plain, viewed = (step_case(SHAPE).arguments() for _ in range(2))
    viewed["index"] = torch.arange(11)[8]
    viewed["predictions"] = plain["predictions"].movedim(2, -1).contiguous().movedim(-1, 2)
    viewed["table"] = torch.stack((plain["table"],) * 2, -1)[..., 0]
    guided_step(**plain)
    guided_step(**viewed)
    for name in ("history", "inputs", "seen", "said"):
        assert torch.equal(plain[name], viewed[name])


@pytest.mark.parametrize("index", [-1, 11])
def test_a_call_too_many_writes_nothing(index, step_case):
    before, given = (step_case(SHAPE, index=index).arguments() for _ in range(2))
    if os.environ.get("ESD_OPS") == "triton":
        guided_step(**given)  # on a GPU nobody waits to hear of it
    else:
        with pytest.raises(IndexError):
            guided_step(**given)
    if ops.path_of("guided_step").name == "torch":
        return  # has written the history's first row for a call -1
    for name in ("history", "inputs", "seen", "said"):
        assert torch.equal(before[name], given[name])


def test_thread_count_does_not_matter(step_case, assert_any_thread_count):
    if not ops.path_of("guided_step").name.startswith("native"):
        pytest.skip("torch and the interpreter promise nothing here")

    def run():
        given = step_case((2, 3, 4, 61, 67), torch.bfloat16, torch.bfloat16).arguments()
        guided_step(**given)
        return [given[name] for name in ("history", "inputs", "seen", "said")]

    assert_any_thread_count(run)


# --- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("predictions", torch.zeros(3), r"predictions: shape \(3,\): give them as \(prompts"),
        (
            "predictions",
            torch.zeros(SHAPE, dtype=torch.float64),
            "predictions: dtype torch.float64",
        ),
        ("index", torch.tensor([1.0]), "index: dtype torch.float32: use int64"),
        ("index", torch.tensor([1, 2]), r"index: shape \(2,\): use \(1,\)"),
        ("table", torch.zeros(11, 11), r"table: shape \(11, 11\).*a row for each of history, 12"),
        ("table", torch.zeros(14, 13), r"table: shape \(14, 13\).*no fewer columns than rows"),
        ("input_scales", torch.ones(13), r"input_scales: shape \(13,\): use \(14,\)"),
        ("rolled", 0, "rolled: 0: use the number of a prompt, 1 to 2"),
        ("rolled", 3, "rolled: 3: use"),
        ("history", torch.zeros(12, 2, 4, 5, 7), r"history: shape .*use \(12, 2, 4, 5, 6\)"),
        (
            "history",
            torch.zeros(12, 2, 4, 5, 6, dtype=torch.bfloat16),
            "history: dtype .*use float32",
        ),
        ("inputs", torch.zeros(3, 2, 4, 5, 6, device="meta"), "inputs: on meta: move it to .*cpu"),
        ("inputs", torch.zeros(3, 2, 4, 6, 5).mT, "inputs: strides .*use a contiguous tensor"),
        ("seen", torch.zeros(2, 12, 4, 5, 6), r"seen: shape .*use \(2, 11, 4, 5, 6\)"),
        ("seen", torch.zeros(2, 11, 4, 5, 6).half(), "seen: dtype torch.float16: use float32"),
        ("said", torch.zeros(3, 2, 11, 4, 5, 6).half(), "said: dtype torch.float16: use float32"),
        ("predictions", torch.zeros(SHAPE, requires_grad=True), "predictions: requires grad, but"),
    ],
)
def test_wrong_arguments(name, value, message, step_case):
    with pytest.raises(ValueError, match=message):
        guided_step(**step_case(SHAPE).arguments() | {name: value})


def test_the_raw_operator_checks_too(step_case):
    with pytest.raises(ValueError, match="rolled: 7"):
        torch.ops.esd_fast.guided_step(**step_case(SHAPE).arguments() | {"rolled": 7})


# --- with the rest of torch --------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False])
def test_opcheck(keep, step_case):
    arguments = step_case((2, 1, 3), torch.bfloat16, keep=keep).arguments()
    torch.library.opcheck(torch.ops.esd_fast.guided_step.default, (), arguments)


def test_writes_are_counted(step_case):
    given = step_case(SHAPE).arguments()
    versions = {k: given[k]._version for k in ("history", "inputs", "seen", "said", "table")}
    guided_step(**given)
    assert {k for k, v in versions.items() if given[k]._version > v} == versions.keys() - {"table"}


# --- which way is taken ------------------------------------------------------------------------------


def test_nothing_native_on_a_gpu():
    _, run, why = ops._implementation("guided_step", "native", torch.device("cuda"))
    assert (run, why) == (ops._guided_step.PLAIN, "no native version of this operator")
