"""Some metrics under vLLM's names, for what chooses among servers by them.

The endpoint picker of the Gateway API Inference Extension (llm-d's router, GKE's gateway) reads these names unless it
is told others. Of a pair, the fullest lane's KV cache is the one that counts.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Gauge, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

_MODEL = ["model_name"]


class VllmNames(Collector):
    """A collector for the registry that the gauges are in.

    Args:
        model: the joint model's name.
        running: generation requests in the lanes.
        waiting: those that are not there yet.
        kv_usage: used share of each lane's KV blocks.
    """

    def __init__(self, model: str, running: Gauge, waiting: Gauge, kv_usage: Gauge) -> None:
        self._model = model
        self._gauges = {
            "vllm:num_requests_running": running,
            "vllm:num_requests_waiting": waiting,
            "vllm:kv_cache_usage_perc": kv_usage,
        }

    def describe(self) -> list[Metric]:
        """Names alone."""
        return [GaugeMetricFamily(name, "", labels=_MODEL) for name in self._gauges]

    def collect(self) -> Iterator[Metric]:
        """The greatest value of each gauge."""
        for name, gauge in self._gauges.items():
            [family] = gauge.collect()
            found = GaugeMetricFamily(name, family.documentation, labels=_MODEL)
            found.add_metric([self._model], max((sample.value for sample in family.samples), default=0.0))
            yield found
