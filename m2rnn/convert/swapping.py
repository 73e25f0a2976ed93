"""``m2rnn.swap``: M2RNN layers in the place of mixers of somebody else's model."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from m2rnn.convert.families import (
    ATTENTION,
    SwappedMixer,
    mixer_of,
    put_mixer,
    text_config_of,
)
from m2rnn.convert.fitting import fit
from m2rnn.convert.swapped import RECORD, auto_map_of, new_layer, swapped_class
from m2rnn.convert.takeover import options_like, take_over
from m2rnn.runs.display import Display

#: Arguments of ``from_pretrained`` that say where a model lies, and so where its config.json does
WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def swap(
    model: PreTrainedModel,
    layers: Sequence[int],
    *,
    calibration: Iterable[Tensor | Mapping[str, Any]] | None = None,
    steps: int = 200,
    display: Display | None = None,
    **options: Any,
) -> dict[str, nn.Parameter]:
    """Replace the mixers of some layers of a Hugging Face hybrid by M2RNN layers, in place.

    Families: Qwen3-Next, Qwen3.5 (dense and mixture of experts), Granite-4 hybrid, Bamba, Nemotron-H; recurrent and
    attention mixers. The new layers keep their state in the model's own cache, for ``generate`` with beams and padding
    too. config.json records the swap; ``load_swapped`` reads such a model, and so do transformers' Auto classes with
    ``trust_remote_code=True``. Without it they refuse its weights.

    The start: a layer in the place of a recurrent mixer gets its sizes, unless ``options`` name others, and takes
    over its input projection, convolution and forget gate, with W = 0, where both are nearly the same function (see
    ``m2rnn.convert.takeover``). Without ``calibration`` the new output projection is zero, so the model begins as
    itself without the mixer. With it, each new layer is fitted to the mixer that it replaces, on the inputs that this
    one sees: all of its parameters by ``steps`` steps of AdamW, then the output projection by ridge regression.

    Args:
        model: changed in place.
        layers: their numbers, from 0.
        calibration: batches of typical text, token ids ``[B, T]`` or keyword arguments of the model (with an
            attention mask); a few thousand tokens or more.
        steps: of AdamW for each layer, if there is calibration; 0 fits the output projection alone.
        display: shows progress.
        **options: arguments of ``M2RNN`` besides ``hidden_size``, for all these layers; ``value_dim`` alone splits
            the replaced mixer's value heads, by default into heads of 16.

    Returns:
        The new parameters by their names in ``model.named_parameters()``, such as for a learning rate of their own.

    Raises:
        ValueError: for a family, a layer or an option that there is not, naming it; nothing is changed then.
    """
    config, numbers = text_config_of(model), list(layers)
    for layer in numbers:
        if isinstance(mixer_of(model, layer), SwappedMixer):
            raise ValueError(f"layer {layer} is an M2RNN layer already")
    if len(set(numbers)) != len(numbers) or not numbers:
        raise ValueError(f"layers must name each layer once, and at least one, got {numbers}")
    left = [i for i, kind in enumerate(config.layer_types) if kind == ATTENTION and i not in numbers]
    if not left:
        raise ValueError("one attention layer must stay: transformers' cache counts the tokens there")
    if isinstance(calibration, Mapping):
        raise ValueError("calibration must be a list of batches, got one batch: put it in a list")
    batches = None if calibration is None else [_as_inputs(batch) for batch in calibration]
    if batches == []:
        raise ValueError("calibration has no batches")
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    full = {layer: options_like(mixer_of(model, layer), options) for layer in sorted(numbers)}
    new = {layer: new_layer(model, layer, full[layer]) for layer in full}
    for layer, m2rnn in new.items():
        take_over(mixer_of(model, layer), m2rnn)
        if batches is not None:
            fit(model, mixer_of(model, layer), m2rnn, batches, steps, display or Display(), f"layer {layer}")
        mixer = SwappedMixer(m2rnn, layer)
        for module in mixer.modules():
            module._is_hf_initialized = True  # type: ignore[assignment] # otherwise post_init would start it anew
        put_mixer(model, layer, mixer)
        _record(model.config, layer, full[layer])
    if type(model) is getattr(transformers, type(model).__name__, None):
        model.__class__ = swapped_class(type(model).__name__)
        model.config.auto_map = auto_map_of(model.config)
    made = {id(parameter) for m2rnn in new.values() for parameter in m2rnn.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in made}


def swapped_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all swapped layers, by their names in ``model.named_parameters()``."""
    inside = {id(p) for module in model.modules() if isinstance(module, SwappedMixer) for p in module.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in inside}


def load_swapped(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """A model that ``swap`` has changed and ``save_pretrained`` has saved.

    Args:
        path: its folder, or its name on the Hugging Face Hub.
        **kwargs: of ``from_pretrained``, such as ``dtype``, ``device_map`` and ``revision``. Only safetensors are read,
            and no code that comes with the model is run.

    Raises:
        ValueError: if the model records no swap, or is of a class that transformers does not have.
    """
    config = AutoConfig.from_pretrained(path, **{name: kwargs[name] for name in WHERE if name in kwargs})
    if not getattr(config, RECORD, None):
        raise ValueError(f"{path} records no swapped layers (config.json has no {RECORD!r}): use from_pretrained")
    name = (config.architectures or [""])[0]
    try:
        model_class = swapped_class(name)
    except ValueError as error:
        message = f"{path}: config.json names the architecture {name!r}, which transformers does not have"
        raise ValueError(message) from error
    model: PreTrainedModel = model_class.from_pretrained(path, use_safetensors=True, **kwargs)
    return model


def _as_inputs(batch: Tensor | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(batch, Mapping):
        return dict(batch)
    if not isinstance(batch, Tensor) or batch.dim() != 2:
        got = f"a tensor {list(batch.shape)}" if isinstance(batch, Tensor) else repr(batch)
        raise ValueError(f"calibration's batches must be token ids [B, T] or keyword arguments of the model, got {got}")
    return {"input_ids": batch}


def _record(config: PreTrainedConfig, layer: int, options: Mapping[str, Any]) -> None:
    setattr(config, RECORD, {**(getattr(config, RECORD, None) or {}), str(layer): dict(options)})
