"""Trains the quickstart's tokenizer: a byte-level BPE over the corpus's own texts, saved as a Hugging Face folder with Qwen's special tokens.

A real run takes Qwen3's folder instead; everything after this step is the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pyarrow.parquet
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]


def texts(corpus: Path) -> Iterator[str]:
    """Every training text of the corpus."""
    for name in ("captions", "questions_pretrain", "general", "cross"):
        for line in (corpus / f"{name}.jsonl").read_text().splitlines():
            yield from (turn["value"].replace("<image>", "") for turn in json.loads(line)["conversations"])
    table = pyarrow.parquet.read_table(corpus / "medical.parquet", columns=["question", "answer"])
    for column in table.columns:
        yield from column.to_pylist()


def main(
    corpus: Annotated[Path, typer.Option(help="folder made by corpus.py")],
    output: Annotated[Path, typer.Option(help="folder to write")],
    vocab_size: int = 768,
) -> None:
    if (output / "tokenizer_config.json").exists():
        print(f"{output}: done before")
        return
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(corpus), trainer)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": SPECIAL[1:],
        "model_max_length": 40960,
        "clean_up_tokenization_spaces": False,
    }
    (output / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    print(f"{output}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    typer.run(main)
