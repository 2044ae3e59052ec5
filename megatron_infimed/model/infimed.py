"""The model: SigLIP tower -> adaptive average pooling -> two-layer projector -> spliced into Qwen3.

The forward pass in four steps:
  1. token embeddings e [T, 1, H] of the packed row;
  2. images through tower, pooling and projector: [N * t, H];
  3. image features take the places `slots` in e (under sequence parallelism e is then scattered along T);
  4. the language model over the packed row; documents do not see each other. Only positions with a target reach the output layer, a chunk
     at a time (loss.py), so logits are [chunk, V], never [T, V].
Steps 1 to 3 happen on the first piece of the first pipeline stage, which alone holds the tower and the projector.

Processes that share a row share its images too: each decodes its block of them (data/loader.py); the blocks of a tensor parallel group are
gathered as pixels, because its processes run the tower together, those of a context parallel group as features.
"""

from __future__ import annotations

import contextlib
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_infimed.config import Recipe
from megatron_infimed.data.batch import PackedBatch
from megatron_infimed.model import presets, specs
from megatron_infimed.model.loss import linear_cross_entropy
from megatron_infimed.model.vision import VisionTower, pool
from megatron_infimed.parallel import cpu
from megatron_infimed.parallel.groups import Ranks


class OutputLayer(ColumnParallelLinear):
    """Megatron-Core's output layer, which with labels gives losses and never holds the logits of more than `chunk` positions."""

    def forward(self, input_: Tensor, weight: Tensor | None = None, labels: Tensor | None = None, chunk: int = 0, **kwargs: Any) -> Any:
        if labels is None:
            return super().forward(input_, weight=weight, **kwargs)
        weight, group = cast(Tensor, self.weight if weight is None else weight), cast(dist.ProcessGroup, self.tp_group)
        return linear_cross_entropy(input_, weight, labels, chunk, group)


