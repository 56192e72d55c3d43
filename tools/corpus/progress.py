"""Progress of a preparation: what is done, how fast, and the remaining time."""

import time
from typing import Any

from .shards import Shard

PROGRESS_SECONDS = 10.0


class Progress:
    """Counts what is done and prints a line every ten seconds."""

    def __init__(self, total: int) -> None:
        self.total, self.start, self.shown = total, time.monotonic(), time.monotonic()
        self.kept = self.made = self.tokens = self.bytes = 0
        self.from_position: int | None = None
        self.position = 0

    def add(self, shard: Shard, record: dict[str, Any], made_now: bool) -> None:
        """Count a shard in."""
        self.position = max(self.position, shard.consumed)
        if not made_now:
            self.kept += 1
            self.from_position = self.position
            return
        self.made += 1
        self.tokens += sum(part["tokens"] for part in record["counts"].values())
        self.bytes += sum(len(unit) for unit in shard.units)
        if time.monotonic() - self.shown >= PROGRESS_SECONDS:
            self.shown = time.monotonic()
            print(f"  {self.line()}", flush=True)

    def line(self) -> str:
        """Tokens and megabytes per second, and the remaining time at that rate."""
        seconds = max(time.monotonic() - self.start, 1e-9)
        text = f"{self.tokens:,} tokens, {self.tokens / seconds:,.0f} tokens/s, {self.bytes / 1e6 / seconds:.2f} MB/s"
        begun = self.from_position or 0
        if self.total > self.position > begun:
            left = seconds * (self.total - self.position) / (self.position - begun)
            text += f", {100 * self.position / self.total:.1f} %, about {left / 60:.0f} min left"
        return text
