import megatron_infimed.parallel  # noqa: F401 # before Megatron-Core
