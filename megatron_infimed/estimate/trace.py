"""What a micro-batch allocates, found by running the real model without memory.

The model of the recipe is built with two language layers and two tower layers under torch's FakeTensorMode, on a process group that talks to
nobody, and goes through one forward and backward pass. Every operation is real, so autograd keeps, frees and computes again exactly what it
does in training, for every layout, frozen part and recompute mode; only the numbers are not there. `LiveBytes` sees each storage come and go.
Marks at the borders of the embedding (with tower and projector), the layers and the head (final norm and loss) cut the run into segments;
memory.py puts these together for any number of layers and micro-batches in flight, because layers are alike.

On a GPU three kernels are others than on the CPU, and are stood in for: attention is one call for the whole row that keeps its inputs, its
output and a number a head and token (keys and values for every head only without Transformer Engine), RMSNorm is one kernel, and products for
the loss come in float32 at once. Transformer Engine itself is taken to keep what the local layers keep, in bfloat16 under FP8 too.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_infimed.config import BatchConfig, ParallelConfig, PhaseConfig, PrecisionConfig, Recipe
from megatron_infimed.data.batch import PackedBatch, image_block, pack_rows
from megatron_infimed.data.shards import IMAGE, TARGET, Document
from megatron_infimed.model import loss, presets
from megatron_infimed.model.attention import PackedAttention, _for_each_head
from megatron_infimed.model.infimed import InfiMed
from megatron_infimed.parallel import groups
from megatron_infimed.train.optimizer import Adam

LAYERS = 2


@dataclass(frozen=True)
class Weights:
    """Parameters of a part on one rank."""

    all: int = 0
    trained: int = 0

    def __add__(self, other: Weights) -> Weights:
        return Weights(self.all + other.all, self.trained + other.trained)

    def __mul__(self, times: int) -> Weights:
        return Weights(self.all * times, self.trained * times)


@dataclass(frozen=True)
class Trace:
    """A micro-batch on one rank of a tensor and context parallel group, in bytes. "Above" is counted from the beginning of the segment, and
    with the tower's two layers alone."""

    tower: Weights
    """All but its layers; with the projector."""
    tower_layer: Weights
    embedding: Weights
    layer: Weights
    norm: Weights
    output: Weights
    """Of its own; 0 where it is the embedding's."""
    batch: int
    """The micro-batch itself, images included."""
    hidden: int
    """What a pipeline stage hands to the next."""
    tower_kept: int
    """By a layer of the tower."""
    embed_kept: int
    embed_forward: int
    """Above."""
    embed_backward: int
    """Above."""
    layer_kept: int
    layer_forward: int
    """Above, in a layer."""
    layer_backward: int
    """Above, in a layer."""
    head_peak: int
    """Above, forward and backward."""
    head_left: int
    """Alive while the layers go backward: the gradient of the hidden states and, with tied embeddings, that of the output weight."""
    left_at_embed: int
    """The same when the embedding goes backward."""
    buffers: int
    """Megatron's own, for what sequence parallelism gathers; they stay."""
    kernels: int
    """Launched by a layer, forward and backward."""


def trace(recipe: Recipe, gpu: bool, batch: PackedBatch | None = None) -> Trace:
    """Runs one micro-batch of the recipe's tensor and context parallel layout; pipeline and data parallelism are left out.

    Args:
        gpu: with a GPU's kernels.
        batch: without its images; by default `worst_batch`, and what was traced once is remembered.
    """
    small = _reduced(recipe)
    return _remembered(small.model_dump_json(), gpu) if batch is None else _trace(small, gpu, batch)


@functools.cache
def _remembered(settings: str, gpu: bool) -> Trace:
    small = Recipe.model_validate_json(settings)
    return _trace(small, gpu, worst_batch(small))


