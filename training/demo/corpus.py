"""The data of one run, all of it decided by the seed: splits, tokenizer text, questions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from training.demo.facts import Entity, load_entities, split_entities
from training.demo.names import MadeUp
from training.demo.text import GREETING, Example, prose, questions, record, repetition, state
from training.demo.tokenizer import EOS_ID
from training.score import TokenExample

KNOWN, REPETITIONS, MADE_UP = 1000, 1000, 1500
"""How many examples of each kind train the gate besides the questions about its own split."""


@dataclass(frozen=True)
class Corpus:
    """All entities and their splits; see ``facts.SPLITS``."""

    seed: int
    entities: list[Entity]
    splits: dict[str, list[Entity]]

    @classmethod
    def make(cls, seed: int) -> Corpus:
        """The corpus of a seed."""
        entities = load_entities()
        return cls(seed, entities, split_entities(entities, seed))

    def tokenizer_texts(self) -> list[str]:
        """Text of both models about all entities: besides the expert, only the tokenizer has it."""
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

    def gate_questions(self) -> list[Example]:
        """All questions about the gate's entities, and ``KNOWN`` of those that the base knows."""
        unknown = [q for entity in self.splits["gate"] for q in questions(entity)]
        familiar = [q for entity in self.splits["base"] for q in questions(entity)]
        return unknown + random.Random(self.seed).sample(familiar, KNOWN)

    def gate_examples(self, tokenizer: Tokenizer) -> list[TokenExample]:
        """``gate_questions``, and examples with made-up names, where nothing is to be deferred.

        Answers about made-up entities end before the first code: nobody can know that.
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
        return examples

    def evaluation_questions(self, split: str, limit: int | None = None) -> list[Example]:
        """One wording of every task for every entity of the split, of ``limit`` entities if given.

        Greetings, which need no expert, are asked of every eighth entity only.
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
        return chosen


def tokenized(examples: Sequence[Example], tokenizer: Tokenizer) -> list[TokenExample]:
    """The examples as token ids; completions end with the EOS."""
    return [_token_example(e.prompt, e.completion, True, tokenizer) for e in examples]


def _token_example(prompt: str, completion: str, ends: bool, tokenizer: Tokenizer) -> TokenExample:
    ending = [EOS_ID] if ends else []
    return TokenExample(tokenizer.encode(prompt).ids, tokenizer.encode(completion).ids + ending)
