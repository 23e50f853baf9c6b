"""The demo with three seeds: does held-out accuracy rise from below 0.45 to above 0.85 within the times promised?

.venv/bin/python benchmarks/demo.py [--seeds 0,1,2] [--set trainer.steps=30] [--json]
"""

from __future__ import annotations

import argparse
import sys

from runs import report, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows, bars = [], {}
    print("seed  10 tokens       48 tokens       first step  training  audit")
    for seed in arguments.seeds.split(","):
        done = run("demo", [f"seed={seed}", *arguments.set])
        row = {"seed": int(seed), "first_step_s": round(done.first_step_s, 1), "training_s": round(done.training_s, 1)}
        for name in ("products", "products-48-tokens"):
            values = {int(version): value["accuracy"] for version, value in done.evaluations[name].items()}
            row[f"{name}-before"], row[f"{name}-after"] = values[0], values[max(values)]
        row |= {name: done.audit[name] for name in ("lost", "twice", "wrong_version")}
        rows.append(row)
        print(
            f"{seed:>4}  {row['products-before']:.3f} → {row['products-after']:.3f}  "
            f"{row['products-48-tokens-before']:.3f} → {row['products-48-tokens-after']:.3f}  "
            f"{row['first_step_s']:8.1f} s {row['training_s']:7.1f} s  {done.last_line.split('; ')[-1]}",
            flush=True,
        )
        bars |= {
            f"seed {seed}: from below 0.45 to above 0.85": row["products-before"] < 0.45
            and row["products-after"] > 0.85,
            f"seed {seed}: first step within 90 s": row["first_step_s"] < 90,
            f"seed {seed}: training within 8 minutes": row["training_s"] < 480,
            f"seed {seed}: nothing lost": not (row["lost"] or row["twice"] or row["wrong_version"]),
        }
    return report({"benchmark": "demo", "rows": rows}, bars, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
