"""The model: SigLIP tower -> adaptive average pooling -> two-layer projector -> spliced into Qwen3.

The forward pass in four steps:
  1. token embeddings e [T, 1, H] of the packed row;
  2. images through tower, pooling and projector: [N * t, H];
  3. image features take the places `slots` in e (under sequence parallelism e is then scattered along T);
  4. the language model over the packed row; documents do not see each other. Only positions with a target reach the output layer, so
     logits are [targets, V], never [T, V].
Steps 1 to 3 happen on the first pipeline stage, which alone holds the tower and the projector.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_infimed.config import Recipe
from megatron_infimed.data.batch import PackedBatch
from megatron_infimed.model import presets, specs
from megatron_infimed.model.vision import VisionTower, pool
from megatron_infimed.parallel.groups import Ranks


class Qwen3(GPTModel):
    """GPTModel whose loss touches only the positions that have a target."""

    def _postprocess(
        self, hidden_states: Tensor, *_args, labels: Tensor | None = None, loss_mask: Tensor | None = None, **_kwargs
    ) -> Tensor:
        """[T, 1, H] -> the loss of each target [targets] with labels and loss_mask; without them logits [T, V / tensor] (gathered: [T, V])."""
        if not self.post_process:
            return hidden_states
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        if labels is None or loss_mask is None:
            return self.output_layer(hidden_states, weight=weight)[0].squeeze(1)
        targets = loss_mask.nonzero().squeeze(1)
        logits, _ = self.output_layer(hidden_states.index_select(0, targets), weight=weight)
        return tensor_parallel.vocab_parallel_cross_entropy(logits.float(), labels[targets].unsqueeze(1)).squeeze(1)


class InfiMed(MegatronModule):
    """One pipeline stage of the model. `forward` takes a PackedBatch; what a stage does not hold it does not touch."""

    def __init__(self, recipe: Recipe, ranks: Ranks, gather_logits: bool = False) -> None:
        config = presets.language_config(recipe)
        super().__init__(config=config)
        lm, self.trainable = recipe.model.language, recipe.trainable
        self.model_type = ModelType.encoder_or_decoder  # the pipeline schedule asks for it
        self.pre_process, self.post_process = ranks.first_stage, ranks.last_stage
        self.share_embeddings_and_output_weights = lm.tied_embeddings
        self.vision_tower = VisionTower(recipe) if self.pre_process else None
        self.projector = (
            MLP(presets.projector_config(recipe), specs.projector_submodules(), input_size=recipe.model.vision.hidden_size,
                ffn_hidden_size=lm.hidden_size)
            if self.pre_process
            else None
        )  # fmt: skip
        layers = recipe.precision.layers
        self.language_model = Qwen3(
            config=config,
            transformer_layer_spec=specs.language_block(config, layers),  # type: ignore[arg-type] # TransformerBlock takes both
            vocab_size=lm.vocab_size,
            max_sequence_length=lm.max_positions,
            pre_process=self.pre_process,
            post_process=self.post_process,
            parallel_output=not gather_logits,
            share_embeddings_and_output_weights=lm.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=lm.rope_theta,  # type: ignore[arg-type]
            scatter_embedding_sequence_parallel=False,  # image features go in before the scatter
        )
        if self.post_process:
            output = self.language_model.output_layer
            output.sequence_parallel = False  # Qwen3._postprocess gathers, then selects
            output.allreduce_dgrad = ranks.tensor_size > 1
        for part, learns in (
            (self.vision_tower, self.trainable.vision),
            (self.projector, self.trainable.projector),
            (self.language_model, self.trainable.language),
        ):
            if part is not None:
                part.requires_grad_(learns)

    def forward(self, batch: PackedBatch, with_loss: bool = True) -> Tensor:
        """Hidden states [T, 1, H] on a stage that is not the last; there the loss of each target [targets], or without it logits [T, V]."""
        embeddings = self.embed(batch) if self.pre_process else None
        return self.language_model(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=embeddings,
            labels=batch.labels if with_loss else None,
            loss_mask=batch.loss_mask if with_loss else None,
            packed_seq_params=packed_seq_params(batch),
        )

    def embed(self, batch: PackedBatch) -> Tensor:
        """Tokens and images of a packed row -> [T, 1, H], or [T / tensor, 1, H] under sequence parallelism."""
        e_TH = self.language_model.embedding.word_embeddings(batch.tokens.unsqueeze(0)).squeeze(0)
        n_images = 0 if batch.pixels is None else len(batch.pixels)
        # A row without images still passes zero features through: the loss then hangs on a parameter that learns whichever parts do.
        if n_images or self.trainable.vision or self.trainable.projector:
            features = self.encode(batch.pixels, batch.tokens_per_image)
            if features.shape[0] != batch.slots.numel():
                raise ValueError(
                    f"{batch.slots.numel()} image slots but {n_images} images x {batch.tokens_per_image} tokens = {features.shape[0]}: "
                    "this plan was made for another phase; delete it or run `plan` again with this recipe"
                )
            e_TH = e_TH.index_copy(0, batch.slots, features)
        e_T1H = e_TH.unsqueeze(1)
        return scatter_to_sequence_parallel_region(e_T1H) if self.config.sequence_parallel else e_T1H

    def encode(self, pixels: Tensor | None, tokens_per_image: int) -> Tensor:
        """uint8 pixels [N, 3, S, S] -> visual tokens [N * t, H] in the language model's space; None -> [0, H]."""
        assert self.vision_tower is not None and self.projector is not None
        with contextlib.nullcontext() if self.trainable.vision else torch.no_grad():
            if pixels is None:
                pooled_NtC = self.vision_tower.position_embedding[:0].unsqueeze(0)
            else:
                pooled_NtC = pool(self.vision_tower(pixels), tokens_per_image)
        out, bias = self.projector(pooled_NtC.flatten(0, 1))
        return out + bias

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Called by the pipeline schedule with what the stage before sent."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor:
        return self.language_model.shared_embedding_or_output_weight()


def packed_seq_params(batch: PackedBatch) -> PackedSeqParams:
    """The documents' boundaries in Megatron-Core's terms."""
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )
