#!/usr/bin/env python
"""Image-text data -> shard. See megatron_infimed/data/preprocess.py."""

from megatron_infimed.data.preprocess import main

if __name__ == "__main__":
    main()
