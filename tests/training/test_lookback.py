"""Taking tokens back offline: what shared traces say is what a plain loop with an explicit rewind writes."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pycountry")

import torch
from tokenizers import Tokenizer

from engine.gates import KINDS
from tests.oracle.reference import Pair, hidden_and_logits
from tests.oracle.tiny import tiny_pair
from training.auroc import auroc
from training.demo.corpus import Corpus
from training.demo.lookback import Head, Outcome, Reading, Step, Trace, Writer, labelled, settle
from training.demo.regret import Asked, _oracle, lacking, splits

TOKENIZER = Path(__file__).parents[2] / "models" / "demo" / "base" / "tokenizer.json"
PROMPTS = [[5, 9, 2], [7], list(range(1, 20)), [33, 33, 8, 60], [12, 40]]
LIMIT = 14


@pytest.fixture(scope="module")
def pair() -> Pair:
    return tiny_pair(layers=2)


def policy(_hidden_BD: torch.Tensor, logprobs_BV: torch.Tensor) -> torch.Tensor:
    return logprobs_BV.argmax(-1) % 3 != 0


@torch.inference_mode()
def rewinding(pair: Pair, prompt: list[int], ahead: int, direction_D: torch.Tensor, threshold: float) -> Outcome:
    """One token at a time, the whole text at every step; each position is judged as soon as enough is read."""
    tokens: list[int] = []
    states: list[torch.Tensor] = []
    deferred: list[bool] = []
    drafts: list[int] = []
    settled, revoked = 0, 0
    while True:
        over = tokens[-1:] == [0] or len(tokens) == LIMIT
        if not over:
            state_D, logits_V = hidden_and_logits(pair.base, prompt + tokens)
            states[len(tokens) :], drafts[len(tokens) :] = [state_D], [int(logits_V.argmax())]
        while settled < len(tokens) and (over or settled + ahead < len(states)):
            last = min(settled + ahead, len(states) - 1)
            disputed = deferred[settled] and tokens[settled] != drafts[settled]
            settled += 1
            if disputed and float((states[last] @ direction_D).sigmoid()) > threshold:
                tokens[settled - 1 :], deferred[settled - 1 :] = [drafts[settled - 1]], [False]
                del states[settled:], drafts[settled:]
                revoked += 1
                break
        else:
            if over:
                return Outcome(tuple(tokens), sum(deferred), revoked)
            asked = bool(policy(state_D[None], logits_V.log_softmax(-1)[None])[0])
            said = int(hidden_and_logits(pair.experts[0], prompt + tokens)[1].argmax()) if asked else drafts[-1]
            deferred.append(asked)
            tokens.append(said)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_shared_traces_write_what_a_rewinding_loop_does(ahead: int, pair: Pair) -> None:
    torch.manual_seed(1)
    direction_D = torch.randn(pair.base.config.hidden_size)
    reading = Reading(ahead, numbers=False)

    def rule(_question: int, trace: Trace, index: int) -> float:
        return float((reading(trace, index) @ direction_D).sigmoid())

    writer = Writer(pair.base, pair.experts[0], policy, PROMPTS, eos=0, max_tokens=LIMIT)
    revoked = 0
    for threshold in (0.2, 0.5, 0.9, 1.0):
        found = settle(writer, range(len(PROMPTS)), rule, threshold)
        wanted = [rewinding(pair, prompt, ahead, direction_D, threshold) for prompt in PROMPTS]
        assert [found[number] for number in range(len(PROMPTS))] == wanted
        revoked += sum(outcome.revoked for outcome in wanted)
        assert threshold < 1.0 or not any(outcome.revoked for outcome in wanted)
    assert revoked > len(PROMPTS)


def made_up() -> Trace:
    steps = (
        Step(1, True, 5, 0.5, -2.0, 0.9),
        Step(2, False, 2, 0.6, -0.5, 0.2),
        Step(3, True, 3, 0.7, -0.4, 0.8),
        Step(4, True, 6, 0.8, -3.0, 0.7),
    )
    return Trace((), steps, torch.arange(4.0)[:, None])


def test_what_a_head_reads() -> None:
    trace = made_up()
    odds = torch.logit
    assert trace.disputed == [0, 3]
    assert Reading(0, numbers=True)(trace, 0).tolist() == pytest.approx([0, 0, float(odds(torch.tensor(0.9))), -2.0])
    state, _, _, said, following, sure, mean = Reading(3, numbers=True)(trace, 0).tolist()
    # Two more tokens are read, of which the expert wrote one; the state is that before the fourth.
    assert (state, said) == (3.0, -2.0)
    assert (following, sure) == pytest.approx([float(odds(torch.tensor(p))) for p in (0.8, 0.8)])
    assert mean == pytest.approx(-0.45)
    # The text ends before so much is read.
    assert Reading(3, numbers=False)(trace, 3).tolist() == [3.0]


def test_labels_end_at_the_first_wrong_token() -> None:
    traces = {0: made_up(), 1: made_up()}
    inputs_NI, wrong_N = labelled(traces, [[1, 2, 3, 9], [9, 2, 3, 4]], Reading(0, numbers=False))
    assert inputs_NI[:, 0].tolist() == [0.0, 3.0, 0.0]
    assert wrong_N.tolist() == [False, True, True]


@pytest.mark.parametrize("width", [0, 8])
def test_a_head_learns_and_keeps_what_is_best_on_held_out_examples(width: int) -> None:
    torch.manual_seed(0)
    inputs_NI = 40 + 9 * torch.randn(600, 6)
    labels_N = inputs_NI[:, 1] > 40
    learned, held_out = (inputs_NI[:300], labels_N[:300]), (inputs_NI[300:], labels_N[300:])
    head = Head.fit(learned, held_out, width=width, seed=0)
    assert ((head(held_out[0]) > 0.5) == held_out[1]).float().mean() > 0.9
    # Labels that say the opposite: what is learned makes them worse, and is not kept.
    opposite = (held_out[0], ~held_out[1])

    def loss(of: Head) -> float:
        return float(torch.nn.functional.binary_cross_entropy(of(opposite[0]).detach(), opposite[1].float()))

    assert loss(Head.fit(learned, opposite, width=width, seed=0)) <= loss(Head(learned[0], width, 0)) < loss(head)


def test_the_questions_of_the_experiment_share_no_entity_and_their_codes_are_found() -> None:
    corpus = Corpus.make(0)
    found = splits(corpus)
    entities = {split: {(asked.kind, asked.entity) for asked in examples} for split, examples in found.items()}
    assert sum(map(len, entities.values())) == len(set.union(*entities.values()))
    known = {(entity.kind, entity.name) for entity in corpus.splits["base"]}
    for split in ("validation", "test"):
        assert 0.3 < len(entities[split] & known) / len(entities[split]) < 0.6
    third = {(entity.kind, entity.name) for entity in lacking(corpus, 1)}
    assert third != {(entity.kind, entity.name) for entity in lacking(corpus, 2)}
    assert 0.2 < len(entities["test"] & third) / len(entities["test"]) < 0.45

    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    examples = found["train"] + found["validation"] + found["test"]
    asked = Asked.of(examples, tokenizer)
    for example, gold, codes in zip(examples, asked.gold, asked.codes, strict=True):
        assert len(gold) == len(codes)
        assert not codes[-1]
        # A token may begin with the space before a code.
        pieces = [tokenizer.decode([token]) for token, inside in zip(gold, codes, strict=True) if inside]
        assert "".join(pieces).replace(" ", "").strip(".,") == "".join(example.codes)


def test_the_oracle_takes_back_what_only_the_base_has_right() -> None:
    trace = Trace((7, 8), made_up().steps, torch.arange(4.0)[:, None])
    assert _oracle([[7, 8, 5, 2]], 0, trace, 0) == 1.0
    assert _oracle([[7, 8, 1, 2]], 0, trace, 0) == 0.0
    assert _oracle([[7, 9, 5, 2]], 0, trace, 0) == 0.0
    assert _oracle([[7, 8, 1, 2, 3, 6]], 0, trace, 3) == 1.0
    assert _oracle([[7, 8, 1]], 0, trace, 3) == 0.0


@pytest.mark.parametrize("added", [0, 4])
def test_a_head_is_served_as_it_was_learned(added: int) -> None:
    drawn = torch.Generator().manual_seed(0)
    inputs_NI = 3 + 5 * torch.randn(200, 8 + added, generator=drawn)
    labels_N = inputs_NI[:, 0] + inputs_NI[:, -1] > 6
    head = Head.fit((inputs_NI, labels_N), (inputs_NI, labels_N), width=3, seed=0, added=added)
    tensors, numbers = head.tensors()
    reading_NI, added_NA = inputs_NI[:, :8], inputs_NI[:, 8:]
    logits_N = KINDS["mlp"].logits(tensors, reading_NI)[:, 0] + added_NA @ numbers
    assert torch.allclose(logits_N.sigmoid(), head(inputs_NI), atol=1e-5)
    assert auroc(head(inputs_NI), labels_N) > 0.9
