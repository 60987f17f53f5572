"""Block hashes of prompts, computed once for all lanes.

Prefix caching names a block by the hash of all tokens up to its end. Lanes share the tokens, so they share the names;
what they hold under a name is each lane's own. Without this an expert's first visit would hash a prompt again that
the base has hashed, which for a long prompt takes longer than the visit's own bookkeeping.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.request import Request


class PromptHashes:
    """What the lanes of one engine know of the prompts of requests that are in any of them."""

    def __init__(self) -> None:
        # By request and scheme: the prompt, by identity, since an id may be used again, and its full blocks' hashes.
        self._known: dict[str, dict[Hashable, tuple[list[int], list[BlockHash]]]] = {}

    def shared(
        self, hasher: Callable[[Request], list[BlockHash]] | None, scheme: Hashable
    ) -> Callable[[Request], list[BlockHash]] | None:
        """vLLM's block hasher of a lane, asking the other lanes first.

        Args:
            hasher: vLLM's own; None if the lane caches no prefixes.
            scheme: two lanes name the same tokens alike exactly if theirs are equal.
        """
        if hasher is None:
            return None

        def hash_blocks(request: Request) -> list[BlockHash]:
            if request.block_hashes or request.num_output_tokens:
                return hasher(request)
            prompt = request.prompt_token_ids
            schemes = self._known.setdefault(request.request_id, {})
            known = schemes.get(scheme)
            if known is None or known[0] is not prompt:
                known = schemes[scheme] = (prompt, hasher(request))
            return known[1]

        return hash_blocks

    def forget(self, request_id: str) -> None:
        """The request has ended. Unknown ids are ignored: it has ended in every lane."""
        self._known.pop(request_id, None)

    def held(self) -> list[str]:
        """Requests that are not forgotten."""
        return list(self._known)
