"""Several texts in a row: the loss and what is learned are what they are without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MambaConfig, MambaForCausalLM

from tests.training.builders import TinyProject, save_model
from tests.training.test_pipeline import tensors
from training.checkpoints import forward, load_causal
from training.data import TokenExample
from training.errors import SettingsError
from training.packing import check_apart, packed, rows_of
from training.scoring import gold_logp, padded
from training.stages import train

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_rows_hold_every_example_once_and_are_no_longer_than_the_longest(lengths: list[int]) -> None:
    rows = rows_of(range(len(lengths)), lengths)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert max(sum(lengths[number] for number in row) for row in rows) == max(lengths)
    fullest = sorted(sum(lengths[number] for number in row) for row in rows)
    assert len(rows) < 2 or fullest[0] + fullest[1] > max(lengths)


@pytest.mark.parametrize("gpt2", [False, True])
def test_gold_tokens_have_the_probabilities_that_they_have_alone(tmp_path: Path, gpt2: bool) -> None:
    """Rotary positions and learned ones; a row of three, and one with padding."""
    model = load_causal(save_model(tmp_path / "model", gpt2=gpt2))
    check_apart(model, 257, CPU)
    found = [
        [TokenExample([1, 2, 3], [4, 5]), TokenExample([6], [7]), TokenExample([8, 9], [10, 11, 12])],
        [TokenExample([2, 3], [4])],
    ]
    tokens_BT, where_BT, positions_BT = packed(found)
    with torch.no_grad():
        together_N = gold_logp(forward(model, tokens_BT, positions_BT)[1], tokens_BT, where_BT, 257)
        alone = []
        for example in (each for row in found for each in row):
            ids_BT, predicting_BT = padded([example])
            alone.append(gold_logp(forward(model, ids_BT)[1], ids_BT, predicting_BT, 257))
    torch.testing.assert_close(together_N, torch.cat(alone))


def test_packed_training_ends_with_the_same_weights(tiny: TinyProject) -> None:
    tiny.content["train"]["mode"] = "joint"
    tiny.content["train"]["joint"] |= {"batch_size": 24, "clip": 100.0}
    plain = tensors(train.train_run(tiny.project, "collm", 0))
    tiny.content["train"]["joint"]["packing"] = True
    for name, tensor in tensors(train.train_run(tiny.project, "collm", 0)).items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-5)


def test_a_state_that_goes_through_the_row_is_refused() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "initializer_range": 0.3}
    with pytest.raises(SettingsError, match=r"train\.joint\.packing: this base sees other texts in a row"):
        check_apart(MambaForCausalLM(MambaConfig(**sizes)), 64, CPU)
