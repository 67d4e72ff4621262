"""Keep the record of a finished training run under benchmarks/results, for the README.

python scripts/keep_run.py runs/nano
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from harness import write_result


def main() -> int:
    """Copy `run.json` of a complete run."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    record = json.loads((Path(sys.argv[1]) / "run.json").read_text())
    if not record["complete"]:
        print(f"{sys.argv[1]} is not complete; resume it first", file=sys.stderr)
        return 1
    print(f"wrote {write_result('run_' + record['name'], record)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
