"""The trainer's step against a bare megatron-core loop with the same settings, in one run.

    python3 benchmarks/trainer.py [--device cuda] [--model dense,moe] [--steps 6] [--json]

The bare loop is what a user of megatron-core would write without Transformer Engine: GPTModel of the local spec with
torch's flash attention, megatron's rotary embedding, cross entropy over every token, DDP, its schedule and its AdamW.
Rows have one length and are all trained; weights are random and made here. Needs torch, megatron-core, pydantic.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from postroad.config.algorithm import AlgorithmSection
from postroad.config.parallel import ParallelSection
from postroad.config.shapes import tensors_of
from postroad_trainer.backend import BackendSettings, MegatronBackend, enter_thread
from postroad_trainer.backend.cpu_shim import import_megatron
from postroad_trainer.backend.parallel import initialise
from postroad_trainer.batch import StepSettings, TrainRow
from postroad_trainer.metrics import PEAK_FLOPS, flops_per_token

BASE: dict[str, Any] = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "attention_bias": False, "attention_dropout": 0.0,
    "max_position_embeddings": 40960, "use_sliding_window": False,
}  # fmt: skip
DENSE = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True}
MOE = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "tie_word_embeddings": False,
       "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}  # fmt: skip


def _sizes(vocab: int, hidden: int, inner: int, layers: int, heads: int, groups: int, head: int) -> dict[str, Any]:
    return {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": head}  # fmt: skip


def _experts(count: int, topk: int, inner: int) -> dict[str, Any]:
    return {"num_experts": count, "num_experts_per_tok": topk, "moe_intermediate_size": inner}


Note = Callable[..., float]  # (name, what to run, share of a step's FLOPs)
# model, then rows of a step, tokens of a row, tokens of a micro-batch
SHAPES: dict[str, dict[str, tuple[dict[str, Any], int, int, int]]] = {
    "cuda": {
        "dense": (BASE | DENSE | _sizes(151936, 1024, 3072, 28, 16, 8, 128), 8, 4096, 16384),
        "moe": (BASE | MOE | _sizes(32768, 2048, 6144, 12, 16, 4, 128) | _experts(32, 4, 1024), 8, 4096, 16384),
    },
    "cpu": {
        "dense": (BASE | DENSE | _sizes(2048, 256, 768, 4, 4, 2, 64), 8, 128, 512),
        "moe": (BASE | MOE | _sizes(2048, 256, 512, 4, 4, 2, 64) | _experts(8, 2, 256), 8, 128, 512),
    },
}


def write_model(folder: Path, values: dict[str, Any], device: str) -> None:
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name, shape in ((each.name, each.shape) for each in tensors_of(values)):
        tensor = torch.ones(shape, device=device) if len(shape) == 1 else None
        if tensor is None:
            tensor = torch.randn(shape, generator=generator, device=device) * 0.02
        tensors[name] = tensor.to(torch.bfloat16 if device == "cuda" else torch.float32).cpu()
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def make_rows(values: dict[str, Any], rows: int, length: int) -> list[TrainRow]:
    random = np.random.default_rng(0)
    made = []
    for number in range(rows):
        tokens = random.integers(0, values["vocab_size"], length + 1).astype(np.int32)
        mask = np.ones(length + 1, np.uint8)
        mask[0] = 0
        logprobs = np.full(length + 1, -10.0, np.float32) * mask
        made.append(TrainRow(str(number), str(number), tokens, mask, logprobs, float(random.normal())))
    return made


class Bare:
    """A plain megatron-core training loop over [rows, length] tokens."""

    def __init__(self, backend_settings: BackendSettings, values: dict[str, Any], micro_rows: int) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        from postroad_trainer.backend import construction
        from postroad_trainer.models import family_of, read_configuration

        configuration = read_configuration(backend_settings.model_path)
        config = construction.transformer_config(backend_settings, configuration, family_of(configuration))
        config.perform_initialization, config.moe_enable_routing_replay = True, False
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = _flash_attention
        model = GPTModel(
            config, spec, vocab_size=values["vocab_size"], max_sequence_length=values["max_position_embeddings"],
            share_embeddings_and_output_weights=values["tie_word_embeddings"], position_embedding_type="rope",
            rotary_base=values["rope_theta"],
        ).to(torch.cuda.current_device(), config.params_dtype)  # fmt: skip
        config.finalize_model_grads_func = finalize_model_grads
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False)
        self.model = DistributedDataParallel(config, ddp, model)
        self.optimizer = construction.build_optimizer(backend_settings, [self.model])
        self.config, self.micro_rows = config, micro_rows

    def step(self, tokens: torch.Tensor) -> float:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        batches = zip(inputs.split(self.micro_rows), labels.split(self.micro_rows), strict=True)

        def forward(iterator: Any, model: Any) -> Any:
            x, y = next(iterator)
            losses = model(x, torch.zeros_like(x), None, labels=y)
            return losses, lambda losses: (losses.sum(), torch.tensor(y.numel(), dtype=torch.int), {})

        self.model.zero_grad_buffer()
        get_forward_backward_func()(
            forward_step_func=forward, data_iterator=iter(batches), model=self.model,
            num_microbatches=len(tokens) // self.micro_rows, seq_length=inputs.shape[1],
            micro_batch_size=self.micro_rows, forward_only=False,
        )  # fmt: skip
        for part in self.optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                group["lr"] = 1e-6
        norm = self.optimizer.step()[1]
        self.optimizer.zero_grad()
        return float(norm)


def _flash_attention(*_: Any, **arguments: Any) -> Any:
    """A core attention of torch's causal flash attention."""
    from megatron.core.transformer.module import MegatronModule

    class Attention(MegatronModule):
        def forward(self, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return out.permute(2, 0, 1, 3).flatten(2)

    return Attention(config=arguments["config"])


def timed(run: Callable[[], Any], steps: int, warm_up: int) -> tuple[float, float]:
    """(median seconds, peak GiB of the device). On the CPU seconds of this process's own: the machine may be shared."""
    seconds, clock = [], time.perf_counter if torch.cuda.is_available() else time.process_time
    for number in range(warm_up + steps):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            if number == warm_up:
                torch.cuda.reset_peak_memory_stats()
        started = clock()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number >= warm_up:
            seconds.append(clock() - started)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return statistics.median(seconds), peak


def measure(kind: str, device: str, steps: int, which: str) -> list[dict[str, Any]]:
    values, count, length, budget = SHAPES[device][kind]
    rows, flops = make_rows(values, count, length), flops_per_token(values, length)
    cards = [peak for name, peak in PEAK_FLOPS.items() if device == "cuda" and name in torch.cuda.get_device_name()]
    lines = []

    def note(name: str, run: Callable[[], Any], share: float = 1.0) -> None:
        seconds, memory = timed(run, steps, 2)
        tokens = count * length / seconds
        line = {"model": kind, "what": name, "seconds": seconds, "tokens_per_s": tokens, "memory_gib": memory}
        lines.append(line | ({"mfu": tokens * flops * share / cards[0]} if cards else {}))
        print(f"{kind:6s} {name:28s} {seconds:8.3f} s  {tokens:10.0f} tok/s", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="postroad-trainer-") as folder:
        write_model(Path(folder), values, device)
        dtype = "bfloat16" if device == "cuda" else "float32"
        parallel = ParallelSection(deterministic=False)
        settings = BackendSettings(Path(folder), dtype=dtype, parallel=parallel, micro_batch_tokens=budget + 1)
        if which == "ours":
            _measure_ours(MegatronBackend(settings), rows, values, note)
            return lines
        import_megatron()
        enter_thread()
        initialise(settings)
        bare = Bare(settings, values, budget // length)
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows]).astype(np.int64)).to(torch.cuda.current_device())
    note("bare loop", lambda: bare.step(tokens))
    return lines


