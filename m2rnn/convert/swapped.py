"""Classes of models with swapped layers: those of transformers, which build the layers that config.json records."""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from m2rnn.convert.families import GUARD, SwappedMixer, mixer_of, put_mixer, text_config_of
from m2rnn.layers import M2RNN
from m2rnn.models.shim import SWAPPED_SHIM, write_shim

RECORD = "m2rnn_swap"  # in config.json: the options of each swapped layer, by its number
#: Those of the Auto classes under which a swapped model is looked for
AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
)


class _Swapped:
    """What these classes add to those of transformers."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        for layer, options in (getattr(config, RECORD, None) or {}).items():
            put_mixer(self, int(layer), SwappedMixer(new_layer(self, int(layer), options), int(layer)))  # type: ignore[arg-type]
            self._keys_to_ignore_on_load_missing.add(rf"\.{layer}\.\w+\.{GUARD}$")  # type: ignore[attr-defined]
        config.auto_map = auto_map_of(config)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            write_shim(Path(save_directory), self.config.auto_map)  # type: ignore[attr-defined]

    def _upload_modified_files(self, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        write_shim(working_dir, self.config.auto_map)  # type: ignore[attr-defined]
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing: ``auto_map`` names the class already, and transformers would save a copy of its own file."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        parts = super().__reduce_ex__(max(2, int(protocol)))
        return (_new, (type(self).__name__,), *parts[2:])  # pickle would find the class of transformers by the name


def _new(name: str) -> Any:
    return object.__new__(swapped_class(name))


@functools.cache
def swapped_class(name: str) -> Any:
    """The class of transformers of this name, with M2RNN layers where its configuration records them.

    Its objects save a shim beside their weights, through which ``trust_remote_code=True`` finds this class again.

    Raises:
        ValueError: for a name that is no model of transformers.
    """
    base = getattr(transformers, name, None)
    if not (isinstance(base, type) and issubclass(base, PreTrainedModel)):
        raise ValueError(f"{name!r}: expected the name of a model class of transformers {transformers.__version__}")
    # transformers gives a class from a shim this mixin by itself, in a class of another name, unless it is a base
    mixin = (GenerationMixin,) if issubclass(base, GenerationMixin) else ()
    # By its module it stays one of transformers, which chooses conversions of weights and options of layers by that
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(name, (_Swapped, base, *mixin), names)


def auto_map_of(config: PreTrainedConfig) -> dict[str, str]:
    """What each Auto class finds in the shim, for a model of transformers with this configuration."""
    found = {}
    for auto in AUTO_CLASSES:
        model = getattr(transformers, auto)._model_mapping.get(type(config), None)
        if isinstance(model, type) and issubclass(model, PreTrainedModel):
            found[auto] = f"{SWAPPED_SHIM}.{model.__name__}"
    return found


def new_layer(model: PreTrainedModel, layer: int, options: Mapping[str, Any]) -> M2RNN:
    """An M2RNN layer with weights that start as the model's own do, and a zero output projection."""
    config = text_config_of(model)
    device = next(mixer_of(model, layer).parameters()).device
    try:
        with device:
            m2rnn = M2RNN(config.hidden_size, **options)
    except TypeError as error:
        raise ValueError(f"{error}: options are those of m2rnn.M2RNN") from error
    m2rnn.to(model.dtype)  # the old mixer may be quantised
    with torch.no_grad():
        m2rnn.in_proj.weight.normal_(0, config.initializer_range)
        m2rnn.out_proj.weight.zero_()
    return m2rnn.train(model.training)
