"""PEFT: no adapter is bypassed, in training, a whole pass and decoding; prompt tuning; prefix tuning is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m2rnn.layers.projection import is_plain_linear
from m2rnn.models import M2RNNCache, M2RNNForCausalLM
from m2rnn.models.cache import CACHE_NAME
from tests.models.small import CONFIGS, VOCAB, make
from tests.tolerances import assert_close

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")  # PEFT's


def with_lora(name: str, **options: Any) -> Any:
    """A model with an adapter at every linear layer, which is no identity."""
    torch.manual_seed(2)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **options)
    return peft.get_peft_model(make(name, torch.float32), lora).eval()


def adapters(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}


def decoded(model: nn.Module, ids: Tensor, static: bool) -> Tensor:
    """Logits of the last tokens, a token at a time after a prompt of three."""
    cache = M2RNNCache(len(model.config.mixers), ids.shape[1] if static else None)
    model(ids[:, :3], **{CACHE_NAME: cache}, use_cache=True)
    tokens = ids[:, 3:].split(1, 1)
    return torch.cat([model(token, **{CACHE_NAME: cache}, use_cache=True).logits.clone() for token in tokens], 1)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_adapters_at_all_linear_layers_are_heard_in_a_whole_pass_and_in_decoding(name: str) -> None:
    model, ids = with_lora(name), torch.randint(3, VOCAB, (2, 7))
    linear = {path for path, module in make(name).named_modules() if isinstance(module, nn.Linear)}
    assert {path.removeprefix("base_model.model.") for path in adapters(model)} == linear - {"lm_head"}
    whole = model(ids).logits
    for static in (False, True):
        assert_close(decoded(model, ids, static), whole[:, 3:], torch.float32, "output", f"static {static}")
    with model.disable_adapter():
        without = decoded(model, ids, False)
    weights = {path: layer.lora_B["default"].weight.clone() for path, layer in adapters(model).items()}
    for path, layer in adapters(model).items():
        for other, weight in weights.items():
            adapters(model)[other].lora_B["default"].weight.copy_(weight if other == path else 0 * weight)
        assert (decoded(model, ids, False) - without).abs().max() > 1e-5, path
        assert not is_plain_linear(layer), path
    for path, weight in weights.items():
        adapters(model)[path].lora_B["default"].weight.copy_(weight)
    merged = model.merge_and_unload()
    assert isinstance(merged, M2RNNForCausalLM)
    assert_close(merged(ids).logits, whole, torch.float32, "output")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_adapter_learns_and_an_adapter_on_the_head_is_in_the_loss(name: str, tmp_path: Path) -> None:
    model, ids = with_lora(name).train(), torch.randint(3, VOCAB, (2, 7))
    model(ids, labels=ids).loss.backward()
    learnt = {path: p.grad for path, p in model.named_parameters() if p.requires_grad}
    assert set(learnt) == {path for path, _ in model.named_parameters() if "lora_" in path}
    assert all(gradient.norm() > 0 for gradient in learnt.values()), learnt
    model.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make(name, torch.float32), tmp_path)
    assert_close(again(ids).logits, model(ids).logits, torch.float32, "output")


def test_an_adapter_on_the_head_is_in_the_loss() -> None:
    torch.manual_seed(2)
    ids = torch.randint(3, VOCAB, (2, 7))
    lora = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(make("m2rnn", torch.float32), lora)
    expected = nn.functional.cross_entropy(model.eval()(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_close(model.train()(ids, labels=ids).loss, expected, torch.float32, "output")


@pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning")
@pytest.mark.parametrize("name", ["m2rnn", "hybrid", "moe", "rnn"])
def test_prompt_tuning_learns_and_generates(name: str) -> None:
    torch.manual_seed(2)
    # Mixers with different numbers of heads and no attention have no number to tell, which is not used either
    heads = {"num_attention_heads": 1} if name == "rnn" else {}
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **heads)
    model, ids = peft.get_peft_model(make(name, torch.float32), prompt), torch.randint(3, VOCAB, (2, 5))
    model.train()(ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    assert model.prompt_encoder["default"].embedding.weight.grad.norm() > 0
    model.eval()
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments)
    base = model.get_base_model()
    virtual = model.prompt_encoder["default"].embedding.weight.detach().expand(2, -1, -1)
    embedded = torch.cat([virtual, base.get_input_embeddings()(ids)], 1)
    expected = base.generate(inputs_embeds=embedded, attention_mask=torch.ones(2, 8).long(), **arguments)
    assert torch.equal(found[:, -4:], expected[:, -4:])


def test_prefix_tuning_is_refused_by_name() -> None:
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, ids = peft.get_peft_model(make("hybrid", torch.float32), prefix), torch.randint(3, VOCAB, (2, 5))
    with pytest.raises(ValueError, match="take prompt tuning"):
        model(ids, attention_mask=torch.ones_like(ids), labels=ids)
