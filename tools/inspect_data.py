#!/usr/bin/env python
"""Prints and draws what packed rows really contain. See megatron_infimed/report/rows.py."""

from megatron_infimed.cli import run
from megatron_infimed.report.rows import app

if __name__ == "__main__":
    run(app)
