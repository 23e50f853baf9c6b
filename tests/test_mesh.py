"""The road end to end on real parts: it learns, nothing is lost, and what was trained can be trained again."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import pytest

from postroad.supervisor.servers import free_port, listening
from postroad_trainer.models.tiny import write_tiny_model


def test_a_run_finishes_and_every_digest_is_repeated(mesh):
    mesh.up("tiny", "trainer.steps=8", "trainer.checkpoint.every=3")
    mesh.wait_finished()
    audit = mesh.nothing_lost()
    assert (audit["trained"], audit["pending"]) == (8 * 8 * 8, 0)
    steps = mesh.lines("steps")
    assert [step["step"] for step in steps if step["step"]] == list(range(1, 9))
    assert len({step["digest"] for step in steps}) >= 6  # a step without any advantage leaves the weights as they are
    replayed = mesh.lines("replay", "--steps", "1:8")
    assert len(replayed) == 8 and all(line["equal"] for line in replayed)


@pytest.mark.parametrize("staleness", [0, 2])
def test_staleness_is_bounded(mesh, staleness):
    mesh.up("tiny", "trainer.steps=6", f"trainer.staleness={staleness}")
    mesh.wait_finished()
    assert max(step["staleness_max"] for step in mesh.lines("steps")) <= staleness
    mesh.nothing_lost()


def test_experts_are_captured_and_replayed(mesh):
    mesh.up("demo-moe", "trainer.steps=4", "evaluation=[]")
    mesh.wait_finished()
    steps = [step for step in mesh.lines("steps") if step["step"]]
    differ = [step["metrics"].get("experts_differ_fraction") for step in steps]
    assert any(value is not None for value in differ) and all(value is None or value < 0.3 for value in differ)
    mesh.nothing_lost()


def test_equal_rewards_are_filtered_refilled_and_counted(mesh):
    mesh.up("tiny", "trainer.steps=4", "trainer.filter=zero_std", "rollout.group_size=2")
    mesh.wait_finished()
    audit = mesh.nothing_lost()
    assert audit["trained"] == 4 * 8 * 2
    assert audit["dead"] > 0
    assert audit["dead"] == audit["reasons"].get("filtered", 0)


def test_a_stopped_run_goes_on_where_it_was(mesh):
    mesh.up("tiny", "trainer.steps=24")
    mesh.wait_step(4)
    mesh.down()
    mesh.up("tiny", "trainer.steps=24")
    mesh.wait_finished()
    mesh.nothing_lost()
    assert all(line["equal"] for line in mesh.lines("replay", "--steps", "1:24"))


@pytest.mark.timeout(1200)
def test_the_demo_learns(mesh):
    """The first minutes of `make demo`: a pretrained model gets better at products, through all four services."""
    mesh.up("demo", "trainer.steps=15", "evaluation=[]")
    mesh.wait_finished(1000)
    rewards = [step["reward_mean"] for step in mesh.lines("steps") if step["step"]]
    first, last = sum(rewards[:3]) / 3, sum(rewards[-3:]) / 3
    assert last > first + 0.2, rewards
    mesh.nothing_lost()


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_given_answers_are_learned_without_engines(mesh, tmp_path, algorithm):
    """The trainer alone, killed on the way: every conversation counts once, digests repeat, the loss falls."""
    talk = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba"}]
    worse = [talk[0], {"role": "assistant", "content": "ab"}]
    rows = [
        {"chosen": [{"role": "user", "content": f"{i} {talk[0]['content']}"}, talk[1]], "rejected": worse}
        for i in range(64)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"kind": "file", "path": str(tmp_path / "rows.jsonl"), "prompt_key": "chosen", "label_key": "rejected"}
    evaluation = [{"name": "held-out", "data": data, "rows": 8}]
    mesh.up("sft", "model.bundled=tiny-llama", "model.dtype=float32", f"data={json.dumps(data)}",
            f"evaluation={json.dumps(evaluation)}", f"trainer.algorithm={algorithm}", "trainer.steps=12",
            "trainer.groups_per_step=8", "trainer.learning_rate=1e-3", "trainer.checkpoint.every=5")  # fmt: skip
    mesh.wait_step(7)
    mesh.kill("trainer")
    mesh.wait_finished()
    assert {process["kind"] for process in mesh.read_state()["processes"]} == {"nats", "valkey", "trainer"}
    audit = mesh.nothing_lost()
    assert audit["trained"] == 12 * 8 * (2 if algorithm == "dpo" else 1)
    losses = mesh.read_state()["evaluations"]["held-out"]
    assert losses["12"]["loss"] < losses["0"]["loss"] - 0.3
    assert all(line["equal"] for line in mesh.lines("replay", "--steps", "1:12"))


def test_a_step_with_all_it_may_need_is_repeated_without_its_teacher(mesh, tmp_path):
    """A teacher engine, a critic, the reference, old scores, several updates: what the teacher said is in the log and the
    critic in the checkpoint, so a killed trainer and a replay get equal digests."""
    model = tmp_path / "teacher"
    write_tiny_model(model, "llama", 7)
    port = free_port()
    serve = ("postroad_rollout.engine.server", "--model", model, "--port", str(port))
    teacher = subprocess.Popen([sys.executable, "-m", *serve])
    algorithm = {"name": "ppo", "distillation_coefficient": 1.0, "reward_weight": 0.1, "kl_loss_coefficient": 0.01,
                 "updates": 2, "teacher_url": f"http://127.0.0.1:{port}"}  # fmt: skip
    try:
        asyncio.run(listening([port], 60.0))
        mesh.up("tiny", "trainer.steps=10", "trainer.groups_per_step=4", "rollout.group_size=4", "trainer.checkpoint.every=4",
                "trainer.learning_rate=3e-3", f"trainer.algorithm={json.dumps(algorithm)}")  # fmt: skip
        mesh.wait_step(6)
        mesh.kill("trainer")
        mesh.wait_finished()
    finally:
        teacher.kill()
        teacher.wait()
    steps = [step for step in mesh.lines("steps") if step["step"]]
    assert all({"teacher_reverse_kl", "critic_loss", "kl_reference", "seconds_old"} <= set(s["metrics"]) for s in steps)
    mesh.nothing_lost()
    assert all(line["equal"] for line in mesh.lines("replay", "--steps", "1:10"))
