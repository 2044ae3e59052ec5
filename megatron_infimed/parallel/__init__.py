"""Processes and devices. Every package that uses Megatron-Core imports this one first, which sees to how that is imported."""

from megatron_infimed.parallel import cpu

cpu.import_megatron()
