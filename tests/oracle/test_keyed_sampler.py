"""Draws of a whole step at once, asked positions in the LM head's one product, and the device's clock. No engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine import draws
from engine.config import LaneConfig
from engine.vllm_hooks.options import prepare_environment
from tests.oracle.checks import frequencies_pvalue

prepare_environment((LaneConfig(model="none"),))

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import vllm._custom_ops  # noqa: F401 - loads the compiled kernels
    from vllm.platforms import current_platform
    from vllm.sampling_params import SamplingParams
    from vllm.v1.sample.sampler import Sampler

    from engine.vllm_hooks.device_clock import DeviceClock, events_of
    from engine.vllm_hooks.rows import RowReader
    from engine.vllm_hooks.sampling import KeyedSampler, draw, exact_draw, metadata_of

Draw = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
WIDTH = 300
DEVICE = current_platform.device_type
kinds = pytest.mark.parametrize("kind", [draw, exact_draw])


def keys(count: int, seed: int = 5) -> torch.Tensor:
    return torch.from_numpy(draws.keys([seed] * count, draws.TOKEN_STREAM, range(count)).view("int64")).to(DEVICE)


def logits(rows: int, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(DEVICE)


@kinds
def test_a_draw_depends_on_its_key_and_its_row_alone(kind: Draw) -> None:
    rows, of = logits(40), keys(40)
    together = kind(rows.clone(), of).tolist()
    assert together == [int(kind(rows[row : row + 1].clone(), of[row : row + 1])) for row in range(40)]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    assert kind(rows[order].clone(), of[order]).tolist() == [together[row] for row in order.tolist()]
    padded = torch.nn.functional.pad(rows, (0, 77), value=float("-inf"))
    assert kind(padded, of).tolist() == together, "lanes' vocabularies may be padded differently"
    assert kind(rows.clone(), keys(40, seed=6)).tolist() != together


@kinds
def test_draws_have_the_frequencies_that_the_logits_say(kind: Draw) -> None:
    count = 20_000
    row = logits(1, 40)
    drawn = kind(row.expand(count, -1).contiguous(), keys(count))
    shares = torch.softmax(row[0].double(), -1)
    assert frequencies_pvalue(torch.bincount(drawn, minlength=40).tolist(), shares.tolist()) > 1e-4


def test_the_noise_is_splitmix_s() -> None:
    """Against numbers from Python's own integers."""
    of = keys(3)
    noise = [[draws.mix((int(key) & ((1 << 64) - 1)) ^ token) >> 11 for token in range(50)] for key in of]
    expected = [max(range(50), key=row.__getitem__) for row in noise]
    assert exact_draw(torch.zeros(3, 50, device=DEVICE), of).tolist() == expected


INTERPRETED = """
import torch, triton.backends
from triton.backends import Backend
from triton.backends.driver import DriverBase

class Driver(DriverBase):
    def __init__(self): pass
    is_active = staticmethod(lambda: False)
    def map_python_to_cpp_type(self, ty): return ty
    def get_current_target(self): return None
    def get_active_torch_device(self): return torch.device("cpu")
    def get_benchmarker(self): return None

triton.backends.backends["cpu"] = Backend(None, Driver)
from vllm.triton_utils import HAS_TRITON
assert HAS_TRITON
from engine.vllm_hooks.sampling import _triton_draw
row = torch.tensor([[0.0, 1.0, -1.0, float("-inf"), 0.5]])
keys = torch.randint(-(1 << 63), (1 << 63) - 1, (300,), generator=torch.Generator().manual_seed(3))
rows = row.expand(300, -1).contiguous()
drawn = _triton_draw(rows, keys, use_fp64=False)
assert torch.equal(drawn[100:104], _triton_draw(rows[100:104], keys[100:104], use_fp64=False))
print(torch.bincount(drawn, minlength=5).tolist())
"""


