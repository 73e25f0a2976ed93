"""Arguments that a model's forward does not name: transformers' own are let through, a mistake is an error."""

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from torch import nn
from transformers.utils.generic import TransformersKwargs

#: What transformers, PEFT, TRL and tokenizers pass to every model, without an effect on these ones
WITHOUT_EFFECT = frozenset(
    {
        "cache_position",  # the cache counts
        "cu_seq_lens_k",  # as cu_seq_lens_q
        "is_causal",
        "logits_to_keep",  # of the model without a head
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",  # of the model without a head
        "output_attentions",
        "return_dict",
        "seq_idx",  # beside cu_seq_lens_q or position_ids
        "token_type_ids",
        "tokenizer",  # generate passes its own on, as with stop_strings and in `transformers serve`
        *TransformersKwargs.__optional_keys__,
    }
)


def check_others(model: nn.Module, others: Mapping[str, Any], packed: bool, more: tuple[str, ...] = ()) -> None:
    """Raise an error for arguments that ``model.forward`` would leave unheard.

    Args:
        others: what forward got besides its named arguments. None always passes: it asks for nothing.
        packed: whether ``cu_seq_lens_q`` or ``position_ids`` is given.
        more: names that the caller reads from ``others``.

    Raises:
        TypeError: for an unknown name, with the nearest known one.
        ValueError: for a known name with a value that these models cannot follow.
    """
    for name, value in others.items():
        if value is not None and name not in WITHOUT_EFFECT and name not in more:
            known = [*inspect.signature(type(model).forward).parameters, *more]
            known = [each for each in known if each not in ("self", "kwargs")]
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise TypeError(
                f"{type(model).__name__}.forward has no argument {name!r}: {hint}It takes {', '.join(known)}"
            )
    wanted = others.get("output_attentions")
    if model.config.output_attentions if wanted is None else wanted:  # type: ignore[union-attr]
        raise ValueError(
            "output_attentions True: expected False, since these models never form attention weights: recurrent layers "
            "have none, and attention runs as one fused operator"
        )
    if others.get("is_causal") is False:
        raise ValueError("is_causal False: expected True, since no layer sees later tokens")
    if others.get("seq_idx") is not None and not packed:
        raise ValueError("seq_idx alone packs nothing: give cu_seq_lens_q, the boundaries of the packed sequences")
