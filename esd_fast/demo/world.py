"""The embedded model's world: which objects, which hands (styles), which words. Data only."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

# object word -> (emoji name in the icon sets, a synonym used in a share of the captions)
OBJECTS: dict[str, tuple[str, str]] = {
    "airplane": ("airplane", "plane"),
    "apple": ("red-apple", "pippin"),
    "balloon": ("balloon", "blimp"),
    "banana": ("banana", "plantain"),
    "bell": ("bell", "chime"),
    "bicycle": ("bicycle", "bike"),
    "butterfly": ("butterfly", "moth"),
    "cactus": ("cactus", "succulent"),
    "cake": ("birthday-cake", "gateau"),
    "camera": ("camera", "camcorder"),
    "car": ("automobile", "sedan"),
    "carrot": ("carrot", "vegetable"),
    "cat": ("cat-face", "kitty"),
    "crab": ("crab", "shellfish"),
    "crown": ("crown", "tiara"),
    "dog": ("dog-face", "puppy"),
    "doughnut": ("doughnut", "donut"),
    "fish": ("fish", "trout"),
    "frog": ("frog", "toad"),
    "grapes": ("grapes", "berries"),
    "guitar": ("guitar", "ukulele"),
    "hamburger": ("hamburger", "burger"),
    "hammer": ("hammer", "mallet"),
    "house": ("house", "cottage"),
    "key": ("key", "passkey"),
    "mushroom": ("mushroom", "toadstool"),
    "owl": ("owl", "owlet"),
    "panda": ("panda", "bamboo-eater"),
    "penguin": ("penguin", "seabird"),
    "pineapple": ("pineapple", "ananas"),
    "pizza": ("pizza", "slice"),
    "rabbit": ("rabbit-face", "bunny"),
    "robot": ("robot", "android"),
    "rocket": ("rocket", "spaceship"),
    "sailboat": ("sailboat", "yacht"),
    "scissors": ("scissors", "shears"),
    "snail": ("snail", "slug"),
    "snowman": ("snowman-without-snow", "snowperson"),
    "sunflower": ("sunflower", "bloom"),
    "train": ("locomotive", "engine"),
    "tulip": ("tulip", "flower"),
    "turtle": ("turtle", "tortoise"),
    "umbrella": ("umbrella", "parasol"),
    "watermelon": ("watermelon", "melon"),
}
# style word -> the hand (icon set) that draws it; pictures.py adds the hand's own technique
STYLES: dict[str, str] = {
    "cartoon": "noto",
    "flat": "fluent-emoji-flat",
    "ink": "fluent-emoji-high-contrast",
    "pixel": "twemoji",
    "sepia": "noto-v1",
}
NEUTRAL_STYLE = "cartoon"
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "blue": (160, 196, 240),
    "green": (186, 226, 186),
    "pink": (250, 200, 214),
    "yellow": (252, 238, 170),
}
OBJECT_NAMES = tuple(OBJECTS)
STYLE_NAMES = tuple(STYLES)
BACKGROUND_NAMES = tuple(BACKGROUNDS)

# How often a caption leaves things open, and what is then drawn. One neutral style takes most of
# the share that no caption asks for: without it the most striking style takes all of it, and
# cannot be erased since the model falls back on it.
EMPTY_SHARE, STYLE_ONLY_SHARE, OBJECT_ONLY_SHARE = 0.10, 0.12, 0.38
BACKGROUND_SHARE, SYNONYM_SHARE = 0.20, 0.12
WHITE_SHARE_UNPROMPTED = 0.6

OBJECT_FORMS = ("{object}", "{a} {object}", "a picture of {a} {object}")
STYLED_FORMS = ("{a} {object} in {style} style", "{of_style} {style} style {object}")
STYLE_ONLY_FORMS = ("{style} style", "a picture in {style} style")
BACKGROUND_FORM = " on a {background} background"


@dataclass(frozen=True)
class Scene:
    """What one picture shows, and the caption it is trained with."""

    object: str
    style: str
    background: str
    caption: str


def article(word: str) -> str:
    return "an" if word[0] in "aeio" or word == "umbrella" else "a"


def compose(form: str, object: str = "", style: str = "", background: str = "") -> str:
    """One caption; `background` empty leaves it unsaid."""
    articles = {"a": article(object or "x"), "of_style": article(style or "x")}
    caption = form.format(object=object, style=style, **articles)
    return caption + (BACKGROUND_FORM.format(background=background) if background else "")


def captions_of(concept: str) -> list[str]:
    """Every form in which a caption asks for an object or a style, the other part varied."""
    if concept in OBJECTS:
        plain = [compose(form, concept) for form in OBJECT_FORMS]
        styled = [compose(form, concept, style) for form in STYLED_FORMS for style in STYLES]
        grounds = [compose(OBJECT_FORMS[1], concept, background=b) for b in BACKGROUNDS]
        return plain + styled + grounds
    if concept in STYLES:
        plain = [compose(form, style=concept) for form in STYLE_ONLY_FORMS]
        return plain + [compose(form, o, concept) for o in OBJECTS for form in STYLED_FORMS]
    known = ", ".join([*OBJECTS, *STYLES])
    raise ValueError(f"concept {concept!r} is not in the embedded model's world ({known})")


def named_in(prompt: str) -> str | None:
    """The object or style that a prompt names ("a cat" names cat), or None."""
    words = prompt.lower().split()
    return next((w for w in words if w in OBJECTS or w in STYLES), None)


def all_named_in(prompts: Sequence[str]) -> list[str]:
    """What each of `prompts` names, in their order, once."""
    return list(dict.fromkeys(filter(None, map(named_in, prompts))))


def draw_scene(rng: random.Random, neutral_share: float) -> Scene:
    """One training scene: the caption form first, then what it leaves open."""
    kind = rng.random()
    object = rng.choice(OBJECT_NAMES)
    style = unprompted(rng, STYLE_NAMES, NEUTRAL_STYLE, neutral_share)
    background = unprompted(rng, BACKGROUND_NAMES, "white", WHITE_SHARE_UNPROMPTED)
    if kind < EMPTY_SHARE:
        return Scene(object, style, background, "")
    named = ""
    if rng.random() < BACKGROUND_SHARE:
        named = background = rng.choice(BACKGROUND_NAMES)
    word = OBJECTS[object][1] if rng.random() < SYNONYM_SHARE else object
    kind -= EMPTY_SHARE
    if kind < STYLE_ONLY_SHARE:
        style = rng.choice(STYLE_NAMES)
        caption = compose(rng.choice(STYLE_ONLY_FORMS), style=style, background=named)
    elif kind < STYLE_ONLY_SHARE + OBJECT_ONLY_SHARE:
        caption = compose(rng.choice(OBJECT_FORMS), word, background=named)
    else:
        style = rng.choice(STYLE_NAMES)
        caption = compose(rng.choice(STYLED_FORMS), word, style, named)
    return Scene(object, style, background, caption)


def unprompted(rng: random.Random, names: Sequence[str], usual: str, share: float) -> str:
    """The usual one for `share` of the pictures, else one of the others."""
    return usual if rng.random() < share else rng.choice([n for n in names if n != usual])


def general_prompts() -> list[str]:
    """Every object and style as a prompt, in a fixed random order, every fourth one a style for as
    long as there are some."""
    rng = random.Random(0)
    objects = [compose(OBJECT_FORMS[1], o) for o in rng.sample(OBJECT_NAMES, len(OBJECTS))]
    styles = [compose(STYLE_ONLY_FORMS[0], style=s) for s in rng.sample(STYLE_NAMES, len(STYLES))]
    for number, style in enumerate(styles):
        objects.insert(4 * number + 3, style)
    return objects


def vocabulary() -> list[str]:
    """Every word a caption may hold (each becomes one token)."""
    words = {"a", "an", "picture", "of", "in", "style", "on", "background"}
    words |= {*OBJECTS, *STYLES, *BACKGROUNDS}
    for _, synonym in OBJECTS.values():
        words |= set(synonym.replace("-", " - ").split())
    return sorted(words)
