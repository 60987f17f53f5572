"""Structured output: from what a user asks for to a grammar that the lanes follow.

A *form* is what a request asks for (:class:`engine.types.StructuredOutputs`). Everything that reads one runs in a
process of its own (:mod:`engine.grammar.worker`), under bounds on time and memory that the operating system keeps
(:mod:`engine.grammar.checker`); the engine's process sees only what has passed.

    forms    a form -> a grammar of the back end, or an error that names what cannot be followed
    schema   JSON Schema, keyword by keyword
    regex    regular expressions, in one meaning for all that read them
    ebnf     EBNF grammars
"""
