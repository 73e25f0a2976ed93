"""Models whose layers lie in several places compute what they compute in one."""

from pathlib import Path

import pytest
import torch

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
