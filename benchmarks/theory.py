"""Predicted errors of layers and the loss that plans really cost, on the embedded models.

``python benchmarks/theory.py`` writes ``benchmarks/results/theory-MODEL.csv`` and ``theory.json``; plans that are done are kept
under ``runs/theory``, so that it can be stopped and started again.
"""

import argparse
from pathlib import Path

from hcsmoe_core._util import replacing, versions, write_json
from hcsmoe_core.demo.models import NAMES
from hcsmoe_core.studies import theory


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(NAMES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    for name in options.models:
        frame = theory.measure(name, seed=options.seed)
        with replacing(options.out / f"theory-{name}.csv") as part:
            frame.round(6).to_csv(part, index=False)
        print(theory.agreement(frame).round(2).to_string(index=False))
    write_json(
        options.out / "theory.json", {"seed": options.seed, "methods": theory.PLANNED, "versions": versions()}
    )


if __name__ == "__main__":
    main()
