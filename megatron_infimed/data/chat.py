"""Text of a conversation <-> token ids: the chat template and the two kinds of tokenizer.

`layout` turns the turns into items: plain text, a special token, or image k, each marked context or target (loss). All plain text of many
records is tokenised in one batch and stitched back. Because special tokens are placed by id and text is always encoded as plain text, a
`<|im_end|>` typed by a user can never end a turn. Text is stripped at both ends of a turn and next to an image; CHAT_TEMPLATE (Jinja, for
the exported processor) does the same, so both give the same ids.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_infimed.errors import UserError
from megatron_infimed.intake.records import IMAGE_MARK, Record, Turn

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, IMAGE_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
NEEDED = (IM_START, IM_END, VISION_START, IMAGE_PAD, VISION_END)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] | trim -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if 'image' in part['type'] -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] | trim -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
TEMPLATE_FINGERPRINT = hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest()

Kind = Literal["context", "target", "image"]
Segment = tuple[Kind, Any]
"""("context" | "target", list of ids) or ("image", k)."""


@dataclass(frozen=True)
class SpecialIds:
    im_start: int
    im_end: int
    image_pad: int
    vision_start: int
    vision_end: int
    pad: int


class Tokenizer(Protocol):
    kind: str
    vocab_size: int
    """Largest id + 1."""
    special: SpecialIds
    fingerprint: str
    """SHA-256 of what defines text -> ids."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Plain text to ids; special tokens written in it stay text."""
        ...

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str: ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A Hugging Face folder (or its tokenizer.json), or a SentencePiece .model.

    Raises:
        UserError: nothing usable there, or the special tokens of the template are missing.
    """
    path = Path(path)
    if path.is_dir() and (path / "tokenizer.json").is_file():
        return _HuggingFace(path / "tokenizer.json")
    if path.is_file() and path.suffix == ".model":
        return _SentencePiece(path)
    if path.is_file() and path.name == "tokenizer.json":
        return _HuggingFace(path)
    if path.is_dir() and len(models := sorted(path.glob("*.model"))) == 1:
        return _SentencePiece(models[0])
    if path.is_dir():
        raise UserError(
            f"{path}: no tokenizer.json in this folder; make one with AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR), "
            "or name a SentencePiece .model file"
        )
    raise UserError(f"{path}: no tokenizer there; give a Hugging Face folder with tokenizer.json or a SentencePiece .model file")


class _HuggingFace:
    kind = "huggingface"

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
            self._backend = Backend.from_file(str(file))
        except Exception as e:  # tokenizers raises bare Exception
            raise UserError(f"{file}: not a readable tokenizer.json: {e}") from None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self.fingerprint = _fingerprint(tree)
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.special = _special_ids(
            vocabulary, file, _declared_pad(file.parent), "add them with tokenizer.add_special_tokens and save again"
        )
        texts = self._backend.encode_batch(list(NEEDED), add_special_tokens=False)
        leaks = {name for name, enc in zip(NEEDED, texts, strict=True) if vocabulary[name] in enc.ids}
        self._guard = _Guard(leaks)
        self._encode = getattr(self._backend, "encode_batch_fast", self._backend.encode_batch)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._guard.encode(texts, lambda plain: [e.ids for e in self._encode(plain, add_special_tokens=False)])

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)


class _SentencePiece:
    kind = "sentencepiece"

    def __init__(self, file: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            data = file.read_bytes()
            self._backend = SentencePieceProcessor()
            self._backend.LoadFromSerializedProto(data)
        except (OSError, RuntimeError) as e:
            raise UserError(f"{file}: not a readable SentencePiece model: {e}") from None
        self.fingerprint = hashlib.sha256(data).hexdigest()
        size = self.vocab_size = self._backend.GetPieceSize()
        vocabulary = {self._backend.IdToPiece(i): i for i in range(size)}
        pad = self._backend.pad_id()
        names = ",".join((*NEEDED, "<|endoftext|>"))
        self.special = _special_ids(
            vocabulary, file, self._backend.IdToPiece(pad) if pad >= 0 else None, f"train with --user_defined_symbols='{names}'"
        )
        self._hidden = {i for i in range(size) if self._backend.IsControl(i)}
        self._shown = {i: p for p, i in vocabulary.items() if i in self._hidden or (p.startswith("<|") and p.endswith("|>"))}
        self._guard = _Guard({p for p in vocabulary if p.startswith("<|") and p.endswith("|>")})

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._guard.encode(texts, lambda plain: self._backend.EncodeAsIds(plain) if plain else [])

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        out, run = [], []
        for i in (int(i) for i in ids):
            if i not in self._shown:
                run.append(i)
                continue
            out.append(self._backend.DecodeIds(run) if run else "")
            run = []
            if not skip_special:
                out.append(self._shown[i])
        return "".join([*out, self._backend.DecodeIds(run) if run else ""])


class _Guard:
    """Breaks the names of tokens that a backend would recognise inside plain text, so that they stay text."""

    def __init__(self, names: set[str]) -> None:
        self._pattern = re.compile("|".join(re.escape(n) for n in sorted(names, key=len, reverse=True))) if names else None

    def encode(self, texts: Sequence[str], backend: Any) -> list[list[int]]:
        hits = [i for i, t in enumerate(texts) if self._pattern.search(t)] if self._pattern else []
        if not self._pattern or not hits:
            return backend(list(texts))
        plain, spans = list(texts), []
        for i in hits:
            cuts = [0, *(m.start() + 1 for m in self._pattern.finditer(texts[i])), len(texts[i])]
            plain[i] = ""
            spans.append((i, len(plain), len(plain) + len(cuts) - 1))
            plain += [texts[i][a:b] for a, b in itertools.pairwise(cuts)]
        ids = backend(plain)
        for i, a, b in spans:
            ids[i] = [x for part in ids[a:b] for x in part]
        return ids[: len(texts)]


def _special_ids(vocabulary: dict[str, int], file: Path, pad: str | None, remedy: str) -> SpecialIds:
    missing = [n for n in NEEDED if n not in vocabulary]
    if missing:
        raise UserError(f"{file}: the vocabulary lacks {' '.join(missing)}, which the chat template needs; {remedy}")
    pads = [n for n in (pad, "<|endoftext|>", "<pad>") if n in vocabulary]
    if not pads:
        raise UserError(f"{file}: no padding token (looked for {pad or 'none declared'}, <|endoftext|>, <pad>); {remedy}")
    ids = {n: vocabulary[n] for n in NEEDED}
    return SpecialIds(ids[IM_START], ids[IM_END], ids[IMAGE_PAD], ids[VISION_START], ids[VISION_END], vocabulary[pads[0]])


def _declared_pad(folder: Path) -> str | None:
    try:
        pad = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("pad_token")
    except (OSError, ValueError, AttributeError):
        return None
    return pad.get("content") if isinstance(pad, dict) else pad


def _fingerprint(tree: dict[str, Any]) -> str:
    """Of the parts of a tokenizer.json that decide text -> ids; saving it again with another library version does not change it."""
    model = dict(tree.get("model") or {})
    if "merges" in model:
        model["merges"] = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    parts = [model, *(tree.get(k) for k in ("normalizer", "pre_tokenizer", "added_tokens"))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def layout(turns: Sequence[Turn], special: SpecialIds, *, prompt: bool = False) -> list[tuple[Kind, str | int]]:
    """The conversation as items (kind, text | special id), or ("image", k) for the k-th image.

    Loss falls on an assistant's text and the `<|im_end|>` after it. prompt=True ends with `<|im_start|>assistant\\n`.
    """
    out: list[tuple[Kind, str | int]] = []
    image = 0
    for turn in turns:
        out.append(("context", special.im_start))
        if turn.role == "assistant":
            out += [("context", "assistant\n"), ("target", turn.text.strip()), ("target", special.im_end)]
        else:
            first, *rest = (part.strip() for part in turn.text.split(IMAGE_MARK))
            out.append(("context", f"{turn.role}\n{first}"))
            for part in rest:
                out += [("context", special.vision_start), ("image", image), ("context", special.vision_end), ("context", part)]
                image += 1
            out.append(("context", special.im_end))
        out.append(("context", "\n"))
    if prompt:
        out += [("context", special.im_start), ("context", "assistant\n")]
    return out


def encode_batch(tokenizer: Tokenizer, talks: Sequence[Sequence[Turn]], *, prompt: bool = False) -> list[list[Segment]]:
    """Segments of many conversations, tokenised together. Neighbours of one kind are merged; no segment is empty."""
    layouts = [layout(turns, tokenizer.special, prompt=prompt) for turns in talks]
    texts = {value: i for i, value in enumerate(dict.fromkeys(v for items in layouts for _, v in items if isinstance(v, str) and v))}
    ids = tokenizer.encode(list(texts))
    out: list[list[Segment]] = []
    for items in layouts:
        segments: list[Segment] = []
        for kind, value in items:
            if kind == "image":
                segments.append((kind, value))
                continue
            piece = [value] if isinstance(value, int) else ids[texts[value]] if value else []
            if segments and segments[-1][0] == kind:
                segments[-1][1].extend(piece)
            elif piece:
                segments.append((kind, list(piece)))
        out.append(segments)
    return out


def encode(tokenizer: Tokenizer, record: Record) -> list[Segment]:
    """Segments of one record, in order."""
    return encode_batch(tokenizer, [record.turns])[0]


def prompt_segments(tokenizer: Tokenizer, turns: Sequence[Turn]) -> list[Segment]:
    """What a model is shown before it answers: context and image segments, ending in `<|im_start|>assistant\\n`."""
    return encode_batch(tokenizer, [turns], prompt=True)[0]


def flat_ids(segments: Sequence[Segment], special: SpecialIds, tokens_per_image: int = 1) -> list[int]:
    """Segments as one list of ids, each image as `tokens_per_image` times `<|image_pad|>`."""
    out: list[int] = []
    for kind, value in segments:
        out.extend([special.image_pad] * tokens_per_image if kind == "image" else value)
    return out


def prompt_ids(tokenizer: Tokenizer, turns: Sequence[Turn], tokens_per_image: int = 1) -> list[int]:
    """`prompt_segments` as flat ids."""
    return flat_ids(prompt_segments(tokenizer, turns), tokenizer.special, tokens_per_image)


def hf_messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The turns as `apply_chat_template` takes them: content lists of {"type": "image"} and {"type": "text", "text": ...}."""
    out = []
    for turn in turns:
        parts = [turn.text] if turn.role == "assistant" else turn.text.split(IMAGE_MARK)
        content: list[dict[str, str]] = []
        for i, part in enumerate(parts):
            if i:
                content.append({"type": "image"})
            if part.strip():
                content.append({"type": "text", "text": part.strip()})
        out.append({"role": turn.role, "content": content})
    return out
