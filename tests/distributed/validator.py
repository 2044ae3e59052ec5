"""Validates several times one after another in the same processes, as worker.py trains: the figures go to the files named.

torchrun ... -m tests.distributed.validator RECIPE '[[["parallel.tensor=2"], ["held"], "a.json", "run"], ...]'
(overrides, prefixes, output, checkpoint)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_infimed.parallel import groups
from megatron_infimed.recipe_files import load_recipe
from megatron_infimed.train.validate import validate

if __name__ == "__main__":
    for overrides, data, output, checkpoint in json.loads(sys.argv[2]):
        validate(load_recipe(sys.argv[1], overrides), data, Path(output), checkpoint=checkpoint)
    groups.shut_down()
