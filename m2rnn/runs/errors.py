"""What a run that cannot start raises."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from math import inf
from typing import Any


class SettingsError(ValueError):
    """A setting that cannot work: the message names its value, what was expected and what to do."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'steps'?"`` for ``"stepz"``; nothing where no known name is close."""
    known = list(known)
    near = get_close_matches(name, known, n=1) or [each for each in known if each.lower() == name.lower()]
    return f"; did you mean {near[0]!r}?" if near else ""


WHOLE_BELOW = 2**32  # a product of two such numbers is one of int64
NUMBER_BELOW = 3e38  # float32's largest


def check_sizes(settings: Mapping[str, Any]) -> None:
    """Raise `SettingsError` for the first number, in lists too, that no run and no float32 can hold."""
    for name, value in settings.items():
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(each, int) and abs(each) > WHOLE_BELOW:
                raise SettingsError(f"{name} {_short(each)}: expected a whole number of at most {WHOLE_BELOW:,}")
            if isinstance(each, float) and NUMBER_BELOW < abs(each) < inf:
                raise SettingsError(f"{name} {each!r}: expected a number of at most {NUMBER_BELOW:g}")


def _short(number: int) -> str:
    return str(number) if abs(number) < 10**40 else "of more than 40 digits"
