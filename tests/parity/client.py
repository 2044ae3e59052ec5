"""What a user of an exported folder does, in whatever transformers is importable: `python client.py FOLDER PICTURE OUT.npz`.

Run by tests in the installed version and, in a process of its own, in the one that MedEvalKit pins. Prints the loading report as JSON.
"""

from __future__ import annotations

import json
import sys
import warnings

QUESTION = "Is there a fracture?"


def ask(folder: str, picture: str) -> tuple[dict, dict]:
    """(loading report, arrays) for one question about one picture, and one without."""
    import numpy as np
    import torch
    import transformers
    from PIL import Image

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    model, loading = transformers.AutoModelForImageTextToText.from_pretrained(folder, torch_dtype=torch.float32, output_loading_info=True)
    model.eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    arrays = {}
    for name, images in (("one", [Image.open(picture)]), ("none", [])):
        messages = [{"role": "user", "content": [*({"type": "image"} for _ in images), {"type": "text", "text": QUESTION}]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=text, images=images or None, return_tensors="pt")
        with torch.no_grad():
            arrays[f"{name}_logits"] = model(**inputs).logits.numpy()
            answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        arrays[f"{name}_answer"] = answer[0, inputs["input_ids"].shape[1] :].numpy()
        arrays[f"{name}_ids"] = inputs["input_ids"].numpy()
        if images:
            arrays["pixels"] = inputs["pixel_values"].numpy()
    text_config = model.config.text_config
    rope = getattr(text_config, "rope_theta", None) or text_config.rope_parameters["rope_theta"]
    report = {
        "version": transformers.__version__,
        "class": type(model).__name__,
        "rope_theta": rope,
        "eos": model.generation_config.eos_token_id,
        "pad": model.generation_config.pad_token_id,
        **{key: sorted(str(k) for k in loading[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")},
    }
    return report, {key: np.asarray(value) for key, value in arrays.items()}


if __name__ == "__main__":
    import numpy

    made, found = ask(sys.argv[1], sys.argv[2])
    numpy.savez(sys.argv[3], **found)
    print(json.dumps(made))
