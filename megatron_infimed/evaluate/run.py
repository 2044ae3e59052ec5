"""One evaluation: checkpoint + questions -> answers.jsonl and scores.json in the output folder.

The model is built in the recipe's layout, so any checkpoint evaluates on any tensor parallel size; data parallel processes share the
questions. Images are decoded at the schedule's last phase. With gray=True every question is asked a second time with gray images: what
the model still gets right then, it did not see. scores.json records what it was made from; when that has not changed, nothing is computed
again. Answers are kept batch by batch (parts.py), so after a kill only unanswered questions are asked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_infimed import log as logs
from megatron_infimed.config import ParallelConfig, Recipe
from megatron_infimed.data.chat import Tokenizer, encode_batch, load_tokenizer
from megatron_infimed.data.decode import GRAY, Decoder, make_decoder
from megatron_infimed.data.safe_files import write_whole
from megatron_infimed.errors import UserError
from megatron_infimed.evaluate import score
from megatron_infimed.evaluate.generate import generate, prompt_document
from megatron_infimed.evaluate.parts import Parts, Row, lines
from megatron_infimed.evaluate.questions import Question, read_questions
from megatron_infimed.model.infimed import InfiMed
from megatron_infimed.parallel import cpu, groups
from megatron_infimed.parallel.groups import Ranks
from megatron_infimed.train import checkpoint as checkpoints
from megatron_infimed.train.checkpoint import Checkpoint

log = logging.getLogger(__name__)
QUESTIONS_AT_ONCE = 256


def evaluate(
    recipe: Recipe,
    questions: Path,
    images: Path,
    output: Path,
    *,
    gray: bool = False,
    checkpoint: str | None = None,
    batch_rows: int | None = None,
    max_new_tokens: int = 16,
) -> dict[str, Any]:
    """Answers and scores the questions; all processes together. Returns what scores.json holds.

    Args:
        questions: see questions.py.
        images: the folder that the questions' image paths start from.
        output: folder for answers.jsonl and scores.json; made where it is not there.
        gray: ask everything a second time with gray images.
        checkpoint: a checkpoint or a run directory; null takes the newest of recipe.output.
        batch_rows: rows of data.capacity tokens in a forward pass; null takes batch.micro_rows.

    Raises:
        UserError: no or another model's checkpoint, unreadable questions.
    """
    if max_new_tokens < 1 or (batch_rows is not None and batch_rows < 1):
        raise UserError(f"max_new_tokens {max_new_tokens} and batch_rows {batch_rows} must be at least 1")
    parallel = ParallelConfig(tensor=recipe.parallel.tensor, sequence=recipe.parallel.sequence)  # the other processes share the questions
    recipe = recipe.model_copy(update={"parallel": parallel})
    ranks = groups.initialize(parallel, recipe.seed)
    logs.set_up(ranks.main)
    asked, tokenizer = read_questions(questions), load_tokenizer(recipe.data.tokenizer)
    source = checkpoints.find_sound(checkpoint or recipe.output, recipe.model, ranks)
    inputs = {
        "checkpoint": source.fingerprint,
        "questions": hashlib.sha256(questions.read_bytes()).hexdigest(),
        "tokenizer": tokenizer.fingerprint,
        "image_size": recipe.schedule[-1].image_size,
        "tokens_per_image": recipe.schedule[-1].tokens_per_image,
        "gray": gray,
        "max_new_tokens": max_new_tokens,
        "scoring": score.VERSION,
    }
    if before := groups.from_first(lambda: _done_before(output, inputs)):
        log.info("%s: done before with this checkpoint and these questions: %s", output, summary(before))
        return before

    model = _load(recipe, ranks, source)
    decoder = make_decoder(recipe.data.decoder, recipe.data.decode_threads, ranks.device)
    started = time.perf_counter()
    parts = Parts(output, inputs)
    of_id = groups.from_first(parts.read)
    if of_id:
        log.info("%s: %d of %d questions were answered before", output, len(of_id), len(asked))
    mine = asked[ranks.data :: ranks.data_size]
    answers: list[Row] = []
    for first in range(0, len(mine), QUESTIONS_AT_ONCE):  # the same batches at each start, so the same sums to the last bit
        part = [q for q in mine[first : first + QUESTIONS_AT_ONCE] if q.id not in of_id]
        if not part:
            continue
        said = _answer(model, recipe, tokenizer, decoder, part, images, gray, batch_rows or recipe.batch.micro_rows, max_new_tokens)
        if ranks.tensor == 0:
            parts.write(f"{ranks.data}-of-{ranks.data_size}-from-{first}", said)
        answers += said
        log.info("%d of %d questions answered, %.0f s", first + len(part), len(mine), time.perf_counter() - started)
    decoder.close()
    given: list[list[Row]] = [[] for _ in range(ranks.data_size)]
    dist.all_gather_object(given, answers, group=ranks.data_group)
    of_id |= {row["id"]: row for rows in given for row in rows}
    rows = [of_id[q.id] for q in asked]

    unreadable = sorted({name for row in rows for name in row.pop("unreadable")})
    if unreadable:
        log.warning("%d images could not be read and were shown gray: %s", len(unreadable), ", ".join(unreadable[:5]))
    scores = {
        **score.score(rows),
        "unreadable_images": unreadable,
        "unfinished_answers": sum(row["unfinished"] for row in rows),
        "seconds": round(time.perf_counter() - started, 1),
        "checkpoint": str(source.path),
        "inputs": inputs,
    }
    if ranks.main:
        _write(output, rows, scores)
        parts.remove()
        log.info("%s: %s", output, summary(scores))
    dist.barrier()
    return scores


def summary(scores: dict[str, Any]) -> str:
    """One line for people."""
    cell = scores["needs_image"] if scores["needs_image"]["n"] else scores["all"]
    which = "questions that need the image" if cell is scores["needs_image"] else "questions"
    gray = f", gray images {100 * cell['gray']:.1f} %, gap {100 * cell['gap']:.1f} points" if "gray" in cell else ""
    return (
        f"{100 * cell['accuracy']:.1f} % of {cell['n']} {which} right (95 %: {100 * cell['low']:.1f} to {100 * cell['high']:.1f})"
        f"{gray}, majority answer {100 * cell['majority']:.1f} %"
    )


def _answer(
    model: InfiMed, recipe: Recipe, tokenizer: Tokenizer, decoder: Decoder, asked: list[Question], folder: Path,
    gray: bool, rows: int, max_new_tokens: int,
) -> list[Row]:  # fmt: skip
    phase = recipe.schedule[-1]
    names = list(dict.fromkeys(name for q in asked for name in q.images))
    number = {name: i for i, name in enumerate(names)}
    pixels, corrupt = decoder([_read(folder / name) for name in names], phase.image_size)
    unreadable = {names[i] for i in corrupt}
    segments = encode_batch(tokenizer, [q.turns for q in asked], prompt=True)
    limit = recipe.model.language.max_positions

    def ask(pixels: torch.Tensor, numbers: dict[str, int]) -> list[list[int]]:
        prompts = [prompt_document(s, [numbers[n] for n in q.images]) for q, s in zip(asked, segments, strict=True)]
        for q, p in zip(asked, prompts, strict=True):
            tokens = len(p.modes) + len(q.images) * (phase.tokens_per_image - 1) + max_new_tokens
            if tokens > limit:
                raise UserError(f"question {q.id} takes {tokens} tokens with its answer, model.language.max_positions is {limit}")
        return generate(
            model, prompts, pixels, phase=phase, special=tokenizer.special, capacity=recipe.data.capacity,
            rows=rows, max_new_tokens=max_new_tokens,
        )  # fmt: skip

    said = ask(pixels, number)
    one_gray = torch.full((1, 3, phase.image_size, phase.image_size), GRAY, dtype=torch.uint8)
    said_blind = ask(one_gray, dict.fromkeys(names, 0)) if gray else [None] * len(asked)
    out = []
    for q, ids, blind in zip(asked, said, said_blind, strict=True):
        prediction = tokenizer.decode(ids).strip()
        row = {"id": q.id, "images": list(q.images), "question": q.text, "answer": q.answer, "prediction": prediction}
        if blind is not None:
            row["gray_prediction"] = tokenizer.decode(blind).strip()
            row["gray_correct"] = score.is_right(row["gray_prediction"], q.answer)
        row |= {"correct": score.is_right(prediction, q.answer), "kind": q.kind, "needs_image": q.needs_image}
        row |= {"unfinished": len(ids) == max_new_tokens, "unreadable": [n for n in q.images if n in unreadable]}
        out.append({**q.more, **row})
    return out


def _load(recipe: Recipe, ranks: Ranks, source: Checkpoint) -> InfiMed:
    with cpu.cuda_means_cpu():
        model = InfiMed(recipe, ranks, gather_logits=True).to(ranks.device)
    checkpoints.load_weights(source, [model])
    return model


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # does not decode, so it is shown gray and counted


def _done_before(output: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The scores that are there, if they are of the same inputs."""
    try:
        scores = json.loads((output / "scores.json").read_text())
        whole = hashlib.sha256((output / "answers.jsonl").read_bytes()).hexdigest() == scores["answers_sha256"]
        return scores if whole and scores["inputs"] == inputs else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(output: Path, rows: list[Row], scores: dict[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    answers = lines(rows)
    scores["answers_sha256"] = hashlib.sha256(answers.encode()).hexdigest()
    write_whole(output / "answers.jsonl", answers)
    write_whole(output / "scores.json", json.dumps(scores, indent=1))
