"""Generation against the plain loop (one document, no packing, argmax of all logits), and the evaluation command around it."""

import json

import numpy as np
import pytest
import torch

from megatron_infimed.config import ParallelConfig, Recipe
from megatron_infimed.data.batch import length, pack_rows
from megatron_infimed.data.chat import encode_batch, load_tokenizer
from megatron_infimed.data.decode import GRAY
from megatron_infimed.data.shards import Document
from megatron_infimed.errors import UserError
from megatron_infimed.evaluate import run as evaluation
from megatron_infimed.evaluate.generate import generate, prompt_document
from megatron_infimed.evaluate.questions import Question, read_questions
from megatron_infimed.evaluate.run import evaluate
from megatron_infimed.model.infimed import InfiMed
from megatron_infimed.model.initialize import initialize_weights
from megatron_infimed.parallel import cpu, groups
from megatron_infimed.train import saver
from tests.tiny import tiny_images, tiny_tokenizer

TEXTS = ("Which organ?", "Is it the liver?", "A CT or an MR?", "Describe the picture in one sentence.", "Compare both.", "2 + 2 = ?")
IMAGES = (1, 1, 0, 2, 2, 0)


def tiny_recipe(folder, tokens_per_image=4, **more):
    return Recipe.model_validate(
        {
            "output": str(folder / "run"),
            "model": {
                "vision": {
                    "image_size": 28, "patch_size": 7, "hidden_size": 32, "num_layers": 3, "num_heads": 2, "ffn_hidden_size": 48,
                },
                "language": {
                    "hidden_size": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 12, "ffn_hidden_size": 64,
                    "vocab_size": 400, "max_positions": 512,
                },
                "init_std": 0.3,
            },
            "precision": {"params": "float32", "layers": "local"},
            "data": {"tokenizer": str(folder / "tokenizer"), "capacity": 96},
            "schedule": [{"until": 1.0, "image_size": 28, "tokens_per_image": tokens_per_image}],
            "batch": {"rows": 2, "micro_rows": 2},
            "log": {"tensorboard": False},
            **more,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model only loses by more, badly so on a busy machine
    folder = tmp_path_factory.mktemp("generate")
    tiny_tokenizer(folder / "tokenizer")
    recipe = tiny_recipe(folder)
    ranks = groups.initialize(recipe.parallel)
    with cpu.cuda_means_cpu():
        model = InfiMed(recipe, ranks, gather_logits=True)
    initialize_weights(model, recipe)
    yield folder, recipe, ranks, model, load_tokenizer(recipe.data.tokenizer)
    groups.shut_down()
    torch.set_num_threads(threads)


def asked(tokenizer):
    questions = [Question(str(i), t, "x", ("a", "b")[:n]) for i, (t, n) in enumerate(zip(TEXTS, IMAGES, strict=True))]
    segments = encode_batch(tokenizer, [q.turns for q in questions], prompt=True)
    numbers = iter(range(sum(IMAGES)))
    return [prompt_document(s, [next(numbers) for _ in q.images]) for q, s in zip(questions, segments, strict=True)]


def some_pixels(n=sum(IMAGES)):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 3, 28, 28), np.uint8))


@torch.no_grad()
def plain_loop(model, document, pixels, t, special, steps):
    """One document alone in its row; every position's logits; images through the tower anew at every step."""
    said = []
    for _ in range(steps):
        size = length(document.modes, t)
        batch = pack_rows(
            [[document]], capacity=size, tokens_per_image=t, image_size=28, pad_id=special.pad, image_id=special.image_pad
        ).with_pixels(pixels[document.values[document.modes == 2]], 0)
        token = int(model(batch, with_loss=False)[-1].argmax())
        if token == special.im_end:
            break
        said.append(token)
        document = Document(np.append(document.values, np.int32(token)), np.append(document.modes, np.int8(0)))
    return said


@pytest.mark.parametrize("t", [1, 4, 16])
def test_answers_are_those_of_the_plain_loop(setting, t):
    _, recipe, _, model, tokenizer = setting
    phase = recipe.schedule[0].model_copy(update={"tokens_per_image": t})
    prompts, pixels = asked(tokenizer), some_pixels()
    wanted = [plain_loop(model, d, pixels, t, tokenizer.special, 6) for d in prompts]
    assert len({tuple(w) for w in wanted}) > 3  # the prompts are told apart
    model.train()
    for capacity, rows in ((96, 1), (96, 3), (256, 2), (16, 4)):
        got = generate(model, prompts, pixels, phase=phase, special=tokenizer.special, capacity=capacity, rows=rows, max_new_tokens=6)
        assert got == wanted
    assert model.training  # left as it was


