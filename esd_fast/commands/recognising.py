"""Who says in which pictures a concept is to be seen, by what the options say."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from esd_fast.demo import is_embedded

if TYPE_CHECKING:
    from esd_fast.evaluation.concepts import Concepts
    from esd_fast.evaluation.recogniser import Recogniser
    from esd_fast.evaluation.resistance import Witness


def check_clip(arguments: argparse.Namespace) -> None:
    """Raises FileNotFoundError for a path to nothing; anything else may be a hub id."""
    source = arguments.clip
    if source is not None and not Path(source).is_dir() and looks_local(source):
        raise FileNotFoundError(f"--clip {source!r} is no folder")


def looks_local(name: str) -> bool:
    return name.count("/") > 1 or name.startswith((".", "/", "~"))


def told_apart(arguments: argparse.Namespace, concepts: Sequence[str]) -> dict[str, str]:
    """All among which a picture's concept is told, by domain: the embedded model's world, what
    `--object` and `--style` name, and `concepts`, each of `--learnable-property`'s domain where it
    names none of these. Raises ValueError where CLIP would have nothing to tell one of them from.
    """
    from esd_fast.evaluation.concepts import OBJECT, erased_among, gathered, with_erased

    objects, styles = arguments.object or [], arguments.style or []
    if arguments.clip is None and (objects or styles):
        raise ValueError("--object and --style say what --clip tells apart; give --clip too")
    given = gathered(objects, styles, [], is_embedded(arguments.model))
    found = with_erased(given, concepts, arguments.learnable_property)
    for name in (name for concept in concepts for name in erased_among(concept, found)):
        domain = found[name]
        if arguments.clip is not None and list(found.values()).count(domain) < 2:
            raise ValueError(
                f"--clip has nothing to tell the {domain} {name!r} from; name other {domain}s that "
                f"a picture may show: --{domain} NAME, once or more"
                + (
                    "; where it is a style: --learnable-property style"
                    if styles and domain == OBJECT
                    else ""
                )
            )
    return found


def recogniser_of(arguments: argparse.Namespace, concepts: Concepts) -> Recogniser | None:
    """CLIP where it was asked for, else the embedded model's judge for its own pictures."""
    if arguments.clip is not None:
        from esd_fast.evaluation.clip import Clip, ClipRecogniser
        from esd_fast.models import resolve_device

        return ClipRecogniser(
            Clip.load(arguments.clip, str(resolve_device(arguments.device))), concepts
        )
    if is_embedded(arguments.model):
        from esd_fast.evaluation.embedded_judge import EmbeddedJudge

        return EmbeddedJudge()
    return None


def witness_of(recogniser: Recogniser | None, concepts: Concepts, concept: str) -> Witness | None:
    """For `concept`, or what of `concepts` it names; None where nobody knows that."""
    from esd_fast.evaluation.concepts import erased_among
    from esd_fast.evaluation.resistance import Witness

    name = next(iter(erased_among(concept, concepts)), concept)
    if recogniser is None or not recogniser.knows(name):
        return None
    return Witness(recogniser, name)
