"""The configuration of a run's model: a preset with the user's changes, checked before anything is trained."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from m2rnn.models import M2RNNConfig, M2RNNForCausalLM
from m2rnn.training.track_settings import SettingsError


def configure(
    preset: Callable[..., M2RNNConfig], changes: Mapping[str, Any], *, vocab_size: int, **given: Any
) -> M2RNNConfig:
    """``preset`` with ``vocab_size`` and ``given``, then ``changes``, in the place of its fields.

    Raises:
        SettingsError: if there is no such preset or field, for a value of another type, for sizes that make no model,
            and for fewer token ids than ``vocab_size``.
    """
    for name in changes:
        if name not in M2RNNConfig.__annotations__:  # a Hugging Face config would take and ignore it
            raise SettingsError(f"model.{name}: expected a field of M2RNNConfig, such as hidden_size")
    try:
        config = preset(**{"vocab_size": vocab_size, **given, **changes})
        with torch.device("meta"):
            M2RNNForCausalLM(config)
    except (TypeError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"model {dict(changes)}: {reason}" if changes else reason) from error
    if config.vocab_size < vocab_size:
        raise SettingsError(f"model.vocab_size {config.vocab_size}: expected at least {vocab_size:,}, the token ids")
    return config
