"""python -m megatron_infimed."""

from megatron_infimed.cli import main

if __name__ == "__main__":
    main()
