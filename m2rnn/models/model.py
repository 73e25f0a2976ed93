"""The model in one file: block, stack, initialisation, language-model head."""
# transformers' methods and decorators carry no types, its class attributes are lists that nobody changes:
# mypy: disable-error-code="no-untyped-call, untyped-decorator"
# ruff: noqa: RUF012

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CompileConfig,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
)
from transformers.utils.generic import can_return_tuple

from m2rnn.layers import Attention, OutputProjection, Packing
from m2rnn.layers.attention import RotaryTables, positions_of, rotary_tables
from m2rnn.layers.moe import Experts, MoE
from m2rnn.layers.state import decodes
from m2rnn.models.arguments import check_others
from m2rnn.models.cache import CACHE_NAME, M2RNNCache
from m2rnn.models.capture import CapturedDecoding
from m2rnn.models.config import MIXERS, MLPS, M2RNNConfig
from m2rnn.models.loss import IGNORED, LanguageModelHead, chunked_cross_entropy
from m2rnn.models.own_cache import own_cache

COMPILED_VERSIONS = 8  # of one function, dynamo's default: then it runs uncompiled


class M2RNNBlock(GradientCheckpointingLayer):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: M2RNNConfig, layer: int) -> None:
        super().__init__()
        mixer, mlp = config.mixers[layer], config.mlps[layer]
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = MIXERS[mixer](config.hidden_size, **config.mixer_options.get(mixer, {}))
        mlp_class = MLPS[mlp]
        self.mlp = None
        if mlp_class is not None:
            self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = mlp_class(config.hidden_size, **config.mlp_options.get(mlp, {}))
        if isinstance(self.mlp, MoE):
            self.mlp.experts.config = config  # whose implementation of experts transformers changes
        self._kinds = len(set(zip(config.mixers, config.mlps, strict=True)))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As of any module; arguments are those of ``torch.compile``.

        Dynamo counts the compiled versions of a function and gives up at the ninth. All blocks have one function, of
        which each kind (of mixer and MLP) needs its own versions: for training and evaluation, for fixed and changing
        lengths, for one token. So each kind may have eight.
        """
        import torch._dynamo.config as dynamo  # late, since it takes a second

        limit = max(dynamo.recompile_limit, COMPILED_VERSIONS * self._kinds)
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            kwargs.setdefault("recompile_limit", limit)
        else:  # older versions of torch know one limit for all functions
            dynamo.recompile_limit = limit
        super().compile(*args, **kwargs)

    def forward(
        self,
        hidden: Tensor,
        state: Any = None,
        packing: Packing | None = None,
        position_ids: Tensor | None = None,
        output_state: bool = True,
        output_routing: bool = False,
        rotary: RotaryTables | None = None,
    ) -> tuple[Tensor, Any, Tensor | None, Tensor | None]:
        """The output, the mixer's state and, if there are experts and it is wanted, the routers' loss and logits."""
        options: dict[str, Any] = {"position_ids": position_ids, "output_state": output_state}
        if rotary is not None:  # of an attention layer
            options["rotary"] = rotary
        mixed, state = self.mixer(self.mixer_norm(hidden), state, packing, **options)
        hidden = hidden + mixed
        routing = None
        if isinstance(self.mlp, MoE):
            y, routing = self.mlp(self.mlp_norm(hidden), output_routing)
            hidden = hidden + y
        elif self.mlp is not None:
            hidden = hidden + self.mlp(self.mlp_norm(hidden))
        if routing is None:
            return hidden, state, None, None
        return hidden, state, routing.loss, routing.logits  # flat: reentrant checkpoints see only tensors here


class M2RNNPreTrainedModel(PreTrainedModel):
    """What the models share: how weights start and how transformers may place them."""

    config_class = M2RNNConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["M2RNNBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Start the module's own parameters; transformers' marks keep those that a checkpoint has set."""
        std = self.config.initializer_range
        narrow = std / math.sqrt(2 * self.config.num_hidden_layers)
        if isinstance(module, OutputProjection):
            init.normal_(module.weight, 0, narrow)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, 0, std)
            init.normal_(module.down_proj, 0, narrow)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, 0, std if self.config.embedding_range is None else self.config.embedding_range)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, 0, std)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for its decorator in this file, and it is in that of the layer

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing for this library's classes, which ``auto_map`` names: transformers would save copies of our files."""
        if not cls.__module__.startswith("m2rnn."):
            super().register_for_auto_class(auto_class)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters to spare from weight decay, such as ``A_log``, ``dt_bias`` and ``D``."""
        spared = {
            f"{module_name}.{name}"
            for module_name, module in self.named_modules()
            for name in getattr(module, "_no_weight_decay", ())
        }
        return spared & {name for name, _ in self.named_parameters()}


@dataclass
class M2RNNModelOutput(BaseModelOutputWithPast):
    """With, for mixtures of experts, the sum of the layers' auxiliary losses and their routers' logits.

    Attributes:
        aux_loss: one number; None unless training or with router logits.
        router_logits: ``[B · T, experts]`` for each layer that has experts, zeros in padding; None unless wanted.
    """

    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


class M2RNNModel(M2RNNPreTrainedModel):
    """Embedding, blocks and final RMSNorm."""

    def __init__(self, config: M2RNNConfig) -> None:
        config.check_layers()
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(M2RNNBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
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
        output_router_logits: bool | None = None,
        packing: Packing | Literal["find"] | None = "find",
        cache: M2RNNCache | None = None,
        **kwargs: Any,
    ) -> M2RNNModelOutput:
        """Hidden states of every token; padding and packing give exactly those of each sequence alone.

        Args:
            input_ids: ``[B, T]``, or ``inputs_embeds`` ``[B, T, hidden_size]``.
            attention_mask: padding mask, 0 at slots to skip, anywhere in a row: ``[B, T]``, or
                ``[B, past + T]`` with a cache. Outputs at skipped slots are zero.
            position_ids: ``[B, T]`` or ``[1, T]``, for rotary attention; by default each sequence counts from
                0. In one row without mask and earlier tokens, a position that does not follow the one before it
                starts a new packed sequence; in several rows it is an error.
            past_key_values: the cache of an earlier call; an empty ``DynamicCache`` becomes one.
            use_cache: whether to return the cache; by default if one is given, or ``config.use_cache`` when
                not training.
            cu_seq_lens_q: int ``[N + 1]``, boundaries of the sequences packed in a batch of one row; wins
                over the mask.
            output_hidden_states: also return the input of every layer and the final output; the layers compute from
                these tensors, so that ``retain_grad`` on one gives its gradient.
            output_router_logits: also return the logits of the routers of mixtures of experts.
            packing: what ``layout_of`` finds in the mask, ``cu_seq_lens_q`` and positions, if already known.
            cache: another name of past_key_values, transformers' own since 5.24.
            **kwargs: other arguments that transformers passes to models, such as ``token_type_ids``; without effect.

        Raises:
            TypeError: for an argument that neither this method nor transformers knows, naming the nearest one.
            ValueError: for inputs that contradict each other, and for ``output_attentions=True``.
        """
        check_others(self, kwargs, cu_seq_lens_q is not None or position_ids is not None)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        assert inputs is not None
        cache = _one_cache(past_key_values, cache, len(self.layers))
        if packing == "find":
            packing = layout_of(inputs, attention_mask, cu_seq_lens_q, position_ids, cache)
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and not self.training)
        if cache is None and use_cache:
            cache = M2RNNCache(self.config.num_hidden_layers)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits

        rows, steps = hidden.shape[:2] if packing is None else (packing.rows, packing.width)
        if cache is not None and len(cache.layers) != len(self.layers):
            raise ValueError(f"past_key_values is for {len(cache.layers)} layers, but the model has {len(self.layers)}")
        if cache is not None and cache.batch_size not in (-1, rows):
            raise ValueError(f"past_key_values holds {cache.batch_size} sequences, but the new tokens are of {rows}")
        padded = packing if packing is not None and not packing.right_padded else None
        if padded is not None:
            packing = padded.aligned
            hidden = padded.pack(hidden)
            if position_ids is not None:
                position_ids = padded.pack(position_ids.expand(padded.rows, -1))

        def unpacked(hidden: Tensor) -> Tensor:
            return hidden if padded is None else padded.pad(hidden)

        # A static cache moves on in place, so not if it is to stay as it is
        decoding = use_cache and decodes(hidden, packing)
        if cache is not None and decoding:
            cache.check_room()
        hidden_states, aux_losses, router_logits = [], [], []
        places = position_ids
        tables: dict[tuple[float, int], RotaryTables] = {}  # made once for all attention layers
        for layer, block in enumerate(self.layers):
            if output_hidden_states:
                hidden_states.append(unpacked(hidden))
                if padded is not None:  # the layer computes from what is returned, so that this has a gradient
                    hidden = padded.to(hidden.device).pack(hidden_states[-1])
            state = None if cache is None else cache.layers[layer].read(decoding)
            mixer, rotary = block.mixer, None
            if isinstance(mixer, Attention) and mixer.rope_theta is not None:
                kind = mixer.rope_theta, mixer.head_dim
                if places is None:
                    places = positions_of(hidden, state, packing)
                if kind not in tables:
                    tables[kind] = rotary_tables(places, mixer.head_dim, mixer.rope_theta, hidden.dtype)
                rotary = tables[kind]
            hidden, state, aux_loss, logits = block(
                hidden,
                state=state,
                packing=packing,
                position_ids=position_ids,
                output_state=use_cache,
                output_routing=self.training or output_router_logits,
                rotary=rotary,
            )
            if aux_loss is not None:
                aux_losses.append(aux_loss)
            if logits is not None and output_router_logits:
                router_logits.append(unpacked(logits.view(*hidden.shape[:2], -1)).flatten(0, 1))
            if cache is not None and use_cache:
                cache.layers[layer].write(state, decoding)
        if cache is not None and use_cache:
            cache.steps += steps
        hidden = unpacked(self.norm(hidden))
        kept: dict[str, Any] = {CACHE_NAME: cache if use_cache else None}
        return M2RNNModelOutput(
            **kept,
            last_hidden_state=hidden,
            hidden_states=(*hidden_states, hidden) if output_hidden_states else None,
            aux_loss=sum(loss.to(hidden.device) for loss in aux_losses) if aux_losses else None,
            router_logits=tuple(router_logits) if router_logits else None,
        )


def _one_cache(past_key_values: Any, cache: Any, num_layers: int) -> M2RNNCache | None:
    if past_key_values is not None and cache is not None:
        raise ValueError("give past_key_values or cache, which are two names of the same thing, not both")
    return own_cache(past_key_values if cache is None else cache, num_layers)


def layout_of(
    inputs: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    position_ids: Tensor | None,
    cache: M2RNNCache | None,
) -> Packing | None:
    """Where sequences lie in ``inputs`` [B, T, ...]; None if each row is one sequence without padding."""
    if inputs.dim() != (3 if inputs.is_floating_point() else 2):
        got = tuple(inputs.shape)
        raise ValueError(f"input_ids must be [B, T], or inputs_embeds [B, T, hidden_size], got shape {got}")
    batch, steps = inputs.shape[:2]
    if position_ids is not None and tuple(position_ids.shape) not in ((batch, steps), (1, steps)):
        got = tuple(position_ids.shape)
        raise ValueError(f"position_ids must be [{batch}, {steps}] or [1, {steps}], got {got}")
    if cu_seq_lens_q is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q packs the sequences of one row, got a batch of {batch}")
        return Packing.from_cu_seqlens(cu_seq_lens_q, steps)
    if attention_mask is not None:
        past = 0 if cache is None else cache.get_seq_length()
        shape = tuple(attention_mask.shape)
        if shape not in ((batch, steps), (batch, past + steps)):
            raise ValueError(
                f"attention_mask must be [{batch}, {steps}] for the new tokens or [{batch}, {past + steps}] "
                f"for all, got {shape}"
            )
        new = attention_mask[:, shape[1] - steps :]
        return None if bool(new.all()) else Packing.from_mask(new)
    if position_ids is not None and (cache is None or cache.get_seq_length() == 0):
        jumps = position_ids.diff(dim=1) != 1
        if batch != 1:
            if bool(jumps.any()):
                raise ValueError(
                    f"position_ids start new sequences inside the rows of a batch of {batch}: pack all sequences in "
                    "one row, or give an attention_mask if positions only jump"
                )
            return None
        starts = jumps[0].nonzero().squeeze(1) + 1
        if starts.numel():
            return Packing.from_cu_seqlens(F.pad(F.pad(starts, (1, 0)), (0, 1), value=steps), steps)
    return None


class M2RNNForCausalLM(M2RNNPreTrainedModel, GenerationMixin):
    """``M2RNNModel`` with a linear head over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: M2RNNConfig) -> None:
        super().__init__(config)
        self.model = M2RNNModel(config)
        self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size)
        # Tells generate() that a recurrent state cannot go back to an earlier token.
        self._is_stateful = any(mixer != "attention" for mixer in config.mixers)
        self._captured = CapturedDecoding()
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
        num_items_in_batch: int | Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        cache: M2RNNCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast:
        """Logits, and the loss if labels are given; other arguments as in ``M2RNNModel.forward``.

        Args:
            labels: ``[B, T]``, usually ``input_ids``: each token's logits predict the label of the next token
                of its own sequence, whatever padding or packing lies between; -100 is ignored.
            num_items_in_batch: what to divide the summed loss by; default the number of labels.
            logits_to_keep: how many of the last time steps to compute logits for (0 for all), or which.
            **kwargs: ``shift_labels`` ``[B, T]``, instead of ``labels``: a token's logits predict the label in its
                place. Others are treated as in ``M2RNNModel.forward``.

        Returns:
            ``loss``, ``logits``, ``past_key_values`` (``cache`` since transformers 5.24), ``hidden_states``. While
            training, ``logits`` is None: the loss makes them a part at a time and drops them. A model with experts also
            returns ``aux_loss`` and ``router_logits``, as ``M2RNNModel.forward`` does. While training, ``loss``
            contains ``config.router_aux_loss_coef · aux_loss``, times the part of ``num_items_in_batch`` that is
            labelled here; in evaluation it is the cross-entropy alone.
        """
        check_others(self, kwargs, cu_seq_lens_q is not None or position_ids is not None, ("shift_labels",))
        # No argument of its own, since Trainer evaluates a loss only for batches that have all arguments named so
        shift_labels: Tensor | None = kwargs.get("shift_labels")
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        cache = _one_cache(past_key_values, cache, self.config.num_hidden_layers)
        packing = None
        if inputs is not None:
            packing = layout_of(inputs, attention_mask, cu_seq_lens_q, position_ids, cache)
        outputs = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            packing=packing,
            output_attentions=False,  # the caller's wish is checked above
        )
        hidden = outputs.last_hidden_state
        if labels is not None and shift_labels is None:
            shift_labels = next_labels(labels, packing)
        loss = logits = None
        if shift_labels is not None:
            loss = chunked_cross_entropy(hidden, shift_labels, self.lm_head, self.config.vocab_size, num_items_in_batch)
            if self.training and outputs.aux_loss is not None:
                aux_loss = self.config.router_aux_loss_coef * outputs.aux_loss.to(loss.device)
                if num_items_in_batch is not None:
                    part = (shift_labels != IGNORED).sum().to(loss.dtype) / num_items_in_batch
                    aux_loss = aux_loss * part.to(loss.device)
                loss = loss + aux_loss
        if shift_labels is None or not self.training:
            if isinstance(logits_to_keep, Tensor):
                hidden = hidden[:, logits_to_keep]
            elif logits_to_keep:
                hidden = hidden[:, -logits_to_keep:]
            logits = self.lm_head(hidden)
        common = {
            "loss": loss,
            "logits": logits,
            CACHE_NAME: getattr(outputs, CACHE_NAME),
            "hidden_states": outputs.hidden_states,
        }
        if "moe" not in self.config.mlps:
            return CausalLMOutputWithPast(**common)
        return MoeCausalLMOutputWithPast(**common, aux_loss=outputs.aux_loss, router_logits=outputs.router_logits)

    def _get_resized_lm_head(self, old_lm_head: nn.Linear, *args: Any, **kwargs: Any) -> nn.Linear:
        """As in transformers, but the new head also sums the loss itself, as FSDP needs."""
        resized: nn.Linear = super()._get_resized_lm_head(old_lm_head, *args, **kwargs)
        if not isinstance(old_lm_head, LanguageModelHead) or isinstance(resized, LanguageModelHead):
            return resized
        with torch.device("meta"):
            head = LanguageModelHead(resized.in_features, resized.out_features)
        head.weight = resized.weight
        head._is_hf_initialized = True  # type: ignore[assignment] # as the one it replaces: post_init keeps it
        return head

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        kind = generation_config.cache_implementation
        if kind is not None and kind != "static" and not kind.startswith("dynamic"):
            raise ValueError(
                f"cache_implementation must be None or 'static', got {kind!r}: the model makes its own cache"
            )
        own_cache(model_kwargs.get(CACHE_NAME), self.config.num_hidden_layers)
        if generation_config.use_cache is False or model_kwargs.get(CACHE_NAME) is not None:
            return
        if kind == "static" and generation_config.prefill_chunk_size == 1:
            raise ValueError(
                "prefill_chunk_size must be at least 2 with a static cache, which takes no mask for one token"
            )
        layers = self.config.num_hidden_layers
        if kind != "static":
            cache = M2RNNCache(layers)
        elif generation_config.return_dict_in_generate:  # the caller keeps it
            cache = M2RNNCache(layers, max_cache_length)
        else:
            cache = self._captured.static_cache(layers, max_cache_length)
        model_kwargs[CACHE_NAME] = cache

    @staticmethod
    def create_masks_for_generate(
        inputs_embeds: Tensor, attention_mask: Tensor | None, is_first_iteration: bool = False, **kwargs: Any
    ) -> Tensor | None:
        """The mask that ``generate`` gives the model with a static cache: none for a generated token, which is real."""
        return None if inputs_embeds.shape[1] == 1 and not is_first_iteration else attention_mask

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable[..., Any]:
        """How ``generate`` calls the model for single tokens with a static cache: in a CUDA graph.

        ``CompileConfig`` asks for torch.compile instead.
        """
        devices = {parameter.device for parameter in self.parameters()}
        if compile_config is not None or {device.type for device in devices} != {"cuda"}:
            return super().get_compiled_call(compile_config)
        if len(devices) > 1:
            return self.__call__  # a graph records the work of one GPU
        if "moe" in self.config.mlps and self.config._experts_implementation == "eager":
            return self.__call__  # its loop over the experts waits for the device, which a graph cannot
        self._captured.start(self)
        return partial(self._captured, self)


def next_labels(labels: Tensor, packing: Packing | None) -> Tensor:
    """For each slot the label of its sequence's next token; -100 at the last one and in padding."""
    padded = packing is not None and not packing.right_padded
    if packing is not None and padded:
        labels = packing.pack(labels)
    labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    if packing is None:
        return labels
    last = F.pad(packing.sequence_ids, (0, 1), value=-1).diff() != 0
    labels = labels.masked_fill(last, IGNORED)
    return packing.pad(labels, IGNORED) if padded else labels


AutoConfig.register("m2rnn", M2RNNConfig)
AutoModel.register(M2RNNConfig, M2RNNModel)
AutoModelForCausalLM.register(M2RNNConfig, M2RNNForCausalLM)
