"""What of Triton's interpreter is otherwise than compiled code, for vLLM's kernels."""

from __future__ import annotations

from typing import Any

import numpy as np


def mend() -> None:
    """A mask made with a scalar comparison counts as one, as it does compiled; and top_k and top_p are torch's.

    vLLM calls this as a plugin. Its kernel for top_k and top_p, which is no part of the runner, is not understood.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    from vllm.v1.sample.ops import topk_topp_sampler

    store = InterpreterBuilder.create_masked_store

    def store_by_truth(self: Any, ptrs: Any, value: Any, mask: Any, cache_policy: Any) -> Any:
        if mask.data.dtype != np.bool_:
            mask = TensorHandle(mask.data.astype(np.bool_), mask.dtype)
        return store(self, ptrs, value, mask, cache_policy)

    InterpreterBuilder.create_masked_store = store_by_truth
    topk_topp_sampler.HAS_TRITON = False
