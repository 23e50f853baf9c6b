"""Builds the model, its DDP wrapper and its optimizer. The same on CPU and GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from postroad_trainer.backend.settings import BackendSettings
from postroad_trainer.backend.spec import LayoutRotary, LayoutTable, block_spec
from postroad_trainer.models import Family, ModelConfiguration, family_of, read_configuration
from postroad_trainer.models.weights import load_weights

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class BuiltModel:
    """model: the GPTModel with its weights. table: where its attention looks for the layout of a micro-batch."""

    configuration: ModelConfiguration
    family: Family
    model: Any
    table: LayoutTable


def transformer_config(settings: BackendSettings, configuration: ModelConfiguration, family: Family) -> Any:
    """megatron's TransformerConfig: the family's arguments, our sizes, and every fusion that needs CUDA off."""
    dtype = DTYPES[settings.dtype]
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        **family.arguments(configuration),
        tensor_model_parallel_size=settings.tensor_parallel,
        pipeline_model_parallel_size=settings.pipeline_parallel,
        context_parallel_size=settings.context_parallel,
        expert_model_parallel_size=settings.expert_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        perform_initialization=False,
        attention_softmax_in_fp32=True,
        calculate_per_token_loss=True,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        cross_entropy_loss_fusion=False,
        **(recompute if settings.recompute else {}),
    )


def build_model(settings: BackendSettings) -> BuiltModel:
    """Reads the model folder of the settings. Raises ModelError for a folder that can't be used."""
    configuration = read_configuration(settings.model_path)
    family = family_of(configuration)
    config = transformer_config(settings, configuration, family)
    table = LayoutTable()
    model = GPTModel(
        config,
        block_spec(config, table),
        vocab_size=configuration.integer("vocab_size"),
        max_sequence_length=configuration.integer("max_position_embeddings"),
        parallel_output=True,
        share_embeddings_and_output_weights=configuration.tied,
        position_embedding_type="rope",
        rotary_base=configuration.rope_theta,
    )
    model.rotary_pos_emb = LayoutRotary(table, model.rotary_pos_emb.inv_freq)
    model.to(torch.cuda.current_device())  # megatron makes routers on the host
    load_weights(model, family, settings.model_path)
    if settings.freeze_embedding:
        model.embedding.word_embeddings.weight.requires_grad_(False)
    return BuiltModel(configuration, family, model, table)


def wrap_model(model: Any) -> Any:
    """megatron's DDP: float32 gradients in one buffer, reduced once at the end of the step."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=False
    )
    wrapped = DistributedDataParallel(model.config, config, model)
    # The loss is normalised over the whole batch beforehand: gradients are summed and not divided again.
    model.config.finalize_model_grads_func = functools.partial(_finalize, finalize_model_grads)
    return wrapped


def _finalize(finalize: Any, chunks: list[Any], _tokens: torch.Tensor | None, **arguments: Any) -> None:
    finalize(chunks, None, **arguments)


def build_optimizer(settings: BackendSettings, wrapped: Any) -> Any:
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
            use_distributed_optimizer=False,
            params_dtype=dtype,
            bf16=dtype is torch.bfloat16,
        ),
        [wrapped],
    )
    for inner in torch_optimizers(optimizer):
        for group in inner.param_groups:
            group["fused"], group["foreach"] = True, False
    return optimizer


def torch_optimizers(optimizer: Any) -> list[Any]:
    """The torch optimizers inside megatron's: dense and expert parameters have one each."""
    return [part.optimizer for part in optimizer.chained_optimizers if part.optimizer is not None]
