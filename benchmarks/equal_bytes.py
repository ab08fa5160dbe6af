"""Loss against bytes and operations of the embedded models' experts: merged, trimmed, pruned, and rounded to few bits.

``python benchmarks/equal_bytes.py`` writes ``benchmarks/results/equal-bytes-MODEL.csv`` and ``equal-bytes.json``; cells that
are done are kept under ``runs/bytes``, so that it can be stopped and started again.
"""

import argparse
from pathlib import Path

from hcsmoe_core._util import replacing, versions, write_json
from hcsmoe_core.demo.models import NAMES
from hcsmoe_core.studies import tradeoff


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(NAMES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=int, help="items of each task, 0 for all; without it the loss alone")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    how = dict(seeds=options.seeds, limit=options.limit)
    for name in options.models:
        frame = tradeoff.measure(name, **how)
        with replacing(options.out / f"equal-bytes-{name}.csv") as part:
            frame.round(6).to_csv(part, index=False)
        print(frame.to_string(index=False))
    write_json(options.out / "equal-bytes.json", how | {"methods": tradeoff.COMPARED, "versions": versions()})


if __name__ == "__main__":
    main()
