"""Every parallel layout gives the loss and the gradients of one process, dense and MoE with replayed experts."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from backend_parts import backend, model_folder
from parity_rank import write_reference

TOLERANCE = 1e-5
TP2SP = {"tensor": 2, "sequence_parallel": True}
SHARDED = {"distributed_optimizer": True}
DENSE = {
    "TP2": {"tensor": 2},
    "TP2xSP": TP2SP,
    "PP2": {"pipeline": 2},
    "PP2xVPP2": {"pipeline": 2, "virtual_pipeline": 2},
    "CP2": {"context": 2},
    "DP2": {},
    "DP2 distributed optimizer": SHARDED,
}
MOE = {
    **{name: layout for name, layout in DENSE.items() if name != "TP2"},
    "EP2": {"expert": 2},
    "TP2xEP2": {**TP2SP, "expert": 2},
}
MORE_MOE = {"TP2xETP2": {**TP2SP, "expert_tensor": 2}, "EP2 distributed optimizer": {"expert": 2, **SHARDED}}
WORLD4 = {
    "TP2xPP2": {**TP2SP, "pipeline": 2},
    "TP2xPP2xVPP2": {**TP2SP, "pipeline": 2, "virtual_pipeline": 2},
    "TP2xCP2": {**TP2SP, "context": 2},
    "PP2xCP2": {"pipeline": 2, "context": 2, **SHARDED},
    "TP2xDP2 distributed optimizer": {**TP2SP, **SHARDED},
    "PP4": {"pipeline": 4},
}
WORLD4_MOE = {
    **WORLD4,
    "TP2xPP2xEP2": {**TP2SP, "pipeline": 2, "expert": 2},
    "EP2xDP2 distributed optimizer": {"expert": 2, **SHARDED},
    "EP4": {"expert": 4},
    "CP2xEP2": {"context": 2, "expert": 2},
    "CP2xTP2xEP4": {**TP2SP, "context": 2, "expert": 4, **SHARDED},
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"num_hidden_layers": 4, "tie_word_embeddings": True, "vocab_size": 101},
    "qwen3_moe": {"num_hidden_layers": 4, "mlp_only_layers": [0]},
}
MOE_ROUTING = (3, 2, 8)


PACKED, BY_ROW = True, False
CUTS = [(PACKED, "none"), (PACKED, "full"), (BY_ROW, "full")]


def _cases(tmp_path: Path, kind: str, layouts: dict[str, Any], cuts: list[tuple[bool, str]]) -> list[dict[str, Any]]:
    model = model_folder(tmp_path, kind, **MODELS[kind])
    cases = []
    for (packing, recompute), (name, layout) in itertools.product(cuts, layouts.items()):
        reference = tmp_path / f"packing-{packing}.safetensors"
        experts = MOE_ROUTING if kind == "qwen3_moe" else None
        case = {"model": str(model), "experts": experts, "packing": packing, "reference": str(reference)}
        if not reference.exists():
            write_reference(case, reference)
        title = f"{name}, {'packed' if packing else 'by row'}, recompute {recompute}"
        cases.append({**case, "name": title, "parallel": {**layout, "recompute": recompute}})
    return cases


# DDP's hooks keep a model and the threads of its gloo groups alive as long as the process: so many cases share one
CASES_OF_A_PROCESS = 14


def run_ranks(tmp_path: Path, world: int, cases: list[dict[str, Any]], deadline_s: float) -> list[dict[str, Any]]:
    """The results of every rank, by case."""
    results: list[dict[str, Any]] = [{} for _ in range(world)]
    for start in range(0, len(cases), CASES_OF_A_PROCESS):
        folder = tmp_path / f"cases-{start}"
        folder.mkdir()
        part = _run_processes(folder, world, cases[start : start + CASES_OF_A_PROCESS], deadline_s)
        results = [{**before, **new} for before, new in zip(results, part, strict=True)]
    return results


def _run_processes(tmp_path: Path, world: int, cases: list[dict[str, Any]], deadline_s: float) -> list[dict[str, Any]]:
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    here = Path(__file__).parent
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")},
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]),
    }
    ranks = []
    try:
        for rank in range(world):
            command = [sys.executable, str(here / "parity_rank.py"), str(rank), str(world), str(tmp_path)]
            ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        errors = [process.communicate(timeout=deadline_s)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert not any(process.returncode for process in ranks), "\n".join(error[-3000:] for error in errors)
    return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]


def wrong_cases(results: list[dict[str, Any]], moe: bool) -> list[str]:
    lines, wrong = [], []
    for name in results[0]:
        worst = {key: max(result[name][key] for result in results) for key in results[0][name]}
        lines.append(f"{name:60s} " + "  ".join(f"{key} {value:.1e}" for key, value in worst.items()))
        measured = ("logprobs", "loss", "gradient", "after", "recorded")
        if max(worst[key] for key in measured) > TOLERANCE or worst["norm"] > 10 * TOLERANCE:
            wrong.append(lines[-1])
        if moe and worst["router"] < 1e-3:
            wrong.append(f"{name}: no gradient reached a router")
    print("\n".join(lines))
    return wrong


RESUMES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the same": ({"expert": 2, **SHARDED}, {"expert": 2, **SHARDED}),
    "the same in a pipeline": ({"pipeline": 2, "virtual_pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}),
    "EP1 to EP2": ({}, {"expert": 2}),
    "EP2 to DP2 distributed optimizer": ({"expert": 2}, SHARDED),
    "DP2 distributed optimizer to TP2xETP2": (SHARDED, {**TP2SP, "expert_tensor": 2}),
    "TP2xEP2 distributed optimizer to PP2": ({**TP2SP, "expert": 2, **SHARDED}, {"pipeline": 2}),
    "PP2 to CP2": ({"pipeline": 2}, {"context": 2}),
}


def test_a_checkpoint_goes_on_in_any_layout(tmp_path: Path) -> None:
    """Exactly in an equal layout; in another with equal weights, masters and moments, so that only sums differ."""
    model = model_folder(tmp_path, "qwen3_moe", **MODELS["qwen3_moe"])
    cases = [
        {"name": name, "model": str(model), "experts": MOE_ROUTING, "from": before, "to": after}
        for name, (before, after) in RESUMES.items()
    ]
    (lead, *others) = run_ranks(tmp_path, 2, cases, 300)
    for name, (before, after) in RESUMES.items():
        assert all(result[name]["loaded"] for result in (lead, *others)), name
        assert lead[name]["after"] < TOLERANCE, name
        assert lead[name]["same"] or before != after, name
        alone = backend(model)
        alone.load(Path(lead[name]["folder"]))
        assert alone.digest() == lead[name]["digest"], name


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_two_ranks_in_every_layout(tmp_path: Path, kind: str) -> None:
    cases = _cases(tmp_path, kind, MOE if kind == "qwen3_moe" else DENSE, CUTS)
    assert not wrong_cases(run_ranks(tmp_path, 2, cases, 300), kind == "qwen3_moe")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_whole_matrix(tmp_path: Path, ranks: int, kind: str) -> None:
    two, four = (MOE | MORE_MOE, WORLD4_MOE) if kind == "qwen3_moe" else (DENSE, WORLD4)
    cuts = list(itertools.product([PACKED, BY_ROW], ["none", "selective", "full"]))
    cases = _cases(tmp_path, kind, two if ranks == 2 else four, cuts)
    assert not wrong_cases(run_ranks(tmp_path, ranks, cases, 1500), kind == "qwen3_moe")
