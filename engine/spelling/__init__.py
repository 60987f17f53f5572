"""Texts in several vocabularies: what models need that do not share a tokenizer.

The text of an answer is bytes that all members have in common. Each member reads and writes it in tokens of its own:

- :mod:`~engine.spelling.decoding`: the bytes of one token;
- :mod:`~engine.spelling.vocabulary`: a tokenizer as a set of byte strings, sorted, so that all tokens that begin with
  a prefix are one span;
- :mod:`~engine.spelling.mass`: the probability that a model gives to a prefix, whatever token continues it;
- :mod:`~engine.spelling.boundaries`: offsets at which a tokenizer can be restarted;
- :mod:`~engine.spelling.speller`: text to tokens, in the middle of a document and byte for byte;
- :mod:`~engine.spelling.strand`: one member's tokens for the common text while it grows.
- :mod:`~engine.spelling.scores`: what a model says of a text in another vocabulary's tokens;
- :mod:`~engine.spelling.words`: words that a model writes into another one's text;
- :mod:`~engine.spelling.named`: what requests name of this;
- :mod:`~engine.spelling.guard`: special tokens in messages stay text;
- :mod:`~engine.spelling.union`: a step of UniTE, and SAFE's reasons for not taking it;
- :mod:`~engine.spelling.symbols`, :mod:`~engine.spelling.chorus`: several members write a text character by character.

Pure: numpy and the tokenizers library; no torch, no vLLM, no scheduler.
"""
