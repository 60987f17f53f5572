"""How lanes on one GPU share its memory, and what a lane's part of it must hold.

vLLM takes 92 % of a device per engine unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.config import LaneConfig
from engine.errors import ConfigError
from engine.types import LaneInfo

SHARED = 0.92
"""Share of a device that its lanes take together, as one vLLM engine does by default."""

OVERHEAD_BYTES = 3 << 29
"""What an engine takes beside weights and KV cache: activations, CUDA graphs, the libraries' workspaces."""

UTILIZATION = "gpu_memory_utilization"


def devices_of(lane: LaneConfig) -> tuple[int, ...]:
    """Those of this machine that a lane computes on, as far as that is known: not for lanes that Ray places."""
    if lane.executor == "ray":
        return ()
    return lane.devices or tuple(range(lane.tensor_parallel_size))


def memory_shares(
    labels: Sequence[str], lanes: Sequence[LaneConfig], weights: Sequence[int], totals: dict[int, int]
) -> list[float | None]:
    """``gpu_memory_utilization`` for each lane; None where the user's or vLLM's own is right.

    A lane that states the bytes of its KV cache gets these, its weights and an overhead. Lanes that do not share what
    is left, in proportion to their weights: a larger model's tokens are larger too. Ray finds a device for each worker
    that no other worker has.

    Args:
        labels: where the lanes stand in the configuration, for error messages.
        weights: bytes of each lane's weights.
        totals: bytes of each device that a lane runs on.

    Raises:
        ConfigError: the lanes do not fit on their device.
    """
    places = [devices_of(lane) for lane in lanes]
    together = {
        number
        for number, place in enumerate(places)
        if any(other != number and set(place) & set(there) for other, there in enumerate(places))
    }
    shares: list[float | None] = [None] * len(lanes)
    for device, total in totals.items():
        here = [number for number in together if device in places[number]]
        left, open_lanes = SHARED, []
        for number in here:
            lane = lanes[number]
            given = lane.vllm.get(UTILIZATION)
            resident = weights[number] / lane.tensor_parallel_size
            if given is not None:
                left -= float(given)
            elif lane.kv_cache_memory_bytes is not None:
                shares[number] = (resident + lane.kv_cache_memory_bytes + OVERHEAD_BYTES) / total
                left -= shares[number] or 0.0
            else:
                open_lanes.append(number)
        heavy = sum(weights[number] for number in open_lanes)
        for number in open_lanes:
            share = left * weights[number] / heavy
            if share * total < weights[number] / lanes[number].tensor_parallel_size + OVERHEAD_BYTES:
                raise ConfigError(
                    f"{labels[number]}: device {device} has no room for the weights beside the other lanes: set"
                    f" {labels[number]}.kv_cache_memory_bytes and the others', or give the lane a device of its own"
                )
            shares[number] = min(share, shares[number] or 1.0)
    return [None if share is None else round(min(share, SHARED), 4) for share in shares]


def memory_notes(host: LaneInfo, guests: int) -> list[str]:
    """What to say of a cache that cannot hold all rows of one text: they would take each other's memory in turn."""
    texts = 1 + guests
    holds = host.kv_blocks * host.block_size
    if not guests or holds >= texts * host.max_model_len:
        return []
    return [
        f"{host.name}: the KV cache holds {holds:,} tokens; a text of {host.max_model_len:,} that was deferred to all"
        f" adapters has {texts} rows there and is computed over and over: raise kv_cache_memory_bytes to hold"
        f" {texts * host.max_model_len:,}, or lower max_model_len"
    ]
