"""Prompt lists as people have them: the reference's CSVs, and a prompt a line."""

from pathlib import Path

import pytest

from esd_fast.prompt_list import Case, read_prompts

ARTISTS = """,case_number,prompt,evaluation_seed,artist
0,0,"A Wheatfield, with Cypresses by Vincent van Gogh",2219,Vincent van Gogh
1,1,Vincent’s Bedroom in Arles,1514,Vincent van Gogh
"""
CLASSES = ''',case_number,prompt,evaluation_seed,class
0,7,Image of cassette player,4068,cassette player
1,9,"Image of ""chain saw""",4667,chain saw
'''


def written(folder: Path, text: str | bytes, name: str = "prompts.csv") -> Path:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


def test_the_references_columns(tmp_path: Path) -> None:
    artist = {"artist": "Vincent van Gogh"}
    assert read_prompts(written(tmp_path, ARTISTS)) == [
        Case("A Wheatfield, with Cypresses by Vincent van Gogh", 0, 2219, artist),
        Case("Vincent’s Bedroom in Arles", 1, 1514, artist),
    ]
    assert read_prompts(written(tmp_path, CLASSES)) == [
        Case("Image of cassette player", 7, 4068, {"class": "cassette player"}),
        Case('Image of "chain saw"', 9, 4667, {"class": "chain saw"}),
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r"),
        lambda text: text + "\n,,,,\n",
        lambda text: text.rstrip("\n"),
        lambda text: text.replace("2219", " 2219.0 "),
    ],
)
def test_as_other_programs_write_it(change, tmp_path: Path) -> None:
    expected = read_prompts(written(tmp_path, ARTISTS))
    assert read_prompts(written(tmp_path, change(ARTISTS), "other.CSV")) == expected


def test_columns_that_may_be_missing(tmp_path: Path) -> None:
    text = 'hue,prompt\n,a dog\n"dark\nred",a cat\n'
    expected = [Case("a dog", 0), Case("a cat", 1, None, {"hue": "dark\nred"})]
    assert read_prompts(written(tmp_path, text)) == expected
    text = "evaluation_seed,prompt,case_number\n,a dog,\n5,a cat\n"
    assert read_prompts(written(tmp_path, text)) == [Case("a dog", 0), Case("a cat", 1, 5)]


def test_a_prompt_a_line(tmp_path: Path) -> None:
    text = '\ufeffa cat, asleep\r\n\r\n  # not a comment  \n"quoted"\n'
    expected = [Case("a cat, asleep"), Case("# not a comment"), Case('"quoted"')]
    assert read_prompts(written(tmp_path, text, "prompts.txt")) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must have one column 'prompt'.* nothing"),
        ("case_number,evaluation_seed\n0,1\n", "must have one column 'prompt'"),
        ("case_number;prompt\n0;a cat\n", "must have one column 'prompt'.*separated by commas"),
        ("prompt,prompt\na,b\n", "must have one column 'prompt'"),
        ("prompt\n", "holds no prompt"),
        ("case_number,prompt\n0,a cat, asleep\n", "line 2 has 3 cells.*double quotes"),
        ("prompt,evaluation_seed\na cat,1\na dog,x\n", "line 3: evaluation_seed is 'x'"),
        ("prompt,evaluation_seed\na cat,-1\n", "evaluation_seed is '-1'"),
        ("prompt,evaluation_seed\na cat,1.5\n", "evaluation_seed is '1.5'"),
        ("prompt,evaluation_seed\na cat,٣\n", "evaluation_seed is"),
        ("prompt,case_number\na cat,../x\n", "case_number is '../x'"),
        ("prompt,case_number\n  ,3\n", "line 2: prompt is"),
        ('prompt\n"a cat\n', "line 2: "),
        ('prompt\n"a" cat\n', "line 2: "),
        ("prompt\n" + "x" * 200_000 + "\n", "line 2: "),
        (b"prompt\n\xff\n", "no UTF-8 text"),
    ],
)
def test_what_is_no_list(text: str | bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said) as error:
        read_prompts(written(tmp_path, text))
    assert "prompts.csv" in str(error.value)


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_prompts(tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_prompts(tmp_path)
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(written(tmp_path, "\n\n", "empty.txt"))
