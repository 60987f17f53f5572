"""What the study of regret has measured, on an engine: ``python -m training.demo.regret_served``, after ``regret``.

A gate and a regret head of the study are written as artifacts and served; the test questions are answered greedily at
every threshold, and the answers compared with the study's, which come from a float32 loop with an explicit rewind.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from engine.checkpoints import model_identity
from engine.config import EngineConfig, ExpertConfig, GateConfig, LaneConfig
from engine.gate import GateArtifact
from engine.hindsight import NEVER
from engine.offline import Engine
from engine.regret import RegretArtifact
from engine.types import Collaboration, GenerationRequest, SamplingSpec
from training.checkpoints import load_causal, quiet
from training.command import run_command
from training.demo.corpus import Corpus
from training.demo.lookback import Head, Outcome, Reading
from training.demo.pretrain import SEED, one_thread
from training.demo.regret import MAX_TOKENS, REGRETS, Asked, Measured, splits

KINDS = ("gate", "kind")
KV_BYTES = 64 << 20
LANE = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True}


def save(gate: Head, regret: Head, reading: Reading, base: Path, expert: Path, folder: Path) -> None:
    """Write both as the artifacts of a pair."""
    tensors, _ = gate.tensors()
    theta, bias = tensors.pop("theta"), tensors.pop("bias")
    identity = model_identity(base)
    GateArtifact(
        theta, bias, ("codes",), identity, (model_identity(expert),), kind="mlp", layers=tensors,
        data="the demo's questions about codes",
    ).save(folder)  # fmt: skip
    tensors, numbers = regret.tensors()
    theta, bias = tensors.pop("theta"), tensors.pop("bias")
    RegretArtifact(theta, bias, numbers, reading.ahead, identity, NEVER, kind="mlp", layers=tensors).save(folder)


def run(pair: Path, out: Path, seeds: Sequence[int]) -> None:
    """Compare, and print a line for each seed, gate and threshold.

    Raises:
        CollmError: the study's models are not there, or the engine does not start.
    """
    quiet()
    one_thread()
    tokenizer = Tokenizer.from_file(str(pair / "base" / "tokenizer.json"))
    asked = {name: Asked.of(found, tokenizer) for name, found in splits(Corpus.make(SEED)).items()}
    print("| seed | gate | threshold | answers | equal to the loop's | exact match | taken back | seconds |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for seed in seeds:
        base, expert = out / "base", out / f"seed-{seed}" / "codes"
        measured = Measured(load_causal(base), load_causal(expert), asked, seed)
        for name in KINDS:
            gate, regret, reading, expected = measured.served(name)
            folder = out / f"seed-{seed}" / name
            save(gate, regret, reading, base, expert, folder)
            config = EngineConfig(
                base=LaneConfig(model=str(base), kv_cache_memory_bytes=KV_BYTES, vllm=LANE),
                experts=(ExpertConfig(name="codes", model=str(expert), kv_cache_memory_bytes=KV_BYTES, vllm=LANE),),
                gate=GateConfig(path=str(folder)),
            )
            with Engine(config) as engine:
                for threshold in (NEVER, *sorted(REGRETS, reverse=True)):
                    _compare(engine, asked["test"], threshold, expected.get(threshold), f"{seed} | {name}")


def _compare(engine: Engine, asked: Asked, threshold: float, expected: dict[int, Outcome] | None, label: str) -> None:
    sampling = SamplingSpec(temperature=0.0, max_tokens=MAX_TOKENS)
    requests = [
        GenerationRequest(f"{threshold}-{number}", prompt, sampling, Collaboration(regret=threshold))
        for number, prompt in enumerate(asked.prompts)
    ]
    begin = time.perf_counter()
    found = engine.generate(requests)
    seconds = time.perf_counter() - begin
    exact = sum(one.tokens == gold for one, gold in zip(found, asked.gold, strict=True)) / len(found)
    equal = "-"
    if expected is not None:
        equal = str(sum(one.tokens == list(expected[number].tokens) for number, one in enumerate(found)))
    back = sum(len(one.regretted) for one in found)
    print(f"| {label} | {threshold:g} | {len(found)} | {equal} | {exact:.3f} | {back} | {seconds:.1f} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training.demo.regret_served", description=__doc__.replace("``", "")
    )
    parser.add_argument("--pair", type=Path, default=Path("models/demo"), help="folder of the demo pair")
    parser.add_argument("--out", type=Path, default=Path("build/demo/regret"), help="the study's output folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the study")
    options = parser.parse_args(arguments)
    return run_command(lambda: run(options.pair, options.out, options.seeds))


if __name__ == "__main__":
    sys.exit(main())