def _measure_ours(ours: MegatronBackend, rows: list[TrainRow], values: dict[str, Any], note: Note) -> None:
    step = StepSettings(1e-6, AlgorithmSection())
    note("step", lambda: ours.train_step(rows, step))
    note("old log-probabilities", lambda: ours.logprobs(rows), 1 / 3)
    if "num_experts" not in values:
        return
    random, topk = np.random.default_rng(1), values["num_experts_per_tok"]
    shape = (len(rows[0].tokens) - 1, values["num_hidden_layers"], values["num_experts"])
    even = [np.argsort(random.random(shape, np.float32), -1)[..., :topk].astype(np.uint8) for _ in rows]
    for name, experts in (("step with R3", ours.record_experts(rows)), ("step with R3, even experts", even)):
        replayed = [replace(row, routed_experts=chosen) for row, chosen in zip(rows, experts, strict=True)]
        note(name, lambda replayed=replayed: ours.train_step(replayed, step))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--model", default="dense,moe")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--which", choices=("ours", "bare"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.which:
        print(json.dumps(measure(arguments.model, arguments.device, arguments.steps, arguments.which)))
        return 0
    lines: list[dict[str, Any]] = []
    for model, which in itertools.product(arguments.model.split(","), ("ours", "bare")):
        # a process each: a model that was trained is not freed in its own
        command = [sys.executable, __file__, "--device", arguments.device, "--model", model, "--which", which]
        done = subprocess.run(
            [*command, "--steps", str(arguments.steps)], stdout=subprocess.PIPE, check=True, text=True
        )
        lines += json.loads(done.stdout.splitlines()[-1])
    seconds = {(line["model"], line["what"]): line["seconds"] for line in lines}
    ratios = {model: seconds[model, "bare loop"] / seconds[model, "step"] for model in arguments.model.split(",")}
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    result: dict[str, Any] = {"device": device, "torch": torch.__version__, "lines": lines, "ratio": ratios}
    if ("moe", "step with R3") in seconds:
        result["r3_cost"] = seconds["moe", "step with R3"] / seconds["moe", "step"] - 1
    print(json.dumps(result, indent=None if arguments.json else 1))
    return 0 if min(ratios.values()) >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
