"""Small real things for tests: a byte-level BPE tokenizer like Qwen3's, its SentencePiece sister, and pictures.

Everything is made from seeds in well under a second; nothing is read from outside. `from tests.tiny import tiny_tokenizer, tiny_images`.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = (
    "What is the modality of this image? The image is a chest X-ray, frontal view.",
    "Which organ is shown? The liver, on an axial CT slice with contrast.",
    "Is there a fracture? Yes. No. The heart is normal in size; the lungs are clear.",
    "user\nassistant\nsystem\nDescribe the picture in one sentence.",
    "An H&E stained section of the colon at 20x shows glands with goblet cells.",
    "MR of the brain, T2 weighted, shows a hyperintense lesion of 12 mm in the left frontal lobe.",
)


def tiny_tokenizer(folder: str | Path, vocab_size: int = 400) -> Path:
    """Writes a Hugging Face tokenizer folder (tokenizer.json, tokenizer_config.json), loadable as PreTrainedTokenizerFast; returns it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 40960,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def tiny_sentencepiece(path: str | Path, vocab_size: int = 330, symbols: tuple[str, ...] = SPECIAL) -> Path:
    """Trains a byte-fallback SentencePiece BPE whose vocabulary holds `symbols`; returns the .model file."""
    import sentencepiece

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line for t in TEXTS * 4 for line in t.splitlines()),
            model_writer=out,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            user_defined_symbols=list(symbols),
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    return path


def tiny_images(n: int, seed: int = 0) -> list[bytes]:
    """n different pictures as files: JPEG, gray JPEG, PNG and RGBA PNG by turns, sides of 24 to 120 pixels."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        h, w = (int(x) for x in rng.integers(24, 121, 2))
        mode, kind = (("RGB", "JPEG"), ("L", "JPEG"), ("RGB", "PNG"), ("RGBA", "PNG"))[i % 4]
        channels = {"RGB": 3, "L": 1, "RGBA": 4}[mode]
        yy, xx = np.mgrid[0:h, 0:w]
        waves = [127 + 127 * np.sin((rng.normal() * xx + rng.normal() * yy) / rng.uniform(2, 12)) for _ in range(channels)]
        array = np.stack(waves, axis=-1).astype(np.uint8)
        if mode == "RGBA":
            array[..., 3] = 255
        buffer = io.BytesIO()
        Image.fromarray(array[..., 0] if mode == "L" else array, mode).save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}))
        out.append(buffer.getvalue())
    return out
