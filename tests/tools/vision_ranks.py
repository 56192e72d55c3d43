"""A rank of test_vision_study.py's small run, as torchrun starts it: vision_ranks.py FOLDER CHANGES."""

import json
import sys
from pathlib import Path

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parents[1] / "tools")]

from test_vision_study import start  # noqa: E402
from vision.ranks import join  # noqa: E402

if __name__ == "__main__":
    ranks = join("cpu")
    start(Path(sys.argv[1]), ranks=ranks, **json.loads(sys.argv[2])).run()
    ranks.leave()
