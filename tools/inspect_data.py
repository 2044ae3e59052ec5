#!/usr/bin/env python
"""Shows what shards hold: on the terminal and as one HTML page. See megatron_infimed/report/shard.py."""

from megatron_infimed.cli import run
from megatron_infimed.report.shard import app

if __name__ == "__main__":
    run(app)
