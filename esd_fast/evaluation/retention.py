"""UA, IRA and CRA: did the erased concept go, did its own domain and the other one stay?

Unlearning accuracy is the share of the erased concept's pictures in which it is *not* recognised,
in-domain and cross-domain retain accuracy the shares of other concepts' pictures in which these
are (UnlearnCanvas, Zhang et al., NeurIPS 2024). A picture whose prompt names the erased concept is
asked about that one alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .concepts import Concepts
from .intervals import before_after
from .recogniser import Recogniser


@dataclass(frozen=True)
class Questions:
    """What every picture is asked: `asks[n, c]`, does picture n ask for concept c?"""

    concepts: Concepts
    asks: np.ndarray  # (N, C) bool

    @classmethod
    def of(cls, concepts: Concepts, asked: Sequence[Sequence[str]]) -> Questions:
        """Of the concepts that any picture asks for."""
        wanted = {name for names in asked for name in names}
        kept = {name: domain for name, domain in concepts.items() if name in wanted}
        rows = [[name in names for name in kept] for names in asked]
        return cls(kept, np.array(rows, bool).reshape(len(asked), len(kept)))

    def known_to(self, recogniser: Recogniser) -> Questions:
        """Without the concepts that `recogniser` cannot be asked about."""
        picked = [i for i, name in enumerate(self.concepts) if recogniser.knows(name)]
        names = list(self.concepts)
        return Questions({names[i]: self.concepts[names[i]] for i in picked}, self.asks[:, picked])

    def asks_any(self, names: Sequence[str]) -> np.ndarray:
        """(N,) bool: the pictures that ask for one of `names`."""
        picked = [i for i, name in enumerate(self.concepts) if name in names]
        return np.asarray(self.asks[:, picked].any(1))

    def about(self, name: str, erased: Sequence[str]) -> np.ndarray:
        """(N,) bool: the pictures that are asked about `name`."""
        column = self.asks[:, list(self.concepts).index(name)]
        return np.asarray(column if name in erased else column & ~self.asks_any(erased))


def retention(
    questions: Questions, erased: Sequence[str], was: np.ndarray, now: np.ndarray
) -> dict[str, Any]:
    """`was`, `now` (N, C) bool: which concepts are recognised before and after."""
    domains = {questions.concepts[name] for name in erased if name in questions.concepts}
    groups: dict[str, list[tuple[bool, bool]]] = {"UA": [], "IRA": [], "CRA": []}
    table = {}
    for column, (name, domain) in enumerate(questions.concepts.items()):
        about = questions.about(name, erased)
        pairs = list(zip(was[about, column].tolist(), now[about, column].tolist(), strict=True))
        if not pairs:
            continue
        table[name] = {
            "domain": domain,
            "erased": name in erased,
            **before_after(*map(list, zip(*pairs, strict=True))),
        }
        if name in erased:
            groups["UA"] += [(not before, not after) for before, after in pairs]
        else:
            groups["IRA" if domain in domains else "CRA"] += pairs
    found = {
        name: before_after(*map(list, zip(*g, strict=True))) for name, g in groups.items() if g
    }
    return {**found, "by_concept": table}


@dataclass(frozen=True)
class InterferenceRow:
    """`seen`: concept -> (recognised, pictures that ask for it), of the model with `name` erased;
    `erased` are the concepts that are meant to be gone."""

    name: str
    erased: tuple[str, ...]
    seen: Mapping[str, tuple[int, int]]


def interference_row(
    name: str, questions: Questions, erased: Sequence[str], shown: np.ndarray
) -> InterferenceRow:
    """`shown` (N, C) bool: which concepts are recognised."""
    seen = {}
    for column, concept in enumerate(questions.concepts):
        about = questions.about(concept, erased)
        seen[concept] = int(shown[about, column].sum()), int(about.sum())
    return InterferenceRow(name, tuple(erased), seen)
