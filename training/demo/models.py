"""The architectures of the demo pair's three models and the settings under which they are trained."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig

from training.demo.tokenizer import EOS_ID, MAX_LENGTH, VOCAB_SIZE


@dataclass(frozen=True)
class Recipe:
    """One model's shape and training: ``rows`` x ``row_tokens`` tokens in each step.

    ``passes``: steps of each pass, over texts of its own; the learning rate starts anew in each. ``tied``: the LM head
    is the embedding.
    """

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    passes: tuple[int, ...]
    rows: int
    row_tokens: int
    learning_rate: float
    seed: int
    tied: bool
    vocab_size: int = VOCAB_SIZE

    def parameters(self) -> int:
        """How many parameters the model has."""
        d = self.hidden_size
        layer = 4 * d * d + 3 * d * self.intermediate_size + 2 * d
        return (1 if self.tied else 2) * self.vocab_size * d + self.layers * layer + d

    def config(self) -> LlamaConfig:
        """The Hugging Face configuration."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            head_dim=self.hidden_size // self.heads,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=None,
            eos_token_id=EOS_ID,
            pad_token_id=None,
            tie_word_embeddings=self.tied,
        )


BASE_RECIPE = Recipe(
    hidden_size=128,
    intermediate_size=384,
    layers=4,
    heads=4,
    passes=(1800,),
    rows=8,
    row_tokens=256,
    learning_rate=3e-3,
    seed=1,
    tied=True,
)
CODES_RECIPE = Recipe(
    hidden_size=192,
    intermediate_size=512,
    layers=4,
    heads=3,
    passes=(1500,),
    rows=8,
    row_tokens=256,
    learning_rate=2e-3,
    seed=2,
    tied=False,
)
ARITHMETIC_RECIPE = Recipe(
    hidden_size=192,
    intermediate_size=512,
    layers=3,
    heads=3,
    passes=(1200, 450),
    rows=16,
    row_tokens=128,
    learning_rate=2e-3,
    seed=3,
    tied=True,
)
