"""megatron_infimed: training of medical multimodal models on Megatron-Core. Start reading at train/step.py."""

__version__ = "0.1.0"
