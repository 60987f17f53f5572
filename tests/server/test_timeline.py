"""An answer's stretches of time, by who wrote and who was waited for."""

from __future__ import annotations

from server.trace.timeline import Stretch, merged, stretches


def cut(timeline: list[float], sources: list[int], *, home: int = 0, finished: bool = True) -> list[Stretch]:
    return stretches(timeline, sources, primary_lane=home, begun=0.0, ended=10.0, finished=finished)


def test_stretches() -> None:
    assert cut([], []) == [Stretch("queue", 0, 10)]
    assert cut([1], [0, 0]) == [Stretch("queue", 0, 1), Stretch("base", 1, 10, 0, 2)]
    assert cut([1], [2, 2], home=2) == [Stretch("queue", 0, 1), Stretch("expert", 1, 10, 2, 2)]
    assert cut([1, 3, 4], [0, 2, 0, 0]) == [
        Stretch("queue", 0, 1),
        Stretch("base", 1, 3, 0, 1),
        Stretch("expert wait", 3, 4, 2, 1),
        Stretch("base", 4, 10, 0, 2),
    ]
    # The last token is the expert's: what follows is no step.
    assert [stretch.name for stretch in cut([1, 3, 4], [0, 1])] == ["queue", "base", "expert wait"]
    # Cut short in the base's step, and while parked.
    assert cut([1, 3, 4], [0, 1], finished=False)[-1] == Stretch("base", 4, 10, 0, 0)
    assert cut([1, 3], [0], finished=False)[-1] == Stretch("expert wait", 3, 10, None, None)


def test_runs_of_one_expert_are_merged() -> None:
    found = cut([1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 1, 2, 0, 2])
    assert merged(found) == [
        Stretch("queue", 0, 1),
        Stretch("base", 1, 2, 0, 0),
        Stretch("expert wait", 2, 5, 1, 2),
        Stretch("base", 5, 6, 0, 0),  # another expert begins another run
        Stretch("expert wait", 6, 7, 2, 1),
        Stretch("base", 7, 8, 0, 1),
        Stretch("expert wait", 8, 9, 2, 1),
    ]
    assert merged(found, 3) == [
        Stretch("queue", 0, 1),
        Stretch("base and experts", 1, 6, None, 2),
        Stretch("base and experts", 6, 9, None, 3),
    ]
