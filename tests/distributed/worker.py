"""Trains several runs one after another in the same processes, because starting a process costs more than training the tiny model.

torchrun ... -m tests.distributed.worker RECIPE '[["output=a", "parallel.tensor=2"], ...]'
"""

from __future__ import annotations

import json
import sys

from megatron_infimed.parallel import groups
from megatron_infimed.recipe_files import load_recipe
from megatron_infimed.train.trainer import fit

if __name__ == "__main__":
    for overrides in json.loads(sys.argv[2]):
        fit(load_recipe(sys.argv[1], overrides))
    groups.shut_down()
