"""The configuration of a run's model: a preset with the user's changes, checked before anything is trained."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from m2rnn.models import M2RNNConfig, M2RNNForCausalLM
from m2rnn.runs.errors import SettingsError, did_you_mean


def configure(
    preset: Callable[..., M2RNNConfig], changes: Mapping[str, Any], *, vocab_size: int, **given: Any
) -> M2RNNConfig:
    """``preset`` with ``vocab_size`` and ``given``, then ``changes``, in the place of its fields.

    Raises:
        SettingsError: if there is no such preset or field, for a value of another type, for sizes that make no model,
            and for fewer token ids than ``vocab_size``.
    """
    typed = {name: _typed(name, value) for name, value in changes.items()}
    try:
        config = preset(**{"vocab_size": vocab_size, **given, **typed})
        with torch.device("meta"):
            _try_mixers(M2RNNForCausalLM(config))
    except (TypeError, ValueError, RuntimeError, ArithmeticError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"model {dict(changes)}: {reason}" if changes else reason) from error
    if config.vocab_size < vocab_size:
        raise SettingsError(f"model.vocab_size {config.vocab_size}: expected at least {vocab_size:,}, the token ids")
    return config


def _typed(name: str, value: Any) -> Any:
    annotation = M2RNNConfig.__annotations__.get(name)
    if annotation is None:  # a Hugging Face config would take and ignore it
        near = did_you_mean(name, M2RNNConfig.__annotations__)
        raise SettingsError(f"model.{name}: expected a field of M2RNNConfig, such as hidden_size{near}")
    if name.endswith("_options") and not (
        isinstance(value, Mapping) and all(isinstance(each, Mapping) for each in value.values())
    ):
        raise SettingsError(f"model.{name} {value!r}: expected names with options, such as {{m2rnn: {{num_heads: 8}}}}")
    return float(value) if annotation in (float, float | None) and type(value) is int else value


def _try_mixers(model: M2RNNForCausalLM) -> None:
    """Run one layer of each kind for a token: some options are looked at no sooner."""
    layers = zip(model.config.mixers, model.model.layers, strict=True)
    for block in dict(layers).values():
        block.mixer(torch.empty(1, 1, model.config.hidden_size))
