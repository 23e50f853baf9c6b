"""kill -9 of every process while the mesh runs: the run finishes by itself, nothing is lost, twice or torn."""

from __future__ import annotations

import random

import pytest

KINDS = ["worker", "engine", "router", "reward", "trainer", "nats", "valkey"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_kill_of_each(mesh, kind):
    mesh.up("tiny", "trainer.steps=24", "trainer.checkpoint.every=4")
    mesh.wait_step(6)
    mesh.kill(kind)
    mesh.wait_finished()
    mesh.nothing_lost()
    assert all(line["equal"] for line in mesh.lines("replay", "--steps", "1:24"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_five_kills_of_each(mesh, kind):
    mesh.up("tiny", "trainer.steps=40")
    for number in range(1, 6):
        mesh.wait_step(6 * number, 300)
        mesh.wait_alive()
        mesh.kill(kind)
    mesh.wait_finished(600)
    mesh.nothing_lost()
    assert all(line["equal"] for line in mesh.lines("replay", "--steps", "1:40"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [1, 2])
def test_random_kills(mesh, seed):
    chooser = random.Random(seed)
    mesh.up("tiny", "trainer.steps=60")
    step = 2
    while step < 55:
        mesh.wait_step(step, 300)
        mesh.wait_alive()
        mesh.kill(chooser.choice(KINDS))
        step += chooser.randint(1, 3)
    mesh.wait_finished(900)
    mesh.nothing_lost()
    assert all(line["equal"] for line in mesh.lines("replay", "--steps", "1:60"))
