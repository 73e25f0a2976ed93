"""The model in one file: block, stack, initialisation, language-model head."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from m2rnn.layers import Packing
from m2rnn.models.cache import M2RNNCache
from m2rnn.models.config import MIXERS, MLPS, M2RNNConfig
from m2rnn.models.loss import IGNORED, chunked_cross_entropy


class M2RNNBlock(GradientCheckpointingLayer):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: M2RNNConfig, layer: int) -> None:
        super().__init__()
        mixer, mlp = config.mixers[layer], config.mlps[layer]
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = MIXERS[mixer](config.hidden_size, **config.mixer_options.get(mixer, {}))
        self.mlp = None
        if (mlp_class := MLPS[mlp]) is not None:
            self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = mlp_class(config.hidden_size, **config.mlp_options.get(mlp, {}))

    def forward(
        self,
        hidden: Tensor,
        state: Any = None,
        packing: Packing | None = None,
        position_ids: Tensor | None = None,
        output_state: bool = True,
    ) -> tuple[Tensor, Any]:
        mixed, state = self.mixer(
            self.mixer_norm(hidden), state, packing, position_ids=position_ids, output_state=output_state
        )
        hidden = hidden + mixed
        if self.mlp is not None:
            hidden = hidden + self.mlp(self.mlp_norm(hidden))
        return hidden, state


class M2RNNPreTrainedModel(PreTrainedModel):
    """What the models share: how weights start, which stay float32, how transformers may place them."""

    config_class = M2RNNConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["M2RNNBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Called for children before parents, so a block's narrower output projections come last."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, 0, std)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, M2RNNBlock):
            std /= math.sqrt(2 * self.config.num_hidden_layers)
            for name, parameter in module.named_parameters():
                if name.endswith("out_proj.weight"):
                    init.normal_(parameter, 0, std)
        elif type(module).__module__.startswith("m2rnn.layers.") and hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay would harm: ``A_log``, ``dt_bias``, ``D`` of every layer."""
        return {
            f"{module_name}.{name}".removeprefix(".")
            for module_name, module in self.named_modules()
            for name in getattr(module, "_no_weight_decay", ())
        }


class M2RNNModel(M2RNNPreTrainedModel):
    """Embedding, blocks and final RMSNorm."""

    def __init__(self, config: M2RNNConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(M2RNNBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: M2RNNCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        output_hidden_states: bool | None = None,
        packing: Packing | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of every token; padding and packing give exactly those of each sequence alone.

        Args:
            input_ids: ``[B, T]``, or ``inputs_embeds`` ``[B, T, hidden_size]``.
            attention_mask: padding mask, 0 at slots to skip, anywhere in a row: ``[B, T]``, or ``[B, past + T]`` with a
                cache. Outputs at skipped slots are zero.
            position_ids: ``[B, T]`` or ``[1, T]``, for rotary attention; by default each sequence counts from 0. In one
                row without mask and cache, positions that do not go on by one start a new packed sequence.
            past_key_values: the cache of an earlier call.
            use_cache: whether to return the cache; by default if one is given, or ``config.use_cache`` when not
                training.
            cu_seq_lens_q: int ``[N + 1]``, boundaries of the sequences packed in a batch of one row; wins over the mask.
            output_hidden_states: also return the input of every layer and the final output.
            packing: the layout that ``attention_mask`` or ``cu_seq_lens_q`` describe, if already made.
            **kwargs: other arguments that transformers passes to models; ignored.

        Raises:
            ValueError: for inputs that contradict each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is not None and not isinstance(past_key_values, M2RNNCache):
            raise ValueError(f"past_key_values must be an M2RNNCache, got {type(past_key_values).__name__}")
        if self.gradient_checkpointing and self.training:
            use_cache = False
        elif use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not self.training)
        cache = M2RNNCache(len(self.layers)) if past_key_values is None and use_cache else past_key_values

        steps = hidden.shape[1]
        layout = packing or layout_of(
            hidden.shape[:2], attention_mask, cu_seq_lens_q, position_ids, past_key_values
        )
        padded = layout is not None and not layout.right_padded
        aligned = layout.aligned if layout is not None else None
        if padded:
            hidden = layout.pack(hidden)
            if position_ids is not None:
                position_ids = layout.pack(position_ids.expand(layout.rows, -1))

        hidden_states = []
        for layer, block in enumerate(self.layers):
            hidden_states.append(hidden)
            hidden, state = block(
                hidden,
                state=None if cache is None else cache.layers[layer].state,
                packing=aligned,
                position_ids=position_ids,
                output_state=use_cache,
            )
            if use_cache:
                cache.layers[layer].state = state
        if use_cache:
            cache.steps += steps if layout is None else layout.width
        hidden = self.norm(hidden)
        hidden_states.append(hidden)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = hidden_states if output_hidden_states else hidden_states[-1:]
        if padded:
            hidden_states = [layout.pad(hidden) for hidden in hidden_states]
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states[-1],
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
        )


