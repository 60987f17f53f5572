"""The recipe of the shipped demo pair: ``python -m training.demo --out models/demo``."""
