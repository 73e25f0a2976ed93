"""Models whose layers lie in several places compute what they compute in one."""

from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from m2rnn.models import M2RNNForCausalLM
from tests.models.small import CONFIGS, VOCAB, make
from tests.tolerances import assert_close


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_offloaded_to_the_disk_compute_the_same(name: str, tmp_path: Path) -> None:
    """Accelerate fetches a module's weights when it is called, so every module must be."""
    model = make(name, torch.float32)
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "cpu")
    places |= {f"model.layers.{layer}": "disk" for layer in range(len(model.config.mixers))}
    loaded = M2RNNForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert loaded.model.layers[0].mixer.in_proj.weight.is_meta
    ids = torch.randint(3, VOCAB, (2, 5))
    arguments = {"max_new_tokens": 5, "min_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    for cache in ("dynamic", "static"):
        found, expected = (
            m.generate(ids, cache_implementation=cache, disable_compile=True, **arguments) for m in (loaded, model)
        )
        assert torch.equal(found.sequences, expected.sequences)
        assert_close(torch.stack(found.logits), torch.stack(expected.logits), torch.float32, "output")


@pytest.mark.parametrize("name", ["m2rnn", "hybrid", "rnn", "rope", "window"])
def test_what_goes_with_the_tokens_follows_them_to_another_device(name: str) -> None:
    """The meta device stands for a second GPU: it computes nothing, but no operation mixes it with the CPU."""
    model, ids = make(name), torch.randint(3, VOCAB, (2, 5))
    for module in (*model.model.layers[1:], model.model.norm, model.lm_head):
        add_hook_to_module(module.to("meta"), AlignDevicesHook("meta", skip_keys=model._skip_keys_device_placement))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 1, 1]])
    for arguments in (
        {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True},
        {"input_ids": ids, "attention_mask": mask, "labels": ids},
        {"input_ids": ids[:1], "cu_seq_lens_q": torch.tensor([0, 2, 5])},
        {"input_ids": ids, "labels": ids, "num_items_in_batch": torch.tensor(9)},
    ):
        outputs = model(**arguments)
        assert outputs.logits.is_meta
        assert outputs.loss is None or outputs.loss.is_meta
        assert not outputs.past_key_values.layers[0].state[0].is_meta
        cached = model(
            ids[:1, :1].expand(outputs.past_key_values.batch_size, 1), past_key_values=outputs.past_key_values
        )
        assert cached.logits.is_meta
