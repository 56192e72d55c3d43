"""A rank of test_vision_study.py's small run, as torchrun starts it: vision_ranks.py FOLDER CHANGES."""

import json
import sys
from pathlib import Path

from tests.tools.test_vision_study import start
from tools.paper.vision.ranks import join

if __name__ == "__main__":
    ranks = join("cpu")
    start(Path(sys.argv[1]), ranks=ranks, **json.loads(sys.argv[2])).run()
    ranks.leave()