def test_neighbours_do_not_change_an_answer(setting):
    _, recipe, _, model, tokenizer = setting
    prompts, pixels = asked(tokenizer), some_pixels()
    options = {"phase": recipe.schedule[0], "special": tokenizer.special, "capacity": 128, "max_new_tokens": 5}
    together = generate(model, prompts, pixels, **options)
    assert [generate(model, [p], pixels, **options)[0] for p in prompts] == together
    assert generate(model, prompts[::-1], pixels, **options)[::-1] == together
    assert generate(model, [], pixels[:0], **options) == []
    assert generate(model, [prompts[2]], pixels[:0], **options) == [together[2]]  # no image at all


def test_an_answer_ends_at_the_stop_token_and_the_others_go_on(setting):
    _, recipe, _, model, tokenizer = setting
    prompts, pixels = asked(tokenizer), some_pixels()
    options = {"phase": recipe.schedule[0], "capacity": 128, "max_new_tokens": 6}
    free = generate(model, prompts, pixels, special=tokenizer.special, **options)
    stop = next(a[2] for a in free if a[2] not in a[:2])
    special = type(tokenizer.special)(**{**vars(tokenizer.special), "im_end": stop})
    stopped = generate(model, prompts, pixels, special=special, **options)
    assert stopped == [a[: a.index(stop)] if stop in a else a for a in free] and stopped != free
    assert {len(a) for a in stopped} >= {2, 6}


