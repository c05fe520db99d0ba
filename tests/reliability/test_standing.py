"""Which rank the others wait for, and what is said of it: worked by hand."""

import sys

import pytest
import torch

from fastalign.training.standing import (
    BACKWARD,
    COLLECTIVE,
    FREE,
    Standing,
    Table,
    accusation,
    furthest_behind,
    where,
)


def standing(rank, *, step=5, waits=FREE, beats=1, **changes):
    given = {"host": f"h{rank}", "pid": 100 + rank, "turn": 9, "doing": "computing", "age": 600.4 - rank}
    given |= {"place": "a/b.py:1, f", "paused": False, "ended": None} | changes
    return Standing(rank=rank, step=step, waits=waits, beats=beats, **given)


@pytest.mark.parametrize(
    ("standings", "first"),
    [
        ([standing(0, waits=COLLECTIVE), standing(1)], [1]),
        ([standing(0, waits=BACKWARD, beats=2), standing(1, beats=3)], [1]),
        ([standing(0, step=6), standing(1, waits=COLLECTIVE)], [1]),
        ([standing(0, beats=2), standing(1, beats=1), standing(2, beats=1, waits=BACKWARD)], [1]),
        ([standing(0, step=4), standing(1, step=5, mute=True)], [1]),
        ([standing(0, mute=True), standing(1, ended="ValueError: x")], [1]),
        ([standing(0, step=1, ended=""), standing(1)], [1]),
        ([standing(0, waits=BACKWARD), standing(1, waits=BACKWARD)], [0, 1]),
    ],
)
def test_who_the_others_wait_for(standings, first):
    assert [told.rank for told in furthest_behind(standings)] == first


def test_a_starved_rank_ages_with_who_listens():
    """It tells 3 seconds of its own in 300; its beat came at 100, its last word at 390."""
    table = Table(mute=50)
    for turn, now in enumerate((100, 390)):
        table.hear(standing(1, turn=turn, age=3.0), now)
    table.hear(standing(1, turn=1, age=4.0), 395)  # the same word again
    (told,) = table.at(400)
    assert (told.age, told.silence, told.mute) == (300, 10, False)
    table.hear(standing(1, turn=2, age=0.5, beats=2), 440)
    (told,) = table.at(500)
    assert (told.age, told.silence, told.mute) == (60.5, 60, True)


@pytest.mark.parametrize(
    ("suspects", "line"),
    [
        (
            [standing(1)],
            "rank 1 (h1, pid 101) stopped responding at step 5: computing for 599 s, at a/b.py:1, f",
        ),
        (
            [standing(1, mute=True)],
            "rank 1 (h1, pid 101) has not answered for 599 s: its process or machine is stopped, or gone; "
            "last seen at step 5, computing",
        ),
        (
            [standing(1, ended="ValueError: x")],
            "rank 1 (h1, pid 101) ended at step 5 with ValueError: x, 599 s ago, and the others wait",
        ),
        (
            [standing(rank) for rank in range(10)],
            "10 ranks (0, 1, 2, 3, 4, 5, 6, 7, ...) stopped responding at the same place, step 5: computing for "
            "591 s: a GPU or the network hangs; rank 0 (h0, pid 100) is at a/b.py:1, f",
        ),
        (
            [standing(rank, mute=True) for rank in range(2)],
            "rank 0 (h0, pid 100), rank 1 (h1, pid 101) have not answered for 599 s: these are stopped, or gone; "
            "last seen at step 5, computing",
        ),
    ],
)
def test_what_is_said(suspects, line):
    assert accusation(suspects) == line


def test_where_a_thread_is():
    seen = []
    tensor = torch.ones(1, requires_grad=True)
    tensor.register_hook(lambda _: seen.append(where(sys._getframe())))
    here = sys._getframe().f_lineno + 1
    assert where(sys._getframe()) == (f"reliability/test_standing.py:{here}, test_where_a_thread_is", FREE)
    tensor.sum().backward()
    assert seen[0][1] == BACKWARD
    assert where(None) == ("an unknown place", FREE)
