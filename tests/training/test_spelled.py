"""A gate for an expert with a vocabulary of its own: its scores, what the loss leaves out, and the whole pipeline."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.checkpoints import Checkpoint
from engine.gate import GateArtifact
from tests.training.builders import EOS, TinyProject, write_jsonl
from training.__main__ import main
from training.losses import Tokens, marginal, priced, weak
from training.scoring import ModelScores, PairScores
from training.stages.score import score_split

MERGES = [("a", "b"), ("Ġ", "a"), ("c", "d"), ("ab", "cd"), ("Ġ", "e")]


def save_expert(folder: Path) -> None:
    """Another byte-level vocabulary, whose end of text has another id and whose tokens are longer."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), EOS, *(a + b for a, b in MERGES)]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS).save_pretrained(folder)
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(words) + 3, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=None, eos_token_id=256, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture
def spelled(tmp_path: Path) -> TinyProject:
    tiny = TinyProject.make(tmp_path)
    save_expert(tmp_path / "own")
    tiny.content["experts"] = [{"name": "own", "model": str(tmp_path / "own")}]
    return tiny


def brute(folder: Path, prompt: str, text: str) -> tuple[list[float], set[int]]:
    """log M at every offset of a text, by the whole vocabulary and a forward pass for every token; and the offsets at
    which the model's tokens end.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    strings = {token: name.replace("Ġ", " ") for name, token in tokenizer.get_vocab().items() if name != EOS}
    own = tokenizer.encode(text).ids
    ids, log, at = tokenizer.encode(prompt).ids, 0.0, 0
    found, ends = [0.0] * (len(text) + 1), {0}
    for token in own:
        with torch.no_grad():
            row = model(torch.tensor([ids])).logits[0, -1].double()
        row = row[[*range(256 + 1 + len(MERGES))]].softmax(-1)
        for length in range(1, len(strings[token]) + 1):
            prefix = text[at : at + length]
            found[at + length] = log + math.log(
                sum(float(row[t]) for t, string in strings.items() if string.startswith(prefix))
            )
        log += math.log(float(row[token]))
        at += len(strings[token])
        found[at] = log
        ends.add(at)
        ids.append(token)
    return found, ends


def test_scores_are_ratios_of_prefix_masses(spelled: TinyProject) -> None:
    rows = [
        {"prompt": "say abcd", "completion": " abcd ef!"},
        {"prompt": "say a", "completion": "abab cd e", "complete": False},
        {"prompt": "x", "completion": " ac"},
    ]
    write_jsonl(spelled.folder / "train.jsonl", rows)
    scores = score_split(spelled.project, "train")
    (expert,) = scores.experts
    assert expert.aligned_N is not None
    for number, row in enumerate(rows):
        begin, end = scores.starts[number : number + 2]
        text = str(row["completion"])
        masses, ends = brute(spelled.folder / "own", str(row["prompt"]), text)
        count = len(text)
        # The base's tokens are single bytes.
        wanted = [b - a for a, b in itertools.pairwise(masses)]
        torch.testing.assert_close(expert.logp_N[begin : begin + count], torch.tensor(wanted), atol=1e-3, rtol=1e-3)
        aligned = expert.aligned_N[begin : begin + count].tolist()
        # A word begins at the beginning, at a space behind something else, and at a mark behind a letter.
        words = [at == 0 or (text[at] in " !" and text[at - 1].isalpha()) for at in range(count)]
        assert aligned == [at in ends and words[at] for at in range(count)]
        if row.get("complete", True):
            assert end == begin + count + 1
            assert bool(expert.aligned_N[end - 1])


def tokens_of(aligned: list[list[bool]] | None, gate: torch.Tensor) -> Tokens:
    return Tokens(
        gate_NK=gate,
        base_logp_N=torch.tensor([-1.0, -2.0, -0.5]),
        expert_logp_NK=torch.tensor([[-0.1], [-3.0], [-0.2]]),
        label_N=torch.tensor([1, 0, 1]),
        aligned_NK=None if aligned is None else torch.tensor(aligned),
    )


@pytest.mark.parametrize("loss", [marginal, priced(marginal, 0.3), weak], ids=["marginal", "priced", "weak"])
def test_a_position_where_no_expert_is_asked_teaches_the_gate_nothing(loss) -> None:  # type: ignore[no-untyped-def]
    gate = torch.tensor([[0.3], [-0.2], [0.9]], requires_grad=True)
    loss(tokens_of([[True], [True], [False]], gate), 2.0).backward()
    assert gate.grad is not None
    assert float(gate.grad[2].abs()) < 1e-6
    assert float(gate.grad[:2].abs().min()) > 1e-3
    # Where all are asked everywhere it is the loss as ever.
    everywhere = loss(tokens_of([[True]] * 3, gate), 2.0)
    torch.testing.assert_close(everywhere, loss(tokens_of(None, gate), 2.0))


def test_the_base_s_own_probability_counts_there() -> None:
    gate = torch.zeros(3, 1)
    assert float(marginal(tokens_of([[False]] * 3, gate))) == pytest.approx(3.5 / 3)


def test_positions_are_chosen_with_their_scores() -> None:
    own = ModelScores(torch.zeros(3), torch.zeros(3), None, None, torch.tensor([True, False, True]))
    other = ModelScores(torch.zeros(3), torch.zeros(3), None)
    pair = PairScores(torch.zeros(3), [0, 2, 3], own, (own, other)).of_examples([1])
    assert pair.aligned_NK is not None
    assert pair.aligned_NK.tolist() == [[True, True]]
    assert PairScores(torch.zeros(3), [0, 3], other, (other,)).aligned_NK is None


@pytest.mark.usefixtures("fake_pair")
def test_the_pipeline_makes_a_gate_for_the_pair(spelled: TinyProject) -> None:
    assert main(["pipeline", "--config", str(spelled.write())]) == 0
    file = next((spelled.folder / "out" / "pair").glob("**/gate.json"))
    artifact = GateArtifact.load(file.parent)
    (identity,) = artifact.expert_identities
    own, base = Checkpoint(spelled.folder / "own"), Checkpoint(spelled.folder / "base")
    assert identity is not None
    assert identity.tokenizer_sha256 == own.identity.tokenizer_sha256 != base.identity.tokenizer_sha256
    artifact.check_fits(base, [own])
    assert "own" in json.loads(file.read_text())["experts"]


def test_blends_of_one_vocabulary_are_refused_before_anything_runs(
    spelled: TinyProject, capsys: pytest.CaptureFixture[str]
) -> None:
    spelled.content["evaluate"]["strategies"] = ["union", "veto", "mixture"]
    assert main(["score", "--config", str(spelled.write())]) == 1
    assert (
        "evaluate.strategies: mixture is for members of one vocabulary, and own has its own" in capsys.readouterr().err
    )
    assert not (spelled.folder / "out" / "score").exists()
    spelled.content["evaluate"]["strategies"] = ["union", "veto", "characters"]
    spelled.project.check()


def test_a_regret_is_refused_before_anything_runs(spelled: TinyProject, capsys: pytest.CaptureFixture[str]) -> None:
    spelled.content["regret"] = {"ahead": 2}
    assert main(["score", "--config", str(spelled.write())]) == 1
    assert "regret.ahead: own has a vocabulary of its own" in capsys.readouterr().err
    assert not (spelled.folder / "out" / "score").exists()