def layout_of(
    shape: tuple[int, int],
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: M2RNNCache | None,
) -> Packing | None:
    """Where sequences lie in a batch of this ``[B, T]`` shape; None if every row is one sequence without padding."""
    batch, steps = shape
    if cu_seq_lens_q is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q packs the sequences of one row, got a batch of {batch}")
        return Packing.from_cu_seqlens(cu_seq_lens_q, steps)
    if attention_mask is not None:
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask.dim() != 2 or attention_mask.shape[0] != batch:
            raise ValueError(f"attention_mask must be [{batch}, time], got {tuple(attention_mask.shape)}")
        if attention_mask.shape[1] not in (steps, past + steps):
            raise ValueError(
                f"attention_mask must cover {steps} new or {past + steps} total steps, got {attention_mask.shape[1]}"
            )
        new = attention_mask[:, attention_mask.shape[1] - steps :]
        return None if bool(new.all()) else Packing.from_mask(new)
    if position_ids is not None and past_key_values is None and batch == 1 and steps:
        starts = (position_ids.diff(dim=1)[0] != 1).nonzero().squeeze(1) + 1
        if starts.numel():
            return Packing.from_cu_seqlens(F.pad(F.pad(starts, (1, 0)), (0, 1), value=steps), steps)
    return None


class M2RNNForCausalLM(M2RNNPreTrainedModel, GenerationMixin):
    """``M2RNNModel`` with a linear head over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: M2RNNConfig) -> None:
        super().__init__(config)
        self.model = M2RNNModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Tells generate() that a recurrent state cannot go back to an earlier token.
        self._is_stateful = any(mixer != "attention" for mixer in config.mixers)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: M2RNNCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seq_lens_q: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss if labels are given; other arguments as in ``M2RNNModel.forward``.

        Args:
            labels: ``[B, T]``, usually ``input_ids``: each token's logits predict the label of the next token of its own
                sequence, whatever padding or packing lies between; -100 is ignored.
            shift_labels: ``[B, T]``, instead of ``labels``: each token's logits predict the label at its own place.
            num_items_in_batch: what to divide the summed loss by; default the number of labels.
            logits_to_keep: how many of the last time steps to compute logits for (0 for all), or their indices.

        Returns:
            ``loss``, ``logits``, ``past_key_values``, ``hidden_states``. While training with labels, ``logits`` is None:
            the loss makes them a part at a time and drops them.
        """
        embedded = input_ids if inputs_embeds is None else inputs_embeds
        packing = None
        if embedded is not None:
            packing = layout_of(
                embedded.shape[:2], attention_mask, cu_seq_lens_q, position_ids, past_key_values
            )
        outputs = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            packing=packing,
        )
        hidden = outputs.last_hidden_state
        if labels is not None and shift_labels is None:
            shift_labels = next_labels(labels, packing)
        loss = logits = None
        if shift_labels is not None:
            loss = chunked_cross_entropy(
                hidden, shift_labels, self.lm_head, self.config.vocab_size, num_items_in_batch
            )
        if shift_labels is None or not self.training:
            if isinstance(logits_to_keep, Tensor):
                hidden = hidden[:, logits_to_keep]
            elif logits_to_keep:
                hidden = hidden[:, -logits_to_keep:]
            logits = self.lm_head(hidden)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} is not offered; "
                "the model makes its own cache"
            )
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = M2RNNCache(self.config.num_hidden_layers)


def next_labels(labels: Tensor, packing: Packing | None) -> Tensor:
    """For each slot the label of its sequence's next token; -100 at the last one and in padding."""
    if packing is None:
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if packing.right_padded:
        shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    else:
        shifted = F.pad(packing.pack(labels)[:, 1:], (0, 1), value=IGNORED)
    last = F.pad(packing.sequence_ids.diff() != 0, (0, 1), value=True)
    shifted = shifted.masked_fill(last, IGNORED)
    return shifted if packing.right_padded else packing.pad(shifted, IGNORED)


AutoConfig.register("m2rnn", M2RNNConfig)
AutoModel.register(M2RNNConfig, M2RNNModel)
AutoModelForCausalLM.register(M2RNNConfig, M2RNNForCausalLM)
