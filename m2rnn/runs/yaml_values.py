"""YAML as people write it: ``1e-3`` is a number, which YAML 1.1, PyYAML's, takes for text as long as it has no dot."""

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):  # type: ignore[misc] # it has no types
    pass


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(text: str) -> Any:
    """The value that ``text`` holds; `yaml.YAMLError` if it is no YAML."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deep") from None
    except ValueError as error:  # such as a number of more digits than Python reads
        raise yaml.YAMLError(str(error)) from None
