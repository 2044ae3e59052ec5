#!/usr/bin/env python
"""Checkpoints from and to Hugging Face. See megatron_infimed/convert/cli.py."""

from megatron_infimed.cli import run
from megatron_infimed.convert.cli import app

if __name__ == "__main__":
    run(app)
