"""The example of a composition: arithmetic with values whose names only the augmenting model knows.

text.py        names and their values, expressions, the tokenizer
models.py      the two members, and what each reads
card.py        the model card
__main__.py    one command makes all of it
"""
