#!/usr/bin/env python
"""Prints and draws what packed rows really contain. See megatron_infimed/report/rows.py."""

from megatron_infimed.report.rows import main

if __name__ == "__main__":
    main()
