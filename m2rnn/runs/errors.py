"""What a run that cannot start raises."""

from collections.abc import Iterable
from difflib import get_close_matches


class SettingsError(ValueError):
    """A setting that cannot work: the message names its value, what was expected and what to do."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'steps'?"`` for ``"stepz"``; nothing where no known name is close."""
    known = list(known)
    near = get_close_matches(name, known, n=1) or [each for each in known if each.lower() == name.lower()]
    return f"; did you mean {near[0]!r}?" if near else ""
