"""Megatron's GPT-2 and BERT tokenizers from the user's own vocabulary files, without asking the Hugging Face hub."""

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from megatron_lion.config import LionError

# What the hub's "gpt2", "bert-large-uncased" and "bert-large-cased" say beside their vocabularies, and the name that
# each class of tokenizer looks for its vocabulary under.
LOCAL = {
    "GPT2BPETokenizer": ({"tokenizer_class": "GPT2Tokenizer"}, ("vocab.json", "merges.txt")),
    "BertWordPieceLowerCase": ({"tokenizer_class": "BertTokenizer", "do_lower_case": True}, ("vocab.txt",)),
    "BertWordPieceCase": ({"tokenizer_class": "BertTokenizer", "do_lower_case": False}, ("vocab.txt",)),
}


def use_local_vocabularies() -> None:
    """Let ``--vocab-file`` and ``--merge-file`` be enough for GPT2BPETokenizer and BertWordPiece{LowerCase,Case}.

    Stock 0.19.2 asks the hub for "gpt2" or "bert-large-*" even where both files are given (megatron_hf_tokenizer 83,
    huggingface_tokenizer 68): without the network it retries for 45 seconds and fails. Replaces the constructor of
    Megatron's ``MegatronHFTokenizer``; without ``--vocab-file`` it does what it did. Idempotent. Goes when Megatron
    reads the files it is given.
    """
    from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer
    from megatron.core.tokenizers.text.libraries.megatron_hf_tokenizer import MegatronHFTokenizer

    stock_init = MegatronHFTokenizer.__init__
    if getattr(stock_init, "_reads_local_files", False):
        return

    @functools.wraps(stock_init)
    def init(
        self: Any, tokenizer_path: str, vocab_file: str | None = None, merges_file: str | None = None, **kwargs: Any
    ) -> None:
        if not vocab_file or tokenizer_path not in LOCAL:
            stock_init(self, tokenizer_path, vocab_file, merges_file, **kwargs)
            return
        description, names = LOCAL[tokenizer_path]
        given = {"--vocab-file": vocab_file, "--merge-file": merges_file}
        # The fast tokenizers read everything at once and keep it in memory, so the folder may go afterwards.
        with tempfile.TemporaryDirectory() as folder:
            for name, (flag, path) in zip(names, given.items(), strict=False):
                if not path or not Path(path).is_file():
                    raise LionError(f"{flag} {path} is not a file: {tokenizer_path} needs {' and '.join(names)}")
                shutil.copyfile(path, Path(folder) / name)
            (Path(folder) / "tokenizer_config.json").write_text(json.dumps(description), encoding="utf-8")
            HuggingFaceTokenizer.__init__(self, folder, **kwargs)

    init._reads_local_files = True  # type: ignore[attr-defined]
    MegatronHFTokenizer.__init__ = init
