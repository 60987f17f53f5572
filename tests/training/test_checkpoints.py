"""Models are loaded so that they compute what a serving engine computes."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from training.checkpoints import forward, load_causal


def test_a_soft_cap_in_the_attention_is_kept(tmp_path: Path) -> None:
    """transformers' default attention leaves it out."""
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=64, num_key_value_heads=1, head_dim=8, initializer_range=1.0, **settings)
    config.attn_logit_softcapping = 0.5
    model = Gemma2ForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    tokens_BT = torch.randint(0, 64, (2, 20))
    with torch.no_grad():
        _, found_BTV = forward(load_causal(tmp_path), tokens_BT)
        model.set_attn_implementation("eager")
        capped_BTV = model(input_ids=tokens_BT, use_cache=False).logits
        model.set_attn_implementation("sdpa")
        plain_BTV = model(input_ids=tokens_BT, use_cache=False).logits
    torch.testing.assert_close(found_BTV, capped_BTV)
    assert not torch.allclose(plain_BTV, capped_BTV, atol=1e-3)
