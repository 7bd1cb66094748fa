"""The packaged tokenizer gives the ids of CLIP's own, as open_clip's SimpleTokenizer has them."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from esd_fast.models.clip_tokenizer.build import START, build, merges_of, tokens_of
from esd_fast.models.single_file import CONFIGS
from esd_fast.models.tokenizer import CLIP_FILES, tokenizer_for

# Ids of open_clip 3.3.0's SimpleTokenizer, without the ends and the padding.
RECORDED = json.loads((Path(__file__).parent / "clip_token_ids.json").read_text())
TEXTS = [
    "a photo of a cat",
    "Van Gogh",
    "van gogh's starry night, oil on canvas (1889)!",
    "AC/DC live at the Apollo; 4k, 8K, f/1.4",
    "don't won't I'll we've they're it's I'm he'd",
    "Ünïcödé naïve café Ærøskøbing Łódź",
    "東京タワーの夜景 と 猫",
    "кошка на крыше",
    "😀🐈‍⬛ emoji",
    "a  cat \t with\nmany   blanks ",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "1234567890 3.14159 -1e-5 50%",
    "(masterpiece:1.2), [low quality], {braces}, <lora:x:0.8>",
    "under_score hyphen-ated CamelCase ALLCAPS",
    "...!!!??? --- *** /// \\\\\\ ~~~ ^^^ `` '' \"\"",
    "",
]


def plain(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, truncation=False).input_ids[1:-1]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenizer_for(str(CONFIGS / "sd1"), "tokenizer")


def test_ids_are_clips(tokenizer: Any) -> None:
    assert len(tokenizer) == 49408
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (49406, 49407)
    assert [plain(tokenizer, text) for text in TEXTS] == RECORDED


def test_ids_are_those_of_open_clip_itself(tokenizer: Any) -> None:
    """The recorded ids, and a few thousand words more, where open-clip-torch is installed."""
    simple = pytest.importorskip("open_clip.tokenizer").SimpleTokenizer()
    assert [simple.encode(text) for text in TEXTS] == RECORDED
    letters = [token.removesuffix("</w>") for token in list(tokenizer.get_vocab())[::7]]
    words = [word for word in letters if word.isascii() and word.isprintable() and "<|" not in word]
    assert [plain(tokenizer, w) for w in words] == [simple.encode(w) for w in words]


@pytest.mark.parametrize(
    ("family", "name", "pad"),
    [
        ("sd1", "tokenizer", 49407),
        ("sd2", "tokenizer", 0),
        ("sdxl", "tokenizer", 49407),
        ("sdxl", "tokenizer_2", 0),
    ],
)
def test_each_family_pads_as_it_was_trained(family: str, name: str, pad: int) -> None:
    """OpenCLIP's encoders were trained with padding of zeros, OpenAI's with the end token."""
    made = tokenizer_for(str(CONFIGS / family), name)
    ids = made("cat", padding="max_length", truncation=True).input_ids
    assert ids == [49406, 2368, 49407] + [pad] * 74


def test_what_is_made_is_what_ships(tmp_path: Path) -> None:
    """The builder, on a vocabulary written back as open_clip has it."""
    merges = (CLIP_FILES / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    text = "\n".join(
        ['"bpe_simple_vocab_16e6.txt#version: 0.2', *merges, "more than", "are used", ""]
    )
    assert merges_of(text) == merges
    assert tokens_of(merges)[-2] == START
    with gzip.open(tmp_path / "vocabulary.gz", "wb") as file:
        file.write(text.encode())
    build(tmp_path / "vocabulary.gz", tmp_path / "made")
    for made in (tmp_path / "made").iterdir():
        assert made.read_bytes() == (CLIP_FILES / made.name).read_bytes()
    assert len(list((tmp_path / "made").iterdir())) == 4