@pytest.mark.slow
def test_the_gpu_s_kernel_in_triton_s_interpreter() -> None:
    """What a CUDA device is given, run on a CPU: draws do not depend on the batch, and are fair."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_BACKENDS_IN_TREE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    shares = torch.softmax(torch.tensor([0.0, 1.0, -1.0, 0.5]).double(), -1)
    assert counts[3] == 0
    assert frequencies_pvalue([counts[i] for i in (0, 1, 2, 4)], shares.tolist()) > 1e-4


class Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def keyed(sampler: Sampler) -> KeyedSampler:
    replaced = KeyedSampler(sampler.topk_topp_sampler)
    sampler.topk_topp_sampler.forward = replaced
    return replaced


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_as_many_operations_for_many_rows_as_for_one(top_p: float) -> None:
    sampler = Sampler()
    replaced = keyed(sampler)

    def launches(count: int) -> int:
        params = [SamplingParams(temperature=1.0, top_p=top_p, seed=row) for row in range(count)]
        replaced.prepare(range(count), range(count), [7] * count)
        with Launches() as seen:
            sampler(logits(count), metadata_of(params, logits(count)))
        return seen.count

    assert launches(2) == launches(200)


def test_rows_without_a_seed_are_drawn_anew_each_time_and_the_others_not() -> None:
    sampler = Sampler()
    replaced = keyed(sampler)
    params = [SamplingParams(temperature=1.0) for _ in range(64)]

    def sample() -> list[int]:
        replaced.prepare([3, 9], [1, -4], [20, 1 << 20])
        flat = torch.zeros(64, 5000, device=DEVICE)
        drawn: list[int] = sampler(flat, metadata_of(params, flat)).sampled_token_ids[:, 0].tolist()
        return drawn

    first, second = sample(), sample()
    assert {row for row in range(64) if first[row] == second[row]} >= {3, 9}
    assert sum(one == other for one, other in zip(first, second, strict=True)) < 10


def test_asked_positions_are_in_the_one_product_of_the_head() -> None:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(4))
    calls: list[int] = []

    def head(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(len(hidden))
        return hidden @ weight.T

    hidden = torch.randn(5, 4, generator=torch.Generator().manual_seed(5))
    reader = RowReader(
        head, gate=None, regret=None, gate_in_head=True, vocab_size=5, masked=[(5, 6)], device=torch.device("cpu")
    )
    reader.begin(top_probability=True)
    reader.expect_asked(2)
    ends = reader(hidden)
    assert ends is not None
    asked = reader.take_asked()
    assert asked is not None
    assert reader.take_asked() is None
    wanted = hidden @ weight.T
    wanted[:, 5] = float("-inf")
    assert torch.equal(torch.cat((ends, asked)), wanted)
    # Those of the asked positions are the last ones.
    torch.testing.assert_close(reader.asked_gate_AK, hidden[3:] @ weight[5:].T)
    gate, top, regret = reader.take()
    assert regret is None
    assert gate is not None
    assert top is not None
    assert gate.tolist() == [[pytest.approx(float(row @ weight[5]))] for row in hidden]
    assert top.tolist() == pytest.approx(torch.softmax(wanted, -1).amax(-1).tolist())
    prompt = reader(hidden)  # for prompt log-probabilities: all rows come back
    assert prompt is not None
    assert len(prompt) == 5
    assert calls == [5, 5]


class Recorded:
    """An event of a device that reaches what is launched at times that the test says."""

    now = 0.0
    waits = 0

    def record(self) -> None:
        self.at = Recorded.now

    def synchronize(self) -> None:
        Recorded.waits += 1

    def elapsed_time(self, end_event: Recorded) -> float:
        return (end_event.at - self.at) * 1e3


def test_the_device_s_clock_counts_what_was_launched_together() -> None:
    clock = DeviceClock(Recorded)
    clock.start()  # of a step that failed
    clock.begin()
    clock.stop()
    assert clock.detach()() == 0.0
    for begin, end in ((1.0, 1.5), (1.7, 1.8)):
        Recorded.now = begin
        clock.start()
        Recorded.now = end
        clock.stop()
    assert clock.detach()() == pytest.approx(0.6)
    assert Recorded.waits == 1, "for the last one only"
    assert clock.detach()() == 0.0


def test_on_a_cpu_the_device_is_the_calling_thread() -> None:
    clock = DeviceClock(events_of(torch.device("cpu")))
    clock.start()
    torch.randn(300, 300) @ torch.randn(300, 300)
    clock.stop()
    assert 0 < clock.detach()() < 5
