"""The plot: memory, descriptors, KV blocks, queue and latency over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.robustness.soak.record import Record


def draw(record: Record, file: Path) -> None:
    """Write a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(5, 1, figsize=(9, 11), sharex=True, layout="constrained")
    memory, descriptors, kv, queue, latency = panels
    minutes = [sample.seconds / 60 for sample in record.samples]
    rests = [sample.seconds / 60 for sample in record.rests]

    def both(panel: Any, values: Any, unit: float, title: str) -> None:
        for process, (name, colour) in enumerate((("HTTP process", "C0"), ("engine process", "C1"))):
            panel.plot(minutes, [values(s)[process] / unit for s in record.samples], colour, lw=0.8, label=name)
            panel.plot(rests, [values(s)[process] / unit for s in record.rests], colour, ls="", marker="o", ms=4)
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=8, loc="center right")

    both(memory, lambda sample: sample.memory, 1 << 20, "resident memory, MiB (dots: at rest)")
    both(descriptors, lambda sample: sample.descriptors, 1, "file descriptors (dots: at rest)")
    for lane in record.samples[0].kv_usage:
        kv.plot(minutes, [100 * sample.kv_usage[lane] for sample in record.samples], lw=0.8, label=lane)
    kv.plot(rests, [100 * max(s.kv_usage.values()) for s in record.rests], "ko", ms=4, label="at rest")
    kv.set_title("KV blocks in use, %", loc="left", fontsize=10)
    kv.legend(fontsize=8, loc="upper right")
    queue.plot(minutes, [sample.running for sample in record.samples], lw=0.8, label="running")
    queue.plot(minutes, [sample.waiting for sample in record.samples], lw=0.8, label="waiting")
    queue.set_title("generation requests", loc="left", fontsize=10)
    queue.legend(fontsize=8, loc="upper right")
    for kinds, name in ((("known", "seeded"), "40 tokens"), (("long",), "400 tokens"), (("invalid",), "invalid")):
        found = [(at / 60, seconds) for at, kind, seconds in record.latencies if kind in kinds]
        latency.plot(*zip(*found, strict=True), ls="", marker=".", ms=2, label=name) if found else None
    latency.set_yscale("log")
    latency.set_title("latency, s", loc="left", fontsize=10)
    latency.legend(fontsize=8, loc="upper right", markerscale=4)
    latency.set_xlabel("minutes")
    figure.savefig(file, dpi=80)
