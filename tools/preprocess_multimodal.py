#!/usr/bin/env python
"""Image-text data -> shard. See megatron_infimed/preprocess/preprocess.py."""

from megatron_infimed.cli import run
from megatron_infimed.preprocess.preprocess import app

if __name__ == "__main__":
    run(app)
