"""What the options for reading a model say."""

from __future__ import annotations

import argparse
import dataclasses

from esd_fast.config import Loading


def loading_of(arguments: argparse.Namespace) -> Loading:
    """Raises ValueError for a bad value."""
    names = [field.name for field in dataclasses.fields(Loading)]
    given = {name: getattr(arguments, name) for name in names}
    return Loading(**{name: value for name, value in given.items() if value is not None})
