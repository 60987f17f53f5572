"""``python -m tests.robustness.soak --minutes 60 --plot soak.png``: mixed load on a live demo server.

Every sent request is followed to its end. A sample of the answers is checked against an oracle: greedy answers
recorded before the load began, and a seeded request's own earlier answer. Every minute the load pauses until the
server is idle, and memory, descriptors and KV blocks are read then, when they can be compared.

Exit status 0 only when all of them stayed flat, and nothing was lost, answered twice or answered differently.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

from tests.robustness.servers import serving
from tests.robustness.soak.load import KEYS, Load
from tests.robustness.soak.record import Record, Watch


async def run(load: Load, watch: Watch, minutes: float, pause_every: float) -> None:
    await load.record_oracle()
    await watch.start()
    try:
        await load.run(minutes * 60, pause_every, watch.at_rest)
    finally:
        await watch.stop()


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.robustness.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the load (default: 60)")
    parser.add_argument("--clients", type=int, default=12, help="requests at the same time (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="of the mix of requests (default: 0)")
    parser.add_argument("--plot", type=Path, help="PNG file to draw; needs matplotlib")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    if options.plot is not None:
        import matplotlib  # noqa: F401 - better missed now than in an hour
    record = Record()
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as folder,
        serving(
            Path(folder),
            key=KEYS[0],
            scheduler__max_num_seqs=16,
            server__max_queued_requests=48,
            server__access_log=False,
            server__api_keys=KEYS,
        ) as server,
    ):
        load = Load(server, record, options.clients, options.seed)
        asyncio.run(run(load, Watch(server, record), options.minutes, min(60.0, options.minutes * 6)))
        record.account(server)
        server.process.terminate()
        record.exit_status = server.process.wait(timeout=120)
    figures = record.figures()
    print(json.dumps(figures, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    if options.plot is not None:
        from tests.robustness.soak.plot import draw

        draw(record, options.plot)
    problems = record.problems()
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    print("soak: failed" if problems else "soak: passed")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