def _trace(small: Recipe, gpu: bool, batch: PackedBatch) -> Trace:
    p, fake, live = small.parallel, FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
    with _pretended(p) as ranks:
        held = _this_share(batch, p)
        with ExitStack() as stack:
            for where, name, stand_in in _GPU_KERNELS if gpu else ():
                stack.enter_context(patch.object(where, name, stand_in(small)))
            stack.enter_context(fake)
            stack.enter_context(live)
            model = InfiMed(small, ranks)
            for parameter in model.parameters():  # Megatron's wrapper adds gradients to its buffers as they come
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_drop_gradient)
            live.shared = cast(Any, model.language_model.embedding).word_embeddings.weight.shape
            pixels = None if held.pixels is None else live.add(fake.from_tensor(held.pixels))
            segments, tower_kept = _run(model, replace(held, pixels=pixels), live)
    embed, first, second, head, back, embed_back = segments
    layer_kept = head.start - second.start
    buffers = second.start - first.start - layer_kept
    element, split = presets.params_dtype(small).itemsize, p.tensor if p.sequence else 1
    return Trace(
        **_weights(model),
        batch=sum(x.nbytes for x in vars(held).values() if isinstance(x, Tensor)),
        hidden=held.tokens.numel() // split * small.model.language.hidden_size * element,
        tower_kept=tower_kept // LAYERS if small.trainable.vision else 0,
        embed_kept=first.start - embed.start,
        embed_forward=embed.peak,
        embed_backward=embed_back.peak,
        layer_kept=layer_kept,
        layer_forward=second.peak,
        layer_backward=back.peak,
        head_peak=head.peak,
        head_left=back.start - head.start,
        left_at_embed=embed_back.start - first.start - buffers,
        buffers=buffers,
        kernels=second.kernels + back.kernels // LAYERS,
    )


def worst_batch(recipe: Recipe) -> PackedBatch:
    """Rows with as many images as may be, all else targets; one document each, for speed."""
    phase, images = hardest(recipe)
    data = recipe.data
    text = data.capacity - images * phase.tokens_per_image
    document = Document(np.zeros(images + text, np.int32), np.array([IMAGE] * images + [TARGET] * text, np.int8))
    return pack_rows(
        [[document]] * recipe.batch.micro_rows,
        capacity=data.capacity,
        tokens_per_image=phase.tokens_per_image,
        image_size=phase.image_size,
        pad_id=0,
        image_id=0,
    )


def hardest(recipe: Recipe) -> tuple[PhaseConfig, int]:
    """The phase that gives the tower most pixels, and the images that a row of it may hold, each with a token of text."""
    data = recipe.data

    def images(phase: PhaseConfig) -> int:
        fits = data.capacity // (phase.tokens_per_image + 1)
        return fits if data.max_images is None else min(fits, data.max_images)

    phase = max(recipe.schedule, key=lambda p: images(p) * p.image_size**2)
    return phase, images(phase)


def _reduced(recipe: Recipe) -> Recipe:
    """The recipe with few layers, and nothing that does not matter here or must be installed."""
    m, p, b = recipe.model, recipe.parallel, recipe.batch
    vision = m.vision.model_copy(update={"num_layers": LAYERS - 1 - m.vision.feature_layer})
    layers = "local" if recipe.precision.layers == "local" else "auto"
    return Recipe(
        output="",
        model=m.model_copy(update={"vision": vision, "language": m.language.model_copy(update={"num_layers": LAYERS})}),
        trainable=recipe.trainable,
        parallel=ParallelConfig(tensor=p.tensor, context=p.context, sequence=p.sequence),
        precision=PrecisionConfig(params=recipe.precision.params, layers=layers, recompute=recipe.precision.recompute),
        data=recipe.data.model_copy(update={"sources": ()}),
        schedule=recipe.schedule,
        batch=BatchConfig(rows=b.micro_rows, micro_rows=b.micro_rows, vision_images=b.vision_images, loss_tokens=b.loss_tokens),
    )


@contextmanager
def _pretended(parallel: ParallelConfig) -> Iterator[groups.Ranks]:
    """Rank 0 of a world as large as the layout, whose collectives do nothing."""
    world = parallel.model_parallel
    with patch.dict(os.environ, RANK="0", WORLD_SIZE=str(world), LOCAL_RANK="0"):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
        try:
            yield groups.initialize(parallel)
        finally:
            groups.shut_down()


