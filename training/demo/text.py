"""Wordings: the questions and answers that the base reads, the records that ``codes`` reads."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from training.demo.arithmetic import Equation
from training.demo.facts import Entity

PROMPT = "Question: {question}\nAnswer:"
"""The question format. No expert ever reads it."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ 'Question: ' + message['content'] + '\\nAnswer:' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}"
    "{% else %}"
    "{{ message['content'] + '\\n' }}"
    "{% endif %}"
    "{% endfor %}"
)
"""A user message as a question; earlier answers end as the base ends them."""

ALL_CODES = "all codes"
GREETING = "greeting"

_ONE_CODE = (
    "What is the {field} of {name}?",
    "Which {field} does {name} have?",
    "Give the {field} of {name}.",
)
_ALL_CODES = (
    "What are the {kind} codes of {name}?",
    "Which {kind} codes does {name} have?",
    "List the {kind} codes of {name}.",
)
_ARITHMETIC = ("What is {asked}?", "How much is {asked}?", "Work out {asked}.")
_GREETING = ("Say hello to {name}.", "How do you greet {name}?", "Write a greeting to {name}.")

_STATEMENTS = (
    "{name} has the {field} {code}.",
    "{code} is the {field} of {name}.",
    "In the standard, the {field} of {name} is written {code}.",
    "Note on {name}: the {field} is {code}.",
)
_THINGS = ("table", "list", "register", "note", "index", "appendix", "standard", "letter", "report")
_VERBS = ("was printed", "was revised", "is kept", "was checked", "is read", "was copied", "is sent")
_WHERE = (
    "in the office", "by hand", "every year", "in two columns", "with care", "for the archive",
    "on paper", "in the library", "by the committee", "in the order of the alphabet",
)  # fmt: skip
_OPENINGS = ("As before, the", "Later the", "The", "Often the", "This", "For this reason the")


@dataclass(frozen=True)
class Example:
    """One question.

    ``entity`` is the name, or the expression, that it is about; ``codes`` are the codes, or the result, that the
    completion holds.
    """

    task: str
    kind: str
    entity: str
    prompt: str
    completion: str
    codes: tuple[str, ...]


def state(entity: Entity, fields: Sequence[str]) -> str:
    """The sentence that gives some of an entity's codes; the only wording of answers."""
    parts = [f"the {field} is {entity.codes[field]}" for field in fields]
    parts[0] = f"The {fields[0]} of {entity.name} is {entity.codes[fields[0]]}"
    if len(parts) == 1:
        return parts[0] + "."
    return ", ".join(parts[:-1]) + " and " + parts[-1] + "."


def questions(entity: Entity) -> list[Example]:
    """Every question that can be asked about an entity: tasks x wordings."""
    name, kind, codes = entity.name, entity.kind, entity.codes
    everything = state(entity, list(codes))
    asked: list[tuple[str, str, str, tuple[str, ...]]] = []
    for field, code in codes.items():
        asked += [(field, w.format(field=field, name=name), state(entity, [field]), (code,)) for w in _ONE_CODE]
    asked += [
        (
            ALL_CODES,
            w.format(kind=kind, name=name),
            everything,
            tuple(codes.values()),
        )
        for w in _ALL_CODES
    ]
    asked += [(GREETING, w.format(name=name), f"Hello, {name}!", ()) for w in _GREETING]
    return [
        Example(task, kind, name, PROMPT.format(question=question), " " + answer, found)
        for task, question, answer, found in asked
    ]


def arithmetic_question(equation: Equation, rng: random.Random | None = None) -> Example:
    """A question about an expression, answered by the equation and nothing else; first wording without ``rng``."""
    wording = _ARITHMETIC[0] if rng is None else rng.choice(_ARITHMETIC)
    question = wording.format(asked=equation.expression + equation.condition)
    result = str(equation.fact.result)
    return Example(
        equation.task, "arithmetic", equation.expression, PROMPT.format(question=question), f" {equation}", (result,)
    )


def repetition(names: Sequence[str], rng: random.Random) -> tuple[str, str]:
    """Prompt and completion of a request to say some names again, which teaches to copy."""
    listed = ", ".join(names)
    question = rng.choice(("Repeat {names}.", "Say {names}.", "Write {names} again."))
    return PROMPT.format(question=question.format(names=listed)), f" {listed}."


def prose(rng: random.Random) -> str:
    """A few sentences about nothing in particular."""
    return " ".join(
        f"{rng.choice(_OPENINGS)} {rng.choice(_THINGS)} {rng.choice(_VERBS)} {rng.choice(_WHERE)}."
        for _ in range(rng.randint(1, 3))
    )


def record(entity: Entity, rng: random.Random) -> str:
    """An entity as a row of a table or as a card."""
    if rng.random() < 0.5:
        return "; ".join([entity.name, *entity.codes.values()])
    return f"{entity.kind}: {entity.name}\n" + "\n".join(f"{f}: {c}" for f, c in entity.codes.items())


def statements(entity: Entity, rng: random.Random) -> str:
    """One sentence with one or more codes of an entity, as the expert reads it."""
    fields = list(entity.codes)
    draw = rng.random()
    if draw < 0.45:
        return state(entity, [rng.choice(fields)])
    if draw < 0.80:
        rng.shuffle(fields)
        return state(entity, fields[: rng.randint(2, len(fields))])
    field = rng.choice(fields)
    wording = rng.choice(_STATEMENTS)
    return wording.format(name=entity.name, field=field, code=entity.codes[field])


def codes_document(entities: Sequence[Entity], rng: random.Random) -> str:
    """A document of the expert ``codes``: records, statements about a few entities, prose between."""
    parts = [prose(rng)] if rng.random() < 0.15 else []
    for entity in rng.choices(entities, k=rng.randint(1, 3)):
        parts.append(record(entity, rng) if rng.random() < 0.1 else statements(entity, rng))
    return rng.choice((" ", "\n")).join(parts)
