"""Whether two recorded runs are equal to the last bit: every loss, and the trained weights.

python -m tools.gpu_check.same_losses --work FOLDER [--rows FILE] NAME NAME
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tools.gpu_check import records


def compare(one: dict[str, Any], other: dict[str, Any]) -> tuple[bool, str]:
    """Whether they are equal, and a sentence that says so or names the first difference."""
    names = f"{one['name']} and {other['name']}"
    if not one["losses"] or len(one["losses"]) != len(other["losses"]):
        return False, f"{names}: {len(one['losses'])} and {len(other['losses'])} losses were recorded"
    for number, (a, b) in enumerate(zip(one["losses"], other["losses"], strict=True)):
        if a != b:
            hint = "" if number else ". No update was made before it: the model itself is not reproducible here"
            values = f"{float.fromhex(a)!r} and {float.fromhex(b)!r}"
            return False, f"{names}: the loss of micro-batch {number} differs, {values}{hint}"
    if one["weights"] != other["weights"]:
        return False, f"{names}: all {len(one['losses'])} losses are equal, the weights after the last step differ"
    return True, f"{names}: {len(one['losses'])} losses and the trained weights are equal to the last bit"


def main() -> int:
    """Compare, print, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("names", nargs=2)
    args = parser.parse_args()
    paths = [args.work / f"{name}.json" for name in args.names]
    lacking = [path.stem for path in paths if not path.is_file()]
    if lacking:
        equal, sentence = False, f"{' and '.join(args.names)}: nothing to compare, {lacking[0]} did not run"
    else:
        equal, sentence = compare(*(json.loads(path.read_text()) for path in paths))
    print(sentence)
    records.append(args.rows, comparison=sentence, equal=equal)
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())
