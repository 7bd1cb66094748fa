"""What every handler of the page needs: whose request it is, and errors that may be shown."""

from __future__ import annotations

import functools
import html
import inspect
from collections.abc import Callable
from typing import Any

import gradio as gr

from .cookies import owner_in
from .place import Place


def still(chosen: object, keys: list[str]) -> dict[str, Any]:
    """For a list whose choices change. What is chosen stays unsaid where it may stay: an answer
    under way would undo what was chosen meanwhile."""
    return {} if chosen in keys else {"value": keys[0] if keys else None}


def owner_of(request: gr.Request) -> str:
    return owner_in(request.cookies)


def saying(place: Place) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For what a button does: whatever goes wrong is said in one line, with no place of this
    machine in it."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except Exception as error:
                text = html.escape(place.told(error), quote=False)
                raise gr.Error(text, duration=12, print_exception=False) from error

        wrapper.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        return wrapper

    return wrap
