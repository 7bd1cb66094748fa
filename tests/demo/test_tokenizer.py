"""The builder's tokenizer: the same in every process, and every word one token."""

import itertools

import pytest

from esd_fast.demo import world
from esd_fast.demo.tokenizer import merged, merges_of, new_tokenizer

PROGRAM = """
from esd_fast.demo import world
from esd_fast.demo.tokenizer import new_tokenizer
print(sorted(new_tokenizer(world.vocabulary()).get_vocab().items()))
"""


def test_every_word_is_one_token():
    tokenizer = new_tokenizer(world.vocabulary())
    ids = [tokenizer(word).input_ids for word in world.vocabulary()]
    assert all(len(i) == 3 for i in ids)  # start, word, end
    assert len({i[1] for i in ids}) == len(ids)


def test_is_the_same_in_every_process(run_python):
    said = [run_python("-c", PROGRAM, PYTHONHASHSEED=seed) for seed in ("1", "2")]
    assert said[0] == said[1]


def test_merges_are_those_of_the_textbook():
    """Sennrich et al. 2016, by hand: e+r</w> is in four words, then l+o in three, and so on."""
    words = ["lower", "newer", "wider", "slower", "lo"]
    merges = merges_of(words)
    assert merges[0] == ("e", "r</w>")
    assert merges[1] == ("w", "er</w>")  # three times, before l+o, which comes twice
    split = [(*w[:-1], w[-1] + "</w>") for w in words]
    for pair in merges:
        split = [merged(symbols, pair) for symbols in split]
    assert split == [(w + "</w>",) for w in words]


@pytest.mark.parametrize("text", ["aaa", "aaaa", "abab"])
def test_pairs_merge_from_the_left(text):
    pair = next(itertools.pairwise(text))
    assert "".join(merged(tuple(text), pair)) == text
    assert merged(tuple(text), pair)[0] == "".join(pair)
