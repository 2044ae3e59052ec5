"""Asks the exported checkpoint, through Hugging Face's own classes alone, what our evaluation asked, and compares the answers.

Nothing of megatron_infimed is imported: this is what a user of the export would write.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def main(
    model: Annotated[Path, typer.Option(help="the exported folder")],
    answers: Annotated[Path, typer.Option(help="answers.jsonl of an evaluation")],
    images: Annotated[Path, typer.Option(help="folder that image paths start from")],
    output: Annotated[Path, typer.Option(help="JSON file to write")],
    questions: Annotated[int, typer.Option(help="how many to ask, evenly spread")] = 60,
) -> None:
    torch.set_num_threads(2)
    processor = AutoProcessor.from_pretrained(model)
    network = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    with answers.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    asked = rows[:: max(1, len(rows) // questions)][:questions]
    different = []
    for row in asked:
        pictures = [Image.open(images / name).convert("RGB") for name in row["images"]]
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": row["question"]}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=prompt, images=pictures or None, return_tensors="pt")
        with torch.inference_mode():
            out = network.generate(**inputs, max_new_tokens=16, do_sample=False)
        said = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        if said != row["prediction"]:
            different.append({"id": row["id"], "evaluation": row["prediction"], "hugging_face": said})
    same = len(asked) - len(different)
    output.write_text(json.dumps({"asked": len(asked), "same": same, "different": different}, indent=1))
    print(f"Hugging Face gives the answer our evaluation recorded for {same} of {len(asked)} held-out questions")
    if same < 0.95 * len(asked):  # a picture decoded one gray level apart may turn a close call; more than that is a fault
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
