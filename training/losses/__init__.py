"""Losses: one small file each, all with the signature ``Loss``."""

from training.losses.language import language
from training.losses.marginal import marginal
from training.losses.tokens import Loss, Tokens
from training.losses.weak import weak
from training.losses.weakly_joint import weakly_joint

__all__ = ["Loss", "Tokens", "language", "marginal", "weak", "weakly_joint"]
