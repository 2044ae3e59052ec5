"""The quickstart's last step: report.html and summary.json from what the stages left behind.

python examples/quickstart/report.py --run runs/quickstart --corpus runs/quickstart/corpus [--split test]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_infimed.errors import UserError
from megatron_infimed.report.quickstart import write_report

STAGES = ("pretrain", "sft_general", "sft_medical", "sft_cross")


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the quickstart's report.html and summary.json.")
    parser.add_argument("--run", type=Path, required=True, help="holds a folder per stage; the report is written there")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--split", default="test", help="which evaluation to report: RUN/STAGE/eval_SPLIT")
    parser.add_argument("--stages", nargs="+", default=STAGES)
    args = parser.parse_args()
    try:
        write_report(args.run, args.stages, corpus=args.corpus, split=args.split)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
