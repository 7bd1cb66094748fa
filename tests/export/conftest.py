"""What the tests of exports share."""

from pathlib import Path

import pytest

from . import tiny


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A diffusers folder of every family's tiny model."""
    root = tmp_path_factory.mktemp("models")
    for family in tiny.FAMILIES:
        tiny.original(family).save_pretrained(root / family)
    return {family: root / family for family in tiny.FAMILIES}
