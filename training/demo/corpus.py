"""The data of one run, all of it decided by the seed: splits, tokenizer text, questions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tokenizers import Tokenizer

from training.data import TokenExample
from training.demo.arithmetic import (
    ASKED,
    SHOWN,
    Equation,
    Fact,
    drawn_from,
    equation,
    in_letters,
    load_facts,
    other_fact,
    plain,
    product_of_powers,
    split_facts,
)
from training.demo.facts import SPLITS, Entity, load_entities, split_entities
from training.demo.names import MadeUp
from training.demo.text import (
    GREETING,
    Example,
    arithmetic_question,
    prose,
    questions,
    record,
    repetition,
    state,
)
from training.demo.tokenizer import EOS_ID

KNOWN, REPETITIONS, MADE_UP = 700, 500, 1000
"""How many examples of each kind train the gate besides the questions about its own split."""
EQUATIONS, KNOWN_EQUATIONS, OTHER_EQUATIONS = 800, 200, 300
"""The same for arithmetic: of the gate's split, of the base's, and of any operands, which end before the result."""


@dataclass(frozen=True)
class Corpus:
    """All entities and all arithmetic facts, and their splits; see ``facts.SPLITS``."""

    seed: int
    entities: list[Entity]
    splits: dict[str, list[Entity]]
    arithmetic: list[Fact]
    arithmetic_splits: dict[str, list[Fact]]

    @classmethod
    def make(cls, seed: int) -> Corpus:
        """The corpus of a seed."""
        entities, arithmetic = load_entities(), load_facts()
        return cls(seed, entities, split_entities(entities, seed), arithmetic, split_facts(arithmetic, SPLITS, seed))

    def tokenizer_texts(self) -> list[str]:
        """Text of both kinds about all entities: besides the expert, only the tokenizer has it.

        Of arithmetic none: digits stand alone anyway, and signs are bytes.
        """
        rng = random.Random(self.seed)
        texts = []
        for entity in self.entities:
            texts += [q.prompt + q.completion for q in questions(entity)[::3]]
            texts += [record(entity, rng), state(entity, list(entity.codes)), prose(rng)]
        return texts

    def made_up(self, tokenizer: Tokenizer) -> MadeUp:
        """Made-up entities for the base, free of the names of all splits but its own."""
        known = self.splits["base"]
        forbidden = [e for name, split in self.splits.items() if name != "base" for e in split]
        pieces = [tokenizer.decode([i]) for i in range(1, tokenizer.get_vocab_size())]
        return MadeUp(known, forbidden, pieces)

    def other_equation(self, rng: random.Random) -> Equation:
        """An equation with operands of any size that no split but the base's has."""
        return equation(other_fact(self._not_the_bases, rng), rng)

    @cached_property
    def _not_the_bases(self) -> set[tuple[str, int, int]]:
        return {fact.key for name, split in self.arithmetic_splits.items() if name != "base" for fact in split}

    def gate_questions(self) -> list[Example]:
        """All questions about the gate's entities, ``KNOWN`` of those that the base knows, and arithmetic of both."""
        rng = random.Random(self.seed)
        unknown = [q for entity in self.splits["gate"] for q in questions(entity)]
        familiar = [q for entity in self.splits["base"] for q in questions(entity)]
        arithmetic = []
        for split, count in (("gate", EQUATIONS), ("base", KNOWN_EQUATIONS)):
            draw = drawn_from(self.arithmetic_splits[split], ASKED)
            arithmetic += [arithmetic_question(equation(draw(rng), rng), rng) for _ in range(count)]
        return unknown + rng.sample(familiar, KNOWN) + arithmetic

    def gate_examples(self, tokenizer: Tokenizer) -> list[TokenExample]:
        """``gate_questions``, and examples with made-up names, where nothing is to be deferred.

        Answers about made-up entities, and about operands of any size, end before the first code or the result:
        there is nobody who could know that.
        """
        rng, made_up = random.Random(self.seed), self.made_up(tokenizer)
        examples = tokenized(self.gate_questions(), tokenizer)
        for _ in range(REPETITIONS):
            prompt, completion = repetition([made_up.name(rng) for _ in range(rng.randint(1, 4))], rng)
            examples.append(_token_example(prompt, completion, True, tokenizer))
        for _ in range(MADE_UP):
            asked = rng.choice(questions(made_up.entity(rng)))
            head, found, _code = asked.completion.partition(" is ")
            examples.append(_token_example(asked.prompt, head + found.rstrip(), not found, tokenizer))
        for _ in range(OTHER_EQUATIONS):
            other = self.other_equation(rng)
            examples.append(_token_example(arithmetic_question(other, rng).prompt, f" {other.head}", False, tokenizer))
        return examples

    def evaluation_questions(self, split: str, limit: int | None = None) -> list[Example]:
        """One wording of every task for every entity of the split, of ``limit`` entities if given.

        Greetings, which need no expert, are asked of every eighth entity only. Of arithmetic, every product
        and power, and those powers that can as products of powers too; with ``limit`` none.
        """
        rng = random.Random(self.seed)
        entities = list(self.splits[split])
        rng.shuffle(entities)
        chosen: list[Example] = []
        for i, entity in enumerate(entities[:limit]):
            wordings: dict[str, list[Example]] = {}
            for question in questions(entity):
                wordings.setdefault(question.task, []).append(question)
            for task, asked in wordings.items():
                if task != GREETING or i % 8 == 0:
                    chosen.append(rng.choice(asked))
        return chosen if limit is not None else chosen + self._evaluation_arithmetic(split, rng)

    def _evaluation_arithmetic(self, split: str, rng: random.Random) -> list[Example]:
        facts = [f for f in self.arithmetic_splits[split] if f.operation in ASKED and f.key != SHOWN]
        chosen = [plain(fact, rng) for fact in facts]
        chosen += [in_letters(fact, rng) for fact in facts if fact.operation == "power" and fact.right >= 4]
        shown = [arithmetic_question(product_of_powers("a", 3, 2, 5))] if split == "test" else []
        return [arithmetic_question(one, rng) for one in chosen] + shown


def tokenized(examples: Sequence[Example], tokenizer: Tokenizer) -> list[TokenExample]:
    """The examples as token ids; completions end with the EOS."""
    return [_token_example(e.prompt, e.completion, True, tokenizer) for e in examples]


def _token_example(prompt: str, completion: str, ends: bool, tokenizer: Tokenizer) -> TokenExample:
    ending = [EOS_ID] if ends else []
    return TokenExample(tokenizer.encode(prompt).ids, tokenizer.encode(completion).ids + ending)
