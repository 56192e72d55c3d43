"""Make shards in this process or in many, a bounded number of them at a time."""

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError

from . import shards
from .shards import Encoding, Shard

_tokenizer: Any = None  # one for each process: built before the workers are forked, so that they share its memory


def build_tokenizer(encoding: Encoding) -> Any:
    """Build the tokenizer that this process, and the workers that it forks, will use, and return it.

    Raises LionError if documents are to end with a token that it does not have.
    """
    global _tokenizer
    _tokenizer = encoding.tokenizer.build()
    if encoding.append_eod and (_tokenizer.eod is None or _tokenizer.eod < 0):
        raise LionError(f"--append-eod: {encoding.tokenizer.tokenizer_type} has no end-of-document token here")
    return _tokenizer


def make_shard(shard: Shard, folder: Path, encoding: Encoding, strict: bool) -> dict[str, Any]:
    """One task of a worker: the record of the shard's parts."""
    return shards.write_shard(shard, folder, encoding, _tokenizer, strict)


def end_with_parent() -> None:
    """End this worker within a second of a killed parent. Otherwise it would wait for work forever."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def records(
    stream: Iterator[Shard], folder: Path, encoding: Encoding, *, workers: int, strict: bool
) -> Iterator[tuple[Shard, dict[str, Any], bool]]:
    """Yield each shard with its record, in the order of completion, and whether it was made now.

    At most ``workers + 2`` shards are in memory. With one worker the shards are made in this process.
    """
    if workers == 1:
        for shard in stream:
            record = shards.finished_record(folder, shard)
            yield shard, record or make_shard(shard, folder, encoding, strict), record is None
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        pool.submit(os.getpid).result()  # forks every worker now, before a reader of parquet starts its threads
        running: dict[Future[dict[str, Any]], Shard] = {}
        try:
            for shard in stream:
                if record := shards.finished_record(folder, shard):
                    yield shard, record, False
                    continue
                running[pool.submit(make_shard, shard, folder, encoding, strict)] = shard
                if len(running) > workers + 1:
                    yield from _finished(running)
            while running:
                yield from _finished(running)
        except BrokenProcessPool as error:
            raise LionError("a worker was killed (out of memory?): run the same command again to continue") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _finished(running: "dict[Future[Any], Shard]") -> Iterator[tuple[Shard, dict[str, Any], bool]]:
    """Wait for at least one shard, and take those that are done out of ``running``."""
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        shard = running.pop(future)
        yield shard, future.result(), True
