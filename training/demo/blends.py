"""Blends beside deferral on the demo pair's held-out questions: ``python -m training.demo.blends``.

Greedy, offline, with the shipped models and gate. Nothing is trained, so there is one seed; the interval is a bootstrap
over the questions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from engine.blends import Blend
from engine.gate import GateArtifact
from engine.vllm_hooks.blend import combine
from training.bootstrap import interval
from training.checkpoints import load_causal, quiet
from training.command import run_command
from training.demo.blending import Rows, Rule, alone, best_of, blend, write
from training.demo.pretrain import one_thread
from training.demo.tokenizer import EOS_ID
from training.files import read_json, write_json

MAX_TOKENS = 64
BASE_ALONE, BEST_OF = "base alone", "base alone, best of as many samples as cost what all members do"


class Asked:
    """A rule where a policy asks, the base elsewhere; counts both."""

    def __init__(self, gate: GateArtifact, members: Sequence[str], policy: str, threshold: float, rule: Rule | None):
        """``rule``: None for the likeliest expert alone, which is deferral."""
        self.gate, self.members, self.rule = gate, members, rule
        self.policy, self.threshold = policy, threshold
        self.rows = self.asked = 0

    def __call__(self, rows: Rows, hidden: torch.Tensor) -> torch.Tensor:
        """The logits [B, V] that are written from."""
        share = shares(self.gate, hidden)
        base = rows["base"]
        of_base = share[:, 0] if self.policy == "gate" else base.softmax(-1).amax(-1)
        asked = 1 - of_base > self.threshold if self.policy != "always" else torch.ones(len(base), dtype=torch.bool)
        if self.rule is None:
            experts = torch.stack([rows[name] for name in self.members[1:]])
            there = experts[share[:, 1:].argmax(-1), torch.arange(len(base))]
        else:
            there = self.rule(rows, hidden)
        self.rows += len(base)
        self.asked += int(asked.sum())
        return torch.where(asked[:, None], there, base)


def shares(gate: GateArtifact, hidden: torch.Tensor) -> torch.Tensor:
    """P(Z = k) [B, 1 + K] of a linear gate, the base first."""
    logits = hidden @ gate.theta.T + gate.bias
    return torch.cat([torch.zeros(len(hidden), 1), logits], dim=-1).softmax(-1)


def by_gate(gate: GateArtifact, members: Sequence[str]) -> Rule:
    """The mixture weighted by the gate: the marginal that its training maximises."""
    served = Blend("mixture", tuple((lane, 1.0) for lane in range(len(members))), from_gate=True)

    def rule(rows: Rows, hidden: torch.Tensor) -> torch.Tensor:
        return combine(
            torch.stack([rows[name] for name in members]), served, shares(gate, hidden).T.log()[..., None]
        ).logits_AV

    return rule


def run(pair: Path, out: Path, every: int, seed: int) -> None:
    """Measure what ``blends.json`` does not hold with these settings, print the table."""
    quiet()
    one_thread()
    tokenizer = Tokenizer.from_file(str(pair / "base" / "tokenizer.json"))
    gate = GateArtifact.load(pair / "gate")
    members = ["base", *gate.experts]
    models = {name: load_causal(pair / name) for name in members}
    questions = read_json(pair / "questions.json")[::every]
    prompts = [tokenizer.encode(question["prompt"]).ids for question in questions]
    wanted = [[*tokenizer.encode(question["completion"]).ids, EOS_ID] for question in questions]
    even = dict.fromkeys(members, 1 / len(members))
    half = {"base": 0.5} | dict.fromkeys(members[1:], 0.5 / (len(members) - 1))
    gated = by_gate(gate, members)
    threshold = gate.default_threshold
    ways: dict[str, tuple[str, float, Rule | None]] = {
        "deferral by the gate": ("gate", threshold, None),
        "deferral by confidence": ("confidence", 0.5, None),
        "mixture, everywhere": ("always", 0.0, blend("mixture", even)),
        "mixture, base one half, everywhere": ("always", 0.0, blend("mixture", half)),
        "mixture where the gate asks": ("gate", threshold, blend("mixture", even)),
        "mixture where confidence asks (GaC's rule)": ("confidence", 0.5, blend("mixture", even)),
        "gate-weighted mixture, everywhere": ("always", 0.0, gated),
        "gate-weighted mixture where the gate asks": ("gate", threshold, gated),
        "union of 10, everywhere": ("always", 0.0, blend("union", even, top=10)),
        "union of 10 where the gate asks": ("gate", threshold, blend("union", even, top=10)),
        "product, everywhere": ("always", 0.0, blend("product", even)),
        "product where the gate asks": ("gate", threshold, blend("product", even)),
    }
    base = models["base"]
    # As many samples of the base as cost what an answer of all members does.
    parameters = [model.num_parameters() for model in models.values()]
    samples = round(sum(parameters) / parameters[0])

    def answers(way: str) -> tuple[list[list[int]], float]:
        """What is written, and the share of the tokens at which the experts were asked."""
        if way == BASE_ALONE:
            return write({"base": base}, alone("base"), prompts, max_tokens=MAX_TOKENS, eos=EOS_ID)[0], 0.0
        if way == BEST_OF:
            return best_of(base, prompts, samples, max_tokens=MAX_TOKENS, eos=EOS_ID, seed=seed), 0.0
        policy, limit, rule = ways[way]
        where = Asked(gate, members, policy, limit, rule)
        written, _ = write(models, where, prompts, max_tokens=MAX_TOKENS, eos=EOS_ID)
        return written, where.asked / where.rows

    file = out / "blends.json"
    settings = {"pair": str(pair), "questions": len(questions), "seed": seed, "samples": samples}
    kept = read_json(file) if file.exists() else {}
    found = kept["found"] if kept.get("settings") == settings else {}
    print(f"{len(questions)} questions\n")
    print("| written by | exact match | 95 % interval | asked |\n| --- | ---: | ---: | ---: |")
    for way in (*ways, BASE_ALONE, BEST_OF):
        if way not in found:
            written, asked = answers(way)
            exact = list(map(list.__eq__, written, wanted))
            found[way] = {"exact": sum(exact) / len(exact), "interval": interval([exact], seed=seed), "asked": asked}
            write_json(file, {"settings": settings, "found": found})
        one = found[way]
        low, high = one["interval"]
        print(f"| {way} | {one['exact']:.3f} | {low:.3f} to {high:.3f} | {one['asked']:.3f} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.demo.blends", description=__doc__.replace("``", ""))
    parser.add_argument("--pair", type=Path, default=Path("models/demo"), help="folder of the demo pair")
    parser.add_argument("--out", type=Path, default=Path("build/demo/blends"), help="output folder")
    parser.add_argument("--every", type=int, default=1, help="ask every EVERY-th question only")
    parser.add_argument("--seed", type=int, default=0, help="of the samples and of the bootstrap")
    options = parser.parse_args(arguments)
    return run_command(lambda: run(options.pair, options.out, options.every, options.seed))


if __name__ == "__main__":
    sys.exit(main())
