"""The HTTP side: protocol, text, streaming, admission, metrics.

Imports neither torch nor vllm nor transformers, and knows the engine only through :mod:`server.engine_port`.
"""

__version__ = "0.2.0"
