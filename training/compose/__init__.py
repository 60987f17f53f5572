"""Composing checkpoints (CALM, arXiv 2401.02412): ``collm train compose STAGE --config compose.toml``.

    settings.py    one configuration
    composed.py    the composed model in PyTorch; also how training and scoring read a composed checkpoint
    learn.py       training of connections, or of a LoRA control, with early stopping
    stages.py      train, evaluate; each keeps what it has finished
    inspection.py  what a composed checkpoint is made of, and what its connections do with a text

``docs/composition.md`` is the guide.
"""
