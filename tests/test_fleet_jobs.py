"""Job lists as people write them, and as they should not."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from esd_fast.config import EraseConfig
from esd_fast.fleet.jobs import BadJobs, Job, read_jobs

MODEL = "some/model"
CSV = """concept,erase_from,method,preset,iterations,seed,Negative-Guidance,concept_weights,preserve,name
cat,,,,,,,,,
"a cat, asleep|dog",an animal|,esd-u,fast,8,7,1.5,1|0.5,a house,
nude,,esd-x,paper,,,,,,Nude v2
"""
LINES = r"""{"concept": "cat"}
{"concept": ["a cat, asleep", "dog"], "erase_from": ["an animal", null], "method": "esd-u", "preset": "fast", "iterations": 8, "seed": 7, "negative_guidance": 1.5, "concept_weights": [1, 0.5], "preserve": "a house"}

{"concept": "nude", "method": "esd-x", "preset": "paper", "name": "Nude v2", "seed": null}
"""


def written(folder: Path, text: str | bytes, name: str = "jobs.csv") -> Path:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


def jobs_in(folder: Path, text: str | bytes, name: str = "jobs.csv", **defaults: Any) -> list[Job]:
    return read_jobs(written(folder, text, name), MODEL, defaults)


def expected() -> list[EraseConfig]:
    second = {
        "erase_from": ["an animal", None],
        "train_method": "esd-u",
        "iterations": 8,
        "seed": 7,
        "negative_guidance": 1.5,
        "concept_weights": [1.0, 0.5],
    }
    return [
        EraseConfig.from_preset("fast", "cat", MODEL),
        EraseConfig.from_preset(
            "fast", ["a cat, asleep", "dog"], MODEL, **second, preserve="a house"
        ),
        EraseConfig.from_preset("paper", "nude", MODEL, train_method="esd-x"),
    ]


@pytest.mark.parametrize(("text", "name"), [(CSV, "jobs.csv"), (LINES, "jobs.jsonl")])
def test_both_kinds_say_the_same(text: str, name: str, tmp_path: Path) -> None:
    text = text.replace("reference", "fast").replace("a house", "a house")
    text = text.replace('"a house"', '"a house"')
    jobs = jobs_in(tmp_path, text, name)
    assert [job.config for job in jobs] == expected()
    digest = hashlib.sha256(b"a cat, asleep+dog").hexdigest()[:8]
    assert [job.file_name for job in jobs] == [
        "esd-cat-from-cat-esd-x.safetensors",
        f"esd-a-cat-asleep+dog-{digest}-from-an-animal-esd-u.safetensors",
        "Nude-v2.safetensors",
    ]
    assert [job.line for job in jobs] == ([2, 3, 4] if name == "jobs.csv" else [1, 2, 4])


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.rstrip("\n"),
        lambda text: text.replace("\n7,", "\n7.0,").replace(",8,", ",8.0,"),
        lambda text: text + "\n,,,\n  \n",
        lambda text: "".join(f"{n},{line}" for n, line in enumerate(text.splitlines(True)))[1:],
    ],
)
def test_as_other_programs_write_it(change: Any, tmp_path: Path) -> None:
    text = "seed,concept,iterations,lr\n7,cat,8,1e-3\n,dog,,\n"
    first, second = jobs_in(tmp_path, change(text))
    settings = {"seed": 7, "iterations": 8, "learning_rate": 1e-3}
    assert first.config == EraseConfig.from_preset("fast", "cat", MODEL, **settings)
    assert second.config == EraseConfig.from_preset("fast", "dog", MODEL)


def test_defaults_are_for_jobs_that_say_nothing_else(tmp_path: Path) -> None:
    text = "concept,iterations\ncat,\ndog,9\n"
    file = written(tmp_path, text)
    jobs = read_jobs(file, MODEL, {"iterations": 5, "seed": 3, "preset": None, "dtype": "float16"})
    assert [(j.config.iterations, j.config.seed, j.config.dtype) for j in jobs] == [
        (5, 3, "float16"),
        (9, 3, "float16"),
    ]
    (embedded,) = read_jobs(written(tmp_path, "concept\ncat\n"), None, {})
    assert embedded.config == EraseConfig.from_preset("fast", "cat", None)


BAD = [
    ("", "line 1: it has nothing; it must have a column 'concept'"),
    ("a;b\n", "column 'a;b' is unknown; there are concept"),
    ("seed,iterations\n1,2\n", "must have a column 'concept'"),
    ("concept,epochs\ncat,3\n", "line 1: column 'epochs' is unknown"),
    ("concept,method,train_method\ncat,,\n", "column 'train_method' is there twice"),
    ("concept,dtype\ncat,float16\n", "column 'dtype' is one thing for the whole fleet.*--dtype"),
    ("concept,model\ncat,x\n", "column 'model'.*say --model"),
    ("concept,model_config\ncat,x\n", "say --config"),
    ("concept,given\ncat,x\n", "column 'given' is unknown"),
    ("concept\n", "holds no job"),
    ("concept,seed\n,3\n", "line 2: concept is missing"),
    ("concept,seed\ncat, asleep,3\n", "line 2: it has 3 cells, line 1 has 2.*double quotes"),
    ("concept\ncat|\n", "line 2: concept is ''; it must name something"),
    ("concept\ncat|cat\n", "line 2: concept holds 'cat' more than once"),
    ("concept,seed\ncat,x\n", "line 2: seed is 'x'; it must be a whole number"),
    ("concept,seed\ncat,1.5\n", "seed is '1.5'; it must be a whole number"),
    ("concept,seed\ncat,٣\n", "seed is '٣'"),
    ("concept,seed\ncat,-1\n", "seed is -1; it must be from 0"),
    ("concept,iterations\ncat,0\n", "iterations is 0; it must be a whole number from 1"),
    ("concept,iterations\ncat,1_000\n", "iterations is '1_000'"),
    ("concept,lr\ncat,nan\n", "learning_rate is 'nan'; it must be a number"),
    ("concept,lr\ncat,1e999\n", "learning_rate is inf; it must be a finite number"),
    ("concept,lr\ncat,\"1,5\"\n", "learning_rate is '1,5'"),
    ("concept,method\ncat,esd-z\n", "line 2: train_method is 'esd-z'; it must be one of"),
    ("concept,preset\ncat,slow\n", "line 2: preset 'slow' is unknown; there are fast"),
    ("concept,anchor\ncat,dog\n", "anchor is 'dog'; it must be 'concept' or 'null'"),
    ("concept,concept_weights\ncat|dog,1|x\n", "concept_weights is 'x'"),
    ("concept,concept_weights\ncat,1\n", "left out where one concept is erased"),
    ("concept,erase_from\ncat|dog,a|b|c\n", "erase_from is .*one for each of 2 concepts"),
    ("concept,preserve\ncat,Cat\n", "preserve holds 'Cat', which is to be erased"),
    ("concept,name\ncat,\x1b\n", "name is '.x1b'; it must name something"),
    ('concept\n"cat\n', "line 2: unexpected end of data"),
    ("concept\n" + "x" * 200_000 + "\n", "line 2: field larger than field limit"),
    (b"concept\n\xff\n", "is no UTF-8 text"),
]  # fmt: skip
BAD_LINES = [
    ("{}", "line 1: concept is missing"),
    ("[1]", "line 1: it must be an object"),
    ("\n{", "line 2: its JSON is damaged"),
    ("[" * 100_000, "line 1: its JSON is damaged: nested too deeply"),
    ('{"concept": "cat", "concept": "dog"}', "'concept' is there twice"),
    ('{"concept": "cat", "lr": 1, "learning_rate": 2}', "'learning_rate' is there twice"),
    ('{"concept": "cat", "epochs": 3}', "column 'epochs' is unknown"),
    ('{"concept": "cat", "seed": "3"}', "seed is '3'; it must be a whole number"),
    ('{"concept": "cat", "seed": true}', "seed is True"),
    ('{"concept": "cat", "learning_rate": NaN}', "learning_rate is nan"),
    ('{"concept": {"a": 1}}', "concept is {'a': 1}"),
    ('{"concept": [null]}', "concept is None"),
    ('{"concept": "a\\ud800"}', "valid Unicode"),
    ('{"concept": "cat", "preset": []}', r"preset \[\] is unknown"),
    ('{"concept": "cat", "name": 3}', "name is 3; it must be a text"),
    ('{"concept": "cat", "seed": ' + "9" * 5000 + "}", "line 1: "),
    ("", "holds no job"),
]


@pytest.mark.parametrize(
    ("text", "said", "name"),
    [(*bad, "jobs.csv") for bad in BAD] + [(*bad, "jobs.jsonl") for bad in BAD_LINES],
)
def test_bad_files(text: str | bytes, said: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="jobs") as caught:
        jobs_in(tmp_path, text, name)
    problems = getattr(caught.value, "problems", [str(caught.value)])
    assert len(problems) == 1
    assert problems[0].startswith(str(tmp_path / name))
    assert "\n" not in problems[0]
    with pytest.raises(ValueError, match=said):
        raise ValueError(problems[0])


def test_every_problem_is_told_and_doubles_are_named(tmp_path: Path) -> None:
    text = "concept,seed,name\ncat,x,\ndog,1,\ndog,2,\n,3,\ndog,3,dog-3\nbird,4,dog 3\n"
    with pytest.raises(BadJobs) as caught:
        jobs_in(tmp_path, text)
    told = [problem.split(", line ")[1] for problem in caught.value.problems]
    assert [line[0] for line in told] == ["2", "4", "5", "7"]
    assert "its file would be esd-dog-from-dog-esd-x.safetensors, as that of line 3" in told[1]
    assert "dog-3.safetensors, as that of line 6; a column 'name' can tell" in told[3]


def test_lines_of_rows_that_take_several(tmp_path: Path) -> None:
    with pytest.raises(BadJobs) as caught:
        jobs_in(tmp_path, 'concept,seed\n"a\ncat",1\n\n"a\ndog",x\nbird,x\n')
    assert [p.split(": ")[0][-6:] for p in caught.value.problems] == ["line 5", "line 7"]


def test_what_is_no_job_list(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.csv' does not exist"):
        read_jobs(tmp_path / "none.csv", MODEL, {})
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_jobs(tmp_path, MODEL, {})
    with pytest.raises(ValueError, match=r"must be a file \.csv or \.jsonl"):
        jobs_in(tmp_path, json.dumps([{"concept": "cat"}]), "jobs.json")
