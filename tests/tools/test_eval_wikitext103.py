"""tools/eval_wikitext103.py and tools/export_hf.py: real Megatron checkpoints against Hugging Face's GPT-2."""

import json
import math
import shutil
from argparse import Namespace
from pathlib import Path

import eval_wikitext103
import export_hf
import pytest
import torch
from evaluation import checkpoints, windows

from megatron_lion.config import LionError
from tests.harness import HORIZON, Run, pretrain, run_ranks

SCRIPT = Path(eval_wikitext103.__file__)
# Rows that pad the vocabulary (512 to 768, so that the last tensor-parallel rank has padding alone), positions that
# have moved, and steps large enough that no bias is near zero.
MODEL = "--make-vocab-size-divisible-by 384 --optimizer lion --lr 1e-2 --lr-warmup-iters 0"
TRAIN = f"{MODEL} {HORIZON} --train-iters 12 --save-interval 6"
PIPELINED = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
WINDOW, STEP = 32, 20


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to evaluate on, spaced as WikiText is."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("sample") / "test.tokens"
    words = topics["specialnames"][:6000].replace(",", " ,").replace("-", " @-@ ").replace(". ", " . ")
    path.write_text(f" = Classes = \n \n {words}\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def saved(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints 6 and 12 of a run at TP 2 x PP 2."""
    folder = tmp_path_factory.mktemp("saved")
    pretrain(text, f"{TRAIN} {PIPELINED} --save {folder}", ranks=4)
    return folder


def start(folder: Path, sample: Path, output: Path, *flags: str, ranks: int = 1) -> Run:
    return run_ranks(
        f"--checkpoints {folder} --text {sample} --output {output} --window {WINDOW} --overlapping-eval {STEP}",
        "--micro-batch-size 4",
        *flags,
        script=SCRIPT,
        ranks=ranks,
    )


def evaluate(folder: Path, sample: Path, output: Path, *flags: str, ranks: int = 1) -> Run:
    run = start(folder, sample, output, *flags, ranks=ranks)
    assert run.returncode == 0, run.output[-5000:]
    return run


def results(output: Path) -> dict[str, dict[str, float]]:
    return json.loads(output.read_text())["results"]


@pytest.fixture(scope="module")
def at_dp2(saved: Path, sample: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """Both checkpoints evaluated by two data-parallel ranks."""
    output = tmp_path_factory.mktemp("at_dp2") / "out.json"
    return output, evaluate(saved, sample, output, ranks=2)


def hugging_face_nll(folder: Path, tokenizer: Path, sample: Path) -> tuple[float, int]:
    """An own loop over the windows with transformers' GPT-2: the sum of losses in float64, and the tokens scored."""
    import sentencepiece
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    encoder = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
    ids = torch.tensor(encoder.encode(windows.wikitext_detokenizer(sample.read_text(encoding="utf-8"))))
    total, seen = 0.0, 1  # token 0 is given
    with torch.no_grad():
        for begin in range(0, len(ids), STEP):
            end = min(begin + WINDOW + 1, len(ids))
            logits = model(ids[begin : end - 1][None]).logits[0].double()
            for position in range(seen, end):
                total -= logits[position - begin - 1].log_softmax(-1)[ids[position]].item()
            seen = end
            if end == len(ids):
                break
    return total, seen - 1


def export(folder: Path, output: Path, *more: str) -> None:
    assert export_hf.main(["--checkpoints", str(folder), "--output", str(output), *more]) == 0


def test_saved_at_tp2_pp2_evaluated_at_dp2_equals_transformers(
    saved: Path, sample: Path, text: Path, at_dp2: tuple[Path, Run], tmp_path: Path
) -> None:
    for step in ("6", "12"):
        export(saved, tmp_path / step, "--step", step)
        nll, scored = hugging_face_nll(tmp_path / step, text, sample)
        found = results(at_dp2[0])[step]
        assert found["nll"] == pytest.approx(nll, rel=1e-6)
        assert found["perplexity"] == pytest.approx(math.exp(nll / scored), rel=1e-4)
    config = json.loads((tmp_path / "12" / "config.json").read_text())
    assert (config["vocab_size"], config["activation_function"]) == (512, "gelu_new")


@pytest.mark.slow
def test_one_process_gives_the_same_number_and_keeps_what_is_finished(
    saved: Path, sample: Path, at_dp2: tuple[Path, Run], tmp_path: Path
) -> None:
    """Every token once, whatever DP is; and the step that --output has already is not computed again."""
    output = tmp_path / "out.json"
    content = json.loads(at_dp2[0].read_text())
    expected = content["results"].pop("12")
    content["results"]["6"]["nll"] = -1.0
    output.write_text(json.dumps(content))
    evaluate(saved, sample, output)
    assert results(output)["6"]["nll"] == -1.0
    assert results(output)["12"]["nll"] == pytest.approx(expected["nll"], rel=1e-9)


def test_the_table_and_the_counts_are_printed(at_dp2: tuple[Path, Run], sample: Path) -> None:
    output, run = at_dp2
    content = json.loads(output.read_text())
    row = content["results"]["12"]
    assert (
        f"| 12 | {row['perplexity']:.4g} | {row['log_perplexity']:.4f} | {row['word_perplexity']:.4g} |" in run.output
    )
    settings = content["settings"]
    assert settings["words"] == len(sample.read_text().strip().split(" "))
    assert settings["bytes"] == len(windows.wikitext_detokenizer(sample.read_text()).encode())
    assert row["log_word_perplexity"] == pytest.approx(row["nll"] / (settings["words"] - 1))
    assert row["bits_per_byte"] == pytest.approx(row["nll"] / math.log(2) / settings["bytes"])
    for formula in windows.FORMULAS.values():
        assert formula in run.output


@pytest.mark.slow
def test_saved_alone_evaluated_at_tp2_pp2_equals_transformers(text: Path, sample: Path, tmp_path: Path) -> None:
    """The way back, with GELU by the error function and an output layer of its own."""
    folder, output = tmp_path / "saved", tmp_path / "out.json"
    pretrain(text, f"{TRAIN} --save {folder} --no-bias-gelu-fusion --untie-embeddings-and-output-weights")
    evaluate(folder, sample, output, PIPELINED, "--steps latest", ranks=4)
    export(folder, tmp_path / "exported")
    nll, _ = hugging_face_nll(tmp_path / "exported", text, sample)
    assert results(output)["12"]["nll"] == pytest.approx(nll, rel=1e-6)
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert (config["activation_function"], config["tie_word_embeddings"]) == ("gelu", False)


@pytest.mark.slow
def test_raw_logits_let_the_padding_in(saved: Path, sample: Path, at_dp2: tuple[Path, Run], tmp_path: Path) -> None:
    """The same losses plus ln(1 + the padding's share), so a larger sum."""
    output = tmp_path / "out.json"
    evaluate(saved, sample, output, "--raw-logits", "--steps 6", PIPELINED, ranks=4)
    masked = results(at_dp2[0])["6"]["nll"]
    assert results(output)["6"]["nll"] > masked * (1 + 1e-4)


@pytest.mark.parametrize("tokens", [2, 3, 20, 33, 34, 52, 53, 54, 200])
@pytest.mark.parametrize(("length", "step"), [(32, 1), (32, 20), (32, 32), (1, 1)])
def test_every_token_but_the_first_is_scored_once(tokens: int, length: int, step: int) -> None:
    scored = []
    for window in windows.make_windows(tokens, length, step):
        assert 0 < window.scored <= window.end - window.begin <= length
        targets = list(range(window.begin + 1, window.end + 1))[-window.scored :]
        assert window.begin == 0 or targets[0] - window.begin > length - step, "enough tokens before it"
        scored += targets
    assert scored == list(range(1, tokens))


@pytest.mark.parametrize(("tokens", "length", "step"), [(1, 32, 32), (100, 32, 33), (100, 32, 0)])
def test_windows_that_would_leave_tokens_out_are_refused(tokens: int, length: int, step: int) -> None:
    with pytest.raises(LionError, match=r"--overlapping-eval \d+ must be between|none to predict"):
        windows.make_windows(tokens, length, step)


def test_gpt2s_counts_of_wikitext103_give_the_published_ratio() -> None:
    """T = 270,329 tokens for T_o = 245,566 words: Megatron-LM (arXiv 1909.08053), appendix E.1."""
    row = windows.figures(3.0 * 270_328, tokens=270_329, words=245_566, size=1_000_000)
    assert row["log_perplexity"] == pytest.approx(3.0)
    ratio = row["log_word_perplexity"] / row["log_perplexity"]
    assert ratio == pytest.approx(270_328 / 245_565, rel=1e-12) and f"{ratio:.4f}" == "1.1008"


def test_detokenizing_undoes_wikitexts_spacing() -> None:
    text = (
        " = Title = \n \n The well @-@ known ( first ) \" one \" , of 1 @,@ 000 m , isn 't 5 @.@ 5 : it 's Anna 's . \n"
    )
    assert windows.wikitext_detokenizer(text) == (
        " = Title =\n\nThe well-known (first) \"one\", of 1,000 m, isn 't 5.5: it's Anna's.\n"
    )


def test_what_gpt2_cannot_express_is_refused_by_name(saved: Path) -> None:
    args = checkpoints.read_args(checkpoints.iteration_folder(saved, 6))
    export_hf.require_gpt2(args)
    for name, value, message in (
        ("position_embedding_type", "rope", "position_embedding_type is rope"),
        ("swiglu", True, "swiglu is True"),
        ("normalization", "RMSNorm", "normalization is RMSNorm"),
        ("kv_channels", 32, "heads of 32 channels"),
        ("num_experts", 4, "num_experts is 4"),
        ("use_mup", True, "use_mup is True"),
        ("softmax_type", "learnable", "softmax_type is learnable"),
        ("window_size", (8, 0), r"window_size is \(8, 0\)"),
        ("activation_func_clamp_value", 7.0, "activation_func_clamp_value is 7.0"),
        ("attention_output_gate", True, "attention_output_gate is True"),
    ):
        with pytest.raises(LionError, match=message):
            export_hf.require_gpt2(Namespace(**{**vars(args), name: value}))
    with pytest.raises(LionError, match="2 query groups for 4 heads"):
        export_hf.require_gpt2(Namespace(**{**vars(args), "group_query_attention": True, "num_query_groups": 2}))


def _file_of(checkpoint: Path, key: str) -> tuple[Path, int]:
    """The file that holds a tensor, and a byte in its middle."""
    from torch.distributed.checkpoint import FileSystemReader

    found = FileSystemReader(str(checkpoint)).read_metadata().storage_data
    place = next(place for index, place in found.items() if index.fqn == key)
    return checkpoint / place.relative_path, place.offset + place.length // 2


def test_a_damaged_checkpoint_is_neither_exported_nor_evaluated(saved: Path, sample: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "damaged")
    checkpoint = checkpoints.iteration_folder(tmp_path / "damaged", 12)
    path, at = _file_of(checkpoint, "embedding.word_embeddings.weight")
    whole = bytearray(path.read_bytes())
    whole[at] ^= 16  # one bit of one weight
    for content in (bytes(whole), bytes(whole[:at]), None):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(LionError, match=rf"iter_0000012 cannot be read: .*{path.name}"):
            export(tmp_path / "damaged", tmp_path / "exported")
        assert not (tmp_path / "exported").exists()
        if content == bytes(whole):
            run = start(tmp_path / "damaged", sample, tmp_path / "out.json", "--steps 12")
            assert run.returncode != 0 and path.name in run.output
            assert not (tmp_path / "out.json").exists()
    (checkpoint / ".metadata").write_bytes(b"cut")
    with pytest.raises(LionError, match=r"iter_0000012/\.metadata cannot be read"):
        export(tmp_path / "damaged", tmp_path / "exported")


def test_wrong_input_is_named_and_nothing_is_overwritten(saved: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for more, message in (
        (["--output", str(tmp_path / "there")], "there exists"),
        (["--output", str(tmp_path / "x"), "--step", "7"], "--steps 7 is not in"),
        (["--output", str(tmp_path / "x"), "--step", "all"], "names several"),
        (["--output", str(tmp_path / "x"), "--tokenizer-type", "SentencePieceTokenizer"], "needs --tokenizer-model"),
        (["--output", str(tmp_path / "x"), "--checkpoints", str(text)], "has no complete torch_dist checkpoint"),
    ):
        with pytest.raises(LionError, match=message):
            export_hf.main(["--checkpoints", str(saved), *more])
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_window_that_the_model_cannot_hold_is_refused() -> None:
    args = Namespace(position_embedding_type="learned_absolute", max_position_embeddings=32, seq_length=16)
    assert eval_wikitext103.window_length(None, args) == 32
    with pytest.raises(LionError, match="--window 33: this model holds 1 to 32 tokens"):
        eval_wikitext103.window_length(33, args)


def test_the_tokenizer_is_wholly_the_command_lines_or_wholly_the_checkpoints() -> None:
    from evaluation.scoring import chosen_tokenizer

    saved = Namespace(tokenizer_type="GPT2BPETokenizer", tokenizer_model=None, vocab_file="v.json", merge_file="m.txt")
    nothing = dict.fromkeys(vars(saved))
    assert chosen_tokenizer(Namespace(**nothing), saved) == vars(saved)
    given = nothing | {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "t.model"}
    assert chosen_tokenizer(Namespace(**given), saved) == given


def test_results_of_other_settings_are_not_gone_on_with(tmp_path: Path) -> None:
    output, print_6 = tmp_path / "out.json", {"6": "a"}
    assert eval_wikitext103.finished(output, {"window": 32}, print_6) == {}
    results = {"6": {"nll": 1.0, "checkpoint": "a"}}
    output.write_text(json.dumps({"settings": {"window": 32}, "results": results}))
    assert eval_wikitext103.finished(output, {"window": 32}, {**print_6, "12": "b"}) == results
    with pytest.raises(LionError, match="was made with another window"):
        eval_wikitext103.finished(output, {"window": 16}, print_6)
    with pytest.raises(LionError, match="was made with another bf16"):
        eval_wikitext103.finished(output, {"window": 32, "bf16": "True"}, print_6)
    with pytest.raises(LionError, match="from another checkpoint of iteration 6 than the one that is there now"):
        eval_wikitext103.finished(output, {"window": 32}, {"6": "c"})
    output.write_text("[]")
    with pytest.raises(LionError, match="was not written by this tool"):
        eval_wikitext103.finished(output, {"window": 32}, print_6)


def test_a_fingerprint_changes_with_the_content(saved: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    shutil.copytree(checkpoints.iteration_folder(saved, 6), one)  # with the times of change
    assert checkpoints.fingerprint(one) == checkpoints.fingerprint(checkpoints.iteration_folder(saved, 6))
    shutil.copytree(one, other)
    shard = next(other.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes())  # as a run that is trained again leaves it: the same size
    assert checkpoints.fingerprint(one) != checkpoints.fingerprint(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [("another run", "another checkpoints"), ("--bf16", "another bf16"), ("trained again", "another checkpoint of")],
)
def test_another_checkpoint_or_precision_is_not_given_these_results(
    saved: Path, sample: Path, at_dp2: tuple[Path, Run], tmp_path: Path, change: str, message: str
) -> None:
    output, folder = tmp_path / "out.json", saved
    shutil.copyfile(at_dp2[0], output)
    if not change.startswith("--"):
        folder = tmp_path / "copy"
        shutil.copytree(saved, folder)
    if change == "trained again":  # in the same folder
        content = json.loads(output.read_text())
        content["settings"]["checkpoints"] = str(folder)
        output.write_text(json.dumps(content))
        (folder / "iter_0000012" / "metadata.json").touch()
    run = start(folder, sample, output, change if change.startswith("--") else "")
    assert run.returncode != 0
    assert f"was made {'from' if change == 'trained again' else 'with'} {message}" in run.output


# Each makes another function of the same weights.
FUNCTIONS = {
    "muP": "--use-mup --mup-base-hidden-size 8 --mup-embedding-mult 4",
    "YaRN": "--position-embedding-type yarn --rotary-scaling-factor 4 --yarn-original-max-position-embeddings 8",
    "router groups": "--num-experts 4 --moe-router-topk 2 --moe-router-num-groups 2 --moe-router-group-topk 1 "
    "--disable-bias-linear",
    "one more in the softmax": "--softmax-type off-by-one",
    "rope by a part": "--position-embedding-type rope --rotary-percent 0.5 --rotary-base 100",
}


@pytest.mark.parametrize(
    "name", [name if name == "muP" else pytest.param(name, marks=pytest.mark.slow) for name in FUNCTIONS]
)
def test_the_function_is_the_checkpoints_whatever_the_command_line_leaves_out(
    text: Path, sample: Path, tmp_path: Path, name: str
) -> None:
    """The run's own flags give its loss. muP: --mup-embedding-mult 1 is another function, and refused."""
    pretrain(text, f"{MODEL} {HORIZON} --train-iters 2 --save {tmp_path}/saved --save-interval 2 {FUNCTIONS[name]}")
    for flags in ("", FUNCTIONS[name]):
        evaluate(tmp_path / "saved", sample, tmp_path / f"out{bool(flags)}.json", flags)
    assert results(tmp_path / "outFalse.json")["2"]["nll"] == results(tmp_path / "outTrue.json")["2"]["nll"]
    with pytest.raises(LionError, match="GPT2LMHeadModel cannot express this model"):
        export(tmp_path / "saved", tmp_path / "exported")
    if name == "muP":
        run = start(tmp_path / "saved", sample, tmp_path / "x.json", "--mup-embedding-mult 2")
        assert run.returncode != 0
        assert "--mup-embedding-mult 2.0: the checkpoint's model has 4.0. Remove the flag" in run.output