def _this_share(batch: PackedBatch, parallel: ParallelConfig) -> PackedBatch:
    """What the first process of those that share the rows computes and decodes."""
    share = (0, parallel.tensor * parallel.context)
    n = len(image_block(batch.counts.images, share))
    pixels = torch.empty(n, 3, batch.image_size, batch.image_size, dtype=torch.uint8)
    return batch.with_pixels(pixels, 0, share).share(0, parallel.context)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages alive, and the highest they have been since `peak` was set.

    Operations on real integers (document ends, targets) are done for real: what comes of them decides shapes. Gradients of `shared`, a
    weight that is used twice, are added in place: autograd does that too, but not while somebody looks on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shared: torch.Size | None = None
        self.bytes = self.peak = self.kernels = 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if tensors and not any(isinstance(x, FakeTensor) for x in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.aten.add.Tensor and args[0].shape == self.shared and not torch.is_grad_enabled():
            func = torch.ops.aten.add_.Tensor
        out, before = func(*args, **kwargs), len(self._seen)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.add(x)
        self.kernels += len(self._seen) > before or func._schema.is_mutable
        return out

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            self._seen[key] = weakref.ref(storage, lambda _: self._gone(key, size))
        return tensor

    def _gone(self, key: int, size: int) -> None:
        self.bytes -= size
        del self._seen[key]


@dataclass
class _Segment:
    start: int
    """Bytes alive at its beginning."""
    kernels: int
    peak: int = 0
    """Above."""


def _run(model: InfiMed, batch: PackedBatch, live: LiveBytes) -> tuple[list[_Segment], int]:
    """Segments embedding, first layer, second, head (forward and backward), layers backward, embedding backward; what the tower keeps."""
    segments: list[_Segment] = []
    tower = [0]

    def begin(*_: Any) -> None:
        if segments:
            last = segments[-1]
            last.peak, last.kernels = live.peak - last.start, live.kernels - last.kernels
        live.peak = live.bytes
        segments.append(_Segment(live.bytes, live.kernels))

    def border(_module: nn.Module, args: Any, kwargs: Any) -> None:
        begin()
        (args[0] if args else kwargs["hidden_states"]).register_hook(begin)  # and again when the gradient comes back to it

    def second(*_: Any) -> None:
        if len(segments) == 2:  # and not when it is computed again
            begin()

    decoder, blocks = cast(Any, model.language_model.decoder), cast(Any, model.vision_tower).decoder
    decoder.register_forward_pre_hook(border, with_kwargs=True)
    decoder.layers[1].register_forward_pre_hook(second)
    decoder.final_layernorm.register_forward_pre_hook(border, with_kwargs=True)
    blocks.register_forward_pre_hook(lambda *_: tower.append(tower.pop() - live.bytes))
    blocks.register_forward_hook(lambda *_: tower.append(tower.pop() + live.bytes))
    begin()
    model(batch).sum().backward()
    begin()
    return segments[:-1], tower[0]


def _weights(model: InfiMed) -> dict[str, Weights]:
    lm, tower, projector = cast(Any, model.language_model), cast(Any, model.vision_tower), cast(nn.Module, model.projector)
    tower_layer = _count(tower.decoder.layers[0])
    return {
        "tower": _count(tower) + tower_layer * -LAYERS + _count(projector),
        "tower_layer": tower_layer,
        "embedding": _count(lm.embedding),
        "layer": _count(lm.decoder.layers[0]),
        "norm": _count(lm.decoder.final_layernorm),
        "output": _count(lm.output_layer),
    }


def _count(module: nn.Module) -> Weights:
    parameters = list(module.parameters())
    return Weights(sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad))


def _gpu_attention(small: Recipe) -> Any:
    every_head = small.precision.layers == "local"

    def forward(self: PackedAttention, query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        if every_head:
            key, value = _for_each_head(query, key), _for_each_head(query, value)
        return cast(Tensor, _Attention.apply(query, key, value)).flatten(-2)

    return forward


class _Attention(torch.autograd.Function):
    """What a fused kernel allocates. [..., A, D], [..., G, D] -> [..., A, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = ctx.saved_tensors[:3]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _gpu_norm(_small: Recipe) -> Any:
    return lambda x, _shape, weight, _eps=None: _Norm.apply(x, weight)


class _Norm(torch.autograd.Function):
    """The same for RMSNorm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(grad), torch.empty_like(ctx.saved_tensors[1])


def _gpu_product(_small: Recipe) -> Any:
    return lambda a, b, dtype: a.new_empty(a.shape[0], b.shape[1], dtype=dtype)  # without the rounded one of the CPU


_GPU_KERNELS: tuple[tuple[Any, str, Callable[[Recipe], Any]], ...] = (
    (F, "rms_norm", _gpu_norm),
    (PackedAttention, "forward", _gpu_attention),
    (loss, "_product", _gpu_product),
)


@functools.cache
def traced_step() -> float:
    """Bytes a parameter that train/optimizer.Adam makes on the side."""
    live, n = LiveBytes(), 2**20
    with FakeTensorMode(), live:
        weight = nn.Parameter(torch.empty(n))
        weight.grad = torch.empty(n)
        adam = Adam([weight])
        adam.step()  # makes the moments
        live.peak = before = live.bytes
        adam.step()
    return (live.peak - before) / n
