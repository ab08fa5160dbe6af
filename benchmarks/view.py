"""Time per frame while the cut is dragged, and size and times of a report, in a headless Chromium.

python benchmarks/view.py [LAYERS EXPERTS]
"""

import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_view import drag_times, opened, planted  # noqa: E402

from hcsmoe_core.ui.report import write_report  # noqa: E402


def main(layers=48, experts=128):
    stats = planted(layers, experts, families=experts // 5)
    with tempfile.TemporaryDirectory() as folder:
        path, start = Path(folder) / "report.html", time.perf_counter()
        write_report(stats, path)
        made, size = time.perf_counter() - start, path.stat().st_size / 1e6
        print(f"{layers} x {experts}: made in {made:.1f} s, {size:.2f} MB")
        with opened(path) as page:
            start = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
            first = page.evaluate("view.frames[0][0]")
            print(f"loaded after {start:.0f} ms, drawn after {first:.0f} ms")
            for _ in range(3):
                between, work = drag_times(page)
                print(
                    f"dragging, 100 moves: {between:.1f} ms between frames, {work:.1f} ms of work (medians)"
                )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