@pytest.fixture(scope="module")
def run(setting):
    """A run directory with a checkpoint, an image folder with a truncated and a missing image, and questions."""
    folder, recipe, ranks, model, _ = setting
    state = {"step": 3, "recipe": recipe.model_dump(mode="json")}
    saver.save(folder / "run", state, [model], None, ranks)
    images = folder / "images"
    images.mkdir()
    for i, data in enumerate(tiny_images(3)):
        (images / f"{i}.jpg").write_bytes(data if i < 2 else data[:50])
    pictures = ["0.jpg", "1.jpg", "2.jpg", ["0.jpg", "1.jpg"], "no.jpg", None]
    rows = [
        {"id": f"q{i}", "image": p, "question": t, "answer": "yes", "kind": "k"}
        for i, (p, t) in enumerate(zip(pictures, TEXTS, strict=True))
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder, recipe


@pytest.fixture(autouse=True)
def pytest_keeps_the_log(monkeypatch):
    monkeypatch.setattr("megatron_infimed.log.set_up", lambda *args: None)


def answers(folder):
    return [json.loads(line) for line in (folder / "answers.jsonl").open()]


def test_evaluation_from_checkpoint_to_files(run, caplog):
    folder, recipe = run
    with caplog.at_level("INFO"):
        scores = evaluate(recipe, folder / "q.jsonl", folder / "images", folder / "out", gray=True, max_new_tokens=4)
    rows = answers(folder / "out")
    assert [r["id"] for r in rows] == [f"q{i}" for i in range(6)] and scores["all"]["n"] == 6 and scores["needs_image"]["n"] == 5
    assert scores["unreadable_images"] == ["2.jpg", "no.jpg"] and "2 images could not be read" in caplog.text
    # What was unreadable was shown gray, so it is answered as in the gray run; and a text question as ever.
    assert all(rows[i]["prediction"] == rows[i]["gray_prediction"] for i in (2, 4, 5))
    assert any(r["prediction"] != r["gray_prediction"] for r in rows)
    caplog.clear()
    written = (folder / "out" / "scores.json").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        again = evaluate(recipe, folder / "q.jsonl", folder / "images", folder / "out", gray=True, max_new_tokens=4)
    assert again["needs_image"] == scores["needs_image"] and "done before" in caplog.text
    assert (folder / "out" / "scores.json").stat().st_mtime_ns == written
    # A recipe trained in a pipeline with context parallelism is evaluated without.
    recipe = recipe.model_copy(update={"parallel": ParallelConfig(pipeline=2, context=2)})
    other = evaluate(recipe, folder / "q.jsonl", folder / "images", folder / "out", max_new_tokens=4, batch_rows=1)
    assert "gray" not in other["all"]
    assert [r["prediction"] for r in answers(folder / "out")] == [r["prediction"] for r in rows]


class Killed(Exception):
    """Stands for kill -9: nothing after it runs."""


def killed_after(monkeypatch, batches):
    """The evaluation answers so many batches and dies in the next."""
    answer, done = evaluation._answer, []

    def dying(*args):
        if len(done) == batches:
            raise Killed
        done.append([q.id for q in args[4]])
        return answer(*args)

    monkeypatch.setattr(evaluation, "_answer", dying)
    return done


def test_a_killed_evaluation_goes_on(run, tmp_path, monkeypatch, caplog):
    folder, recipe = run
    words, options = (recipe, folder / "q.jsonl", folder / "images"), {"gray": True, "max_new_tokens": 4}
    monkeypatch.setattr(evaluation, "QUESTIONS_AT_ONCE", 2)
    evaluate(*words, tmp_path / "whole", **options)
    notes = tmp_path / "notes"
    notes.mkdir()
    monkeypatch.setenv("INFIMED_NOTES", str(notes))
    with monkeypatch.context() as patch:
        assert killed_after(patch, 2) == []
        with pytest.raises(Killed):
            evaluate(*words, tmp_path / "out", **options)
    assert (notes / "progress").read_text().endswith(", 2 batches of questions\n")
    one, _ = sorted((tmp_path / "out" / "parts").rglob("*.jsonl"))
    one.write_text(one.read_text()[:-20])  # as after a power failure
    with monkeypatch.context() as patch:
        other = killed_after(patch, 1)
        with pytest.raises(Killed):
            evaluate(*words, tmp_path / "out", **(options | {"max_new_tokens": 3}))
    assert other == [["q0", "q1"]], "another evaluation takes none of these answers"
    with monkeypatch.context() as patch, caplog.at_level("INFO"):
        done = killed_after(patch, 9)
        scores = evaluate(*words, tmp_path / "out", **options)
    assert done == [["q0", "q1"], ["q4", "q5"]] and "2 of 6 questions were answered before" in caplog.text
    assert answers(tmp_path / "out") == answers(tmp_path / "whole")
    assert scores["unreadable_images"] == ["2.jpg", "no.jpg"] and not (tmp_path / "out" / "parts").exists()


def test_gray_is_an_image_of_the_decoders_gray(setting):
    _, recipe, _, model, tokenizer = setting
    prompts = asked(tokenizer)
    options = {"phase": recipe.schedule[0], "special": tokenizer.special, "capacity": 128, "max_new_tokens": 4}
    gray = torch.full((1, 3, 28, 28), GRAY, dtype=torch.uint8)
    one = [Document(np.where(p.modes == 2, 0, p.values), p.modes) for p in prompts]
    assert generate(model, one, gray, **options) == generate(model, prompts, gray.expand(6, -1, -1, -1), **options)


def test_refusals(run, tmp_path):
    folder, recipe = run
    here = (folder / "q.jsonl", folder / "images", tmp_path)
    other = recipe.model.model_copy(update={"language": recipe.model.language.model_copy(update={"num_layers": 3})})
    with pytest.raises(UserError, match="another model"):
        evaluate(recipe.model_copy(update={"model": other}), *here)
    with pytest.raises(UserError, match="does not exist"):
        evaluate(recipe, *here, checkpoint=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="max_new_tokens 0"):
        evaluate(recipe, *here, max_new_tokens=0)
    with pytest.raises(UserError, match="max_positions is 512"):
        evaluate(recipe, *here, max_new_tokens=500)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"q.jsonl:1: not JSON"),
        ('{"question": "a"}', r"q.jsonl:1: needs the texts question and answer"),
        ('{"question": "<image> a", "answer": "b"}', r"1 <image> marks but 0 images"),
        ('{"question": "a", "answer": "b", "image": 3}', r"image is a path or a list"),
        ("", r"holds no question"),
        ('{"id": 1, "question": "a", "answer": "b"}\n{"id": 1, "question": "c", "answer": "d"}', r"'1' comes twice"),
    ],
)
def test_bad_questions_name_their_line(tmp_path, line, message):
    (tmp_path / "q.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        read_questions(tmp_path / "q.jsonl")


def test_questions_default_and_keep_what_they_say(tmp_path):
    (tmp_path / "q.jsonl").write_text(
        '{"question": "a", "answer": "b", "image": "x.png", "source_seen": true}\n\n{"question": "c\u2028c", "answer": "d"}\n'
    )
    one, two = read_questions(tmp_path / "q.jsonl")
    assert (one.images, one.needs_image, one.more, one.turns[0].text) == (("x.png",), True, {"source_seen": True}, "<image>\na")
    assert (two.id, two.text, two.images, two.needs_image) == ("3", "c\u2028c", (), False)
