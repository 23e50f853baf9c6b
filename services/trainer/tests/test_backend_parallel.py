"""Two data-parallel ranks over gloo do what one does. Each rank is a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backend_parts import backend, make_rows, model_folder

from postroad_trainer.batch import StepSettings

DEADLINE_S = 120
RANK = """
import json, os, sys
from pathlib import Path
import torch
from backend_parts import backend, make_rows
from postroad_trainer.batch import StepSettings

folder, out, experts, seeds, save, load = json.loads(sys.argv[1])
experts = experts and tuple(experts)
trained = backend(Path(folder), micro_batch_tokens=40)
if load:
    trained.load(Path(load))
logprobs = [row.tolist() for row in trained.logprobs(make_rows(experts=experts))]
results = []
for seed in seeds:
    result = trained.train_step(make_rows(seed=seed, experts=experts), StepSettings(1e-3))
    results.append([result.loss, result.grad_norm, result.logprob_abs_diff_mean, result.logprob_abs_diff_max,
                    result.entropy, result.experts_differ_fraction or 0.0])
    if save and seed == 1:
        trained.save(Path(save))
lonely = trained.train_step(make_rows(groups=1, members=1, experts=experts), StepSettings(1e-3))  # one rank has no work
results.append([lonely.loss, lonely.grad_norm])
rank = os.environ["RANK"]
Path(out, f"{rank}.json").write_text(json.dumps({"digest": trained.digest(), "logprobs": logprobs, "results": results}))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def _two_ranks(tmp_path: Path, *arguments: Any) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    package = Path(__file__).parents[1]
    common = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(package), str(Path(__file__).parent)]),
    }
    out = tmp_path / f"out-{port}"
    out.mkdir()
    folder, *rest = arguments
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, json.dumps([str(folder), str(out), *rest])],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, error = rank.communicate(timeout=DEADLINE_S)
            assert rank.returncode == 0, error
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(("kind", "experts"), [("llama", None), ("qwen3_moe", (2, 2, 8))])
def test_two_ranks_do_what_one_does(tmp_path: Path, kind: str, experts: tuple[int, int, int] | None) -> None:
    folder = model_folder(tmp_path, kind)
    first, second = _two_ranks(tmp_path, folder, experts, [0, 1], None, None)
    assert first == second  # the digest above all
    alone = backend(folder)
    logprobs = alone.logprobs(make_rows(experts=experts))
    assert max(float(np.abs(a - np.asarray(b)).max()) for a, b in zip(logprobs, first["logprobs"], strict=True)) < 1e-5
    for seed, got in enumerate(first["results"][:2]):
        wanted = alone.train_step(make_rows(seed=seed, experts=experts), StepSettings(1e-3))
        assert got == pytest.approx(
            [
                wanted.loss,
                wanted.grad_norm,
                wanted.logprob_abs_diff_mean,
                wanted.logprob_abs_diff_max,
                wanted.entropy,
                wanted.experts_differ_fraction or 0.0,
            ],
            abs=1e-4,
            rel=1e-3,
        )
    lonely = alone.train_step(make_rows(groups=1, members=1, experts=experts), StepSettings(1e-3))
    assert first["results"][2] == pytest.approx([lonely.loss, lonely.grad_norm], abs=1e-4, rel=1e-3)


def test_two_ranks_resume_exactly(tmp_path: Path) -> None:
    folder, saved = model_folder(tmp_path), tmp_path / "saved"
    through = _two_ranks(tmp_path, folder, None, [0, 1, 2, 3], str(saved), None)
    assert len(list(saved.iterdir())) == 4
    resumed = _two_ranks(tmp_path, folder, None, [2, 3], None, str(saved))
    assert resumed[0]["digest"] == resumed[1]["digest"] == through[0]["digest"]
    assert resumed[0]["results"] == through[0]["results"][2:]
