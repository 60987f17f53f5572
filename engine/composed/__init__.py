"""Composed models (CALM, arXiv 2401.02412): an anchor that reads the states of augmenting models by cross-attention.

    artifact.py    the checkpoint on disk: which members, which connections, and whether they fit
    register.py    makes the model known to vLLM, in every process that vLLM starts (entry point vllm.general_plugins)
    config.py      what vLLM's options must be for it
    model.py       the model itself; connections.py its cross-attention

To the rest of the engine a composed checkpoint is a checkpoint like any other: base or expert of a pair, or alone.
"""
