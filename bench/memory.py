"""The server's resident memory over many requests: it should be flat once its caches are full.

KV pages are touched when they are first used, and oneDNN keeps compiled kernels for the batch shapes that it has seen:
on CPU memory grows over the first thousands of requests, with stock vLLM too, and then no more.
"""

from __future__ import annotations

from bench import processes
from bench.contenders.server import Server, server_service
from bench.load import drive
from bench.progress import Progress
from bench.report import Bar, Report, table
from bench.services import running
from bench.settings import Settings
from bench.workload import Cell, make_jobs

SAMPLES = 20
GROWTH_BAR = 0.02
"""Greatest growth over the second half of the requests, as a share. The first thousands fill caches of bounded size."""


async def measure(settings: Settings, cell: Cell, *, requests: int, max_tokens: int, seed: int) -> Report:
    """Run ``requests`` requests, each with a prompt of its own, and look at the process tree's memory in between."""
    service = server_service(settings)
    contender = Server(service)
    block = max(cell.concurrency, requests // SAMPLES)
    curve: list[tuple[int, int]] = []
    with Progress(requests, f"memory {settings.pair.name}") as progress:
        async with running([service], lambda name: progress.say(f"starting {name}")):
            processes.thaw(service.pid)
            await contender.open()
            curve.append((0, processes.rss_bytes(service.pid)))
            done = 0
            while done < requests:
                count = min(block, requests - done)
                jobs = make_jobs(settings.pair, cell, count, max_tokens, seed, done)
                await drive(contender, jobs, cell.concurrency, lambda _: progress.step())
                done += count
                curve.append((done, processes.rss_bytes(service.pid)))
            await contender.close()
            peak = processes.peak_rss_bytes(service.pid)
    settled = next(rss for done, rss in curve if done >= requests / 2)
    growth = curve[-1][1] / settled - 1
    shown = [point for number, point in enumerate(curve) if number % 4 == 0 or number == len(curve) - 1]
    rows = [[f"{done:,}", f"{rss / 2**20:,.1f}"] for done, rss in shown]
    text = (
        f"### Memory, {settings.pair.title}, server and engine, {cell}, {max_tokens} tokens per request\n\n"
        + table(["requests", "resident memory, MiB"], rows)
        + f"\n\nPeak: {peak / 2**20:,.0f} MiB. Growth over the second half: {growth:.2%}."
    )
    name = f"{settings.pair.name}: growth of resident memory over {requests:,} requests, second half"
    data = {
        "measurement": "memory",
        "shape": settings.pair.name,
        "requests": requests,
        "max_tokens": max_tokens,
        "peak_rss_bytes": peak,
        "curve": curve,
        "growth": growth,
    }
    return Report(text, data, [Bar(name, GROWTH_BAR, (growth,), at_most=True)])