class Qwen3(GPTModel):
    """GPTModel whose loss touches only the positions that have a target."""

    def __init__(self, loss_tokens: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.loss_tokens = loss_tokens
        if self.post_process:
            self.output_layer.__class__ = OutputLayer  # GPTModel names its class itself
            self.output_layer.sequence_parallel = False  # _postprocess gathers, then selects
            self.output_layer.allreduce_dgrad = self.config.tensor_model_parallel_size > 1

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
        hidden_NH = hidden_states.index_select(0, targets).squeeze(1)
        return self.output_layer(hidden_NH, weight=weight, labels=labels[targets], chunk=self.loss_tokens)


class InfiMed(MegatronModule):
    """A piece of the model: all of it, a pipeline stage, or one of a stage's `parallel.virtual` pieces. `forward` takes a PackedBatch; what a
    piece does not hold it does not touch.

    Args:
        gather_logits: logits come whole, not split over the tensor parallel group.
        piece: its number on this pipeline stage.
        config: that of the stage's first piece: Megatron's schedule wants one for all.
    """

    def __init__(
        self, recipe: Recipe, ranks: Ranks, gather_logits: bool = False, piece: int = 0, config: TransformerConfig | None = None
    ) -> None:
        config = config or presets.language_config(recipe)
        super().__init__(config=config)
        lm, self.trainable = recipe.model.language, recipe.trainable
        self.model_type = ModelType.encoder_or_decoder  # the pipeline schedule asks for it
        self.piece, self.vp_stage = piece, piece if ranks.virtual_size > 1 else None
        self.pre_process = ranks.first_stage and piece == 0
        self.post_process = ranks.last_stage and piece == ranks.virtual_size - 1
        self.tensor_group, self.context_group = ranks.tensor_group, ranks.context_group
        self.images_at_once = recipe.batch.vision_images
        self.always_encodes = recipe.parallel.overlap and recipe.trainable.vision
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
            loss_tokens=recipe.batch.loss_tokens,
            config=config,
            transformer_layer_spec=specs.language_block(config, layers, self.vp_stage),  # TransformerBlock takes both
            vocab_size=lm.vocab_size,
            max_sequence_length=lm.max_positions,
            pre_process=self.pre_process,
            post_process=self.post_process,
            parallel_output=not gather_logits,
            share_embeddings_and_output_weights=lm.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=lm.rope_theta,  # type: ignore[arg-type]
            scatter_embedding_sequence_parallel=False,  # image features go in before the scatter
            vp_stage=self.vp_stage,
        )
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
        if batch.counts.images:
            features = self._image_features(batch)
            if batch.features is None and features.shape[0] != batch.slots.numel():
                raise ValueError(
                    f"{batch.slots.numel()} image slots but {batch.counts.images} images x {batch.tokens_per_image} tokens = "
                    f"{features.shape[0]}: this plan was made for another phase; delete it or run `plan` again with this recipe"
                )
            e_TH = e_TH.index_copy(0, batch.slots, features if batch.features is None else features.index_select(0, batch.features))
        elif self.always_encodes:
            # Overlapped reduction waits for a gradient of every weight that learns: a row without images gives the tower zeros.
            blank = torch.zeros(1, 3, batch.image_size, batch.image_size, dtype=torch.uint8, device=e_TH.device)
            e_TH = e_TH + 0.0 * self.encode(blank, batch.tokens_per_image).sum()
        elif self.trainable.vision or self.trainable.projector:
            # Zero features pass through: the loss then hangs on a parameter that learns whichever parts do.
            e_TH = e_TH.index_copy(0, batch.slots, self.encode(None, batch.tokens_per_image))
        e_T1H = e_TH.unsqueeze(1)
        return scatter_to_sequence_parallel_region(e_T1H) if self.config.sequence_parallel else e_T1H

    def _image_features(self, batch: PackedBatch) -> Tensor:
        """[N * t, H] of all images of the row, of which this process may hold a block alone."""
        device = batch.tokens.device
        pixels = torch.empty(0, 3, batch.image_size, batch.image_size, dtype=torch.uint8, device=device)
        pixels = pixels if batch.pixels is None else batch.pixels
        sharing = self.tensor_group.size() * self.context_group.size()
        if sharing == 1:
            return self.encode(pixels, batch.tokens_per_image)
        missing = -(-batch.counts.images // sharing) - len(pixels)
        block = torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])])
        held = [torch.empty_like(block) for _ in range(self.tensor_group.size())]
        dist.all_gather(held, block, group=self.tensor_group)
        features = self.encode(torch.cat(held), batch.tokens_per_image)
        if self.context_group.size() > 1:
            features = gather_from_sequence_parallel_region(features, group=self.context_group)
        return features[: batch.counts.images * batch.tokens_per_image]

    def encode(self, pixels: Tensor | None, tokens_per_image: int) -> Tensor:
        """uint8 pixels [N, 3, S, S] -> visual tokens [N * t, H] in the language model's space; None -> [0, H]."""
        assert self.vision_tower is not None and self.projector is not None
        with contextlib.nullcontext() if self.trainable.vision else torch.no_grad():
            if pixels is None:
                pooled_NtC = self.vision_tower.position_embedding[:0].unsqueeze(0)
            else:
                pooled_NtC = torch.cat([pool(self.vision_tower(some), tokens_per_image) for some in pixels.split(self.images_at_once)])
        out, bias = self.projector(pooled_NtC.flatten(0, 1))
        return out + bias

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Called by the pipeline schedule with what the stage before sent."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor:
        return self.language_model.shared_embedding_or_output_weight()


def build_pieces(recipe: Recipe, ranks: Ranks) -> list[InfiMed]:
    """This process's part of the model, on its device, its weights not yet set: one piece, or with virtual pipelining several."""
    pieces: list[InfiMed] = []
    with cpu.cuda_means_cpu():
        for number in range(ranks.virtual_size):
            pieces.append(InfiMed(recipe, ranks, piece=number, config=pieces[0].config if pieces else None).to(ranks.device))
    return pieces


def packed_seq_params(batch: PackedBatch) -> PackedSeqParams:
    """The documents' boundaries in Megatron-Core's terms."""
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )
