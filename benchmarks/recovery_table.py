"""Print one line per run folder of recovery.sh."""

import json
import sys
from pathlib import Path

for path in sorted(Path(sys.argv[1]).glob("*/report.json")):
    report = json.loads(path.read_text())
    print(path.parent.name, report["verdict"])
    print(
        "  seconds",
        report["stage_seconds"],
        "train",
        {k: report["train"].get(k) for k in ("tokens", "tokens_per_second")},
    )
    for name, row in report["perplexity"].items():
        print(
            f"  {name:10}", *(f"{point} {row[point]:.2f}" for point in ("before", "converted", "after") if row[point])
        )
    for name, row in report["tasks"].items():
        for metric, values in row.items():
            if metric in ("acc", "acc_norm"):
                points = (values[point] for point in ("before", "converted", "after"))
                print(
                    f"  {name:12} {metric:9}",
                    *(f"{v:.3f}" for v in points),
                    "ci",
                    values["ci95"],
                    "p",
                    values["p_value"],
                )
