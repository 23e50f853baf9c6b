"""Builds the model, its DDP wrapper and its optimizer. The same on CPU and GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state as state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from postroad_trainer.backend.settings import BackendError, BackendSettings, validate_model
from postroad_trainer.backend.spec import block_spec
from postroad_trainer.backend.visibility import LayoutTable
from postroad_trainer.models import Family, ModelConfiguration, family_of, read_configuration
from postroad_trainer.models.family import Mapping
from postroad_trainer.models.weights import entries_of, load_weights

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class BuiltModel:
    """chunks: this rank's GPTModels with their weights, one per virtual pipeline stage. mapping: their place in the
    whole model. table: where attention looks for the layout of a micro-batch."""

    configuration: ModelConfiguration
    family: Family
    config: Any
    chunks: list[Any]
    mapping: Mapping
    table: LayoutTable


RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    # attention keeps no scores here: what costs memory are the feed-forward blocks
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(settings: BackendSettings, configuration: ModelConfiguration, family: Family) -> Any:
    """megatron's TransformerConfig: the family's arguments, our sizes, and every fusion that needs CUDA off."""
    dtype, parallel = DTYPES[settings.dtype], settings.parallel
    arguments = {"moe_token_dispatcher_type": "alltoall", **family.arguments(configuration)}
    validate_model(parallel, arguments)
    recompute = dict(RECOMPUTE[parallel.recompute])
    if parallel.recompute == "selective":
        recompute["recompute_modules"] = ["mlp", "moe"] if arguments.get("num_moe_experts") else ["mlp"]
    interleaved, on_gpu = parallel.virtual_pipeline > 1, torch.device(torch.cuda.current_device()).type == "cuda"
    config = TransformerConfig(
        **arguments,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        sequence_parallel=parallel.sequence_parallel,
        variable_seq_lengths=parallel.pipeline > 1,  # micro-batches differ in length
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deterministic_mode=parallel.deterministic and torch.cuda.is_available(),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        perform_initialization=False,
        attention_softmax_in_fp32=True,
        calculate_per_token_loss=True,
        bias_dropout_fusion=False,
        bias_activation_fusion=on_gpu,  # SwiGLU compiled into one kernel
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        cross_entropy_loss_fusion=False,
        **recompute,
    )
    check_interleaving(config)
    return config


def check_interleaving(config: Any) -> None:
    """Raises BackendError for two interleaved stages without overlapped p2p: megatron then mixes up the stages'
    tensors, silently (logits off by 4.7 with 4 micro-batches of a tiny model, right with 2)."""
    interleaved = (config.virtual_pipeline_model_parallel_size or 1) > 1
    if interleaved and not (config.overlap_p2p_comm and not config.batch_p2p_comm):
        raise BackendError("virtual pipeline stages need overlap_p2p_comm without batch_p2p_comm")


def build_model(settings: BackendSettings) -> BuiltModel:
    """Reads the model folder of the settings. Raises ModelError for a folder that can't be used."""
    configuration = read_configuration(settings.model_path)
    family = family_of(configuration)
    config = transformer_config(settings, configuration, family)
    powers = torch.arange(0, config.kv_channels, 2, device=torch.cuda.current_device()) / config.kv_channels
    table = LayoutTable(configuration.rope_theta**-powers, config.params_dtype)
    virtual = settings.parallel.virtual_pipeline
    numbers = range(virtual) if virtual > 1 else [None]
    chunks = [_chunk(config, configuration, table, number) for number in numbers]
    tensor, expert = (
        state.get_tensor_model_parallel_rank(),
        state.get_expert_tensor_parallel_rank(),
    )
    mapping = Mapping(
        config.num_query_groups,
        config.kv_channels,
        (tensor, settings.parallel.tensor),
        (expert, settings.parallel.expert_tensor),
    )
    load_weights(chunks, family, mapping, settings.model_path)
    if settings.freeze_embedding:
        _freeze_embedding(chunks, family)
    return BuiltModel(configuration, family, config, chunks, mapping, table)


def _freeze_embedding(chunks: list[Any], family: Family) -> None:
    for entry in entries_of(chunks, family):
        if "model.embed_tokens.weight" in entry.names:
            entry.parameter.requires_grad_(False)
    for chunk in chunks:
        if chunk.pre_process:
            # a recomputed layer gives its parameters no gradient, silently, if none of its inputs asks for one
            chunk.embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())


def _chunk(config: Any, configuration: ModelConfiguration, table: LayoutTable, number: int | None) -> Any:
    vocabulary = configuration.integer("vocab_size")
    model = GPTModel(
        config,
        block_spec(config, table, number),
        vocab_size=vocabulary + -vocabulary % config.tensor_model_parallel_size,
        max_sequence_length=configuration.integer("max_position_embeddings"),
        pre_process=state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=number),
        post_process=state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=number),
        parallel_output=True,
        share_embeddings_and_output_weights=configuration.tied,
        position_embedding_type="none",  # TreeAttention rotates
        vp_stage=number,
    )
    model.vocabulary = vocabulary
    return model.to(torch.cuda.current_device())  # megatron makes routers on the host


def wrap_chunks(settings: BackendSettings, chunks: list[Any]) -> list[Any]:
    """megatron's DDP: float32 gradients in one buffer, reduced once at the end of the step."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=settings.parallel.distributed_optimizer,
    )
    wrapped = [
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    # The loss is normalised over the whole batch beforehand: gradients are summed and not divided again.
    chunks[0].config.finalize_model_grads_func = functools.partial(_finalize, finalize_model_grads)
    return wrapped


def _finalize(finalize: Any, chunks: list[Any], _tokens: torch.Tensor | None, **arguments: Any) -> None:
    finalize(chunks, None, **arguments)


def build_optimizer(settings: BackendSettings, wrapped: list[Any]) -> Any:
    """AdamW with float32 masters (bfloat16 models) through megatron; torch's fused kernel where torch does the work."""
    dtype = DTYPES[settings.dtype]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=0.0,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            weight_decay=settings.weight_decay,
            clip_grad=1.0,
            use_distributed_optimizer=settings.parallel.distributed_optimizer,
            params_dtype=dtype,
            bf16=dtype is torch.bfloat16,
        ),
        wrapped,
        use_gloo_process_groups=False,
    )
    for inner in torch_optimizers(optimizer):
        for group in inner.param_groups:
            group["fused"], group["foreach"] = True, False
    return optimizer


def torch_optimizers(optimizer: Any) -> list[Any]:
    """The torch optimizers inside megatron's: dense and expert parameters have one each."""
    return [part.optimizer for part in optimizer.chained_optimizers if part.optimizer is not None]
