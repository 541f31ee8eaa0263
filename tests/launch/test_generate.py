"""launch/generate.py: prompts from files, text as it grows, several processes, statistics."""

import json
import re

import pytest

from launch import generate
from launch.generate import TextStream
from launch.tokenizer import ByteTokenizer
from tests.launch.weights import CONFIGS, TEXTS, TOKENIZERS, checkpoint_of

pytestmark = pytest.mark.usefixtures("one_process")
PROMPTS = ["def f", "", "line\ntwo", "caf\u00e9 " * 9]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A checkpoint of every kind of model."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {kind: checkpoint_of(folder / kind, config) for kind, config in CONFIGS.items()}


@pytest.fixture
def run(checkpoints, capsys):
    """stdout and stderr of a command line that succeeds."""

    def call(*arguments, kind="linear"):
        common = ["--checkpoint", str(checkpoints[kind]), "--max_new_tokens", "12"]
        assert generate.main([*common, *arguments]) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    return call


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("size", [1, 3, 16])
def test_many_prompts_continue_as_each_alone(kind, size, run, tmp_path):
    lines = [json.dumps({"prompt": text, "id": 1}) for text in PROMPTS]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    greedy = ["--temperature", "0"]
    together, _ = run("--prompts", str(path), "--batch_size", str(size), *greedy, kind=kind)
    found = [json.loads(line) for line in together.splitlines()]
    assert [each["prompt"] for each in found] == PROMPTS
    for each in found:
        alone, _ = run("--prompt", each["prompt"], *greedy, kind=kind)
        assert alone == each["text"] + "\n"
        assert each["text"].startswith(each["prompt"]) and each["text"] != each["prompt"]


def test_a_file_with_one_line_is_printed_as_a_line_of_json(run, tmp_path):
    path = tmp_path / "prompts.JSONL"
    path.write_text('{"prompt": "x"}', encoding="utf-8")
    out, _ = run("--prompts", str(path), "--temperature", "0")
    alone, _ = run("--prompt", "x", "--temperature", "0")
    assert json.loads(out) == {"prompt": "x", "text": alone.removesuffix("\n")}


def test_samples_of_one_prompt_differ_over_batches(run, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n' * 6, encoding="utf-8")
    argv = ["--prompts", str(path), "--batch_size", "2", "--temperature", "2"]
    lines = run(*argv)[0].splitlines()
    assert len(set(lines)) == 6
    assert run(*argv)[0].splitlines() == lines


def test_a_text_file_is_one_prompt(run, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("several\nlines\n", encoding="utf-8")
    assert run("--prompts", str(path)) == run("--prompt", "several\nlines\n")


def test_top_p_leaves_the_most_likely_token(run):
    greedy = run("--prompt", "x", "--temperature", "0")
    assert run("--prompt", "x", "--top_p", "1e-6") == greedy
    assert run("--prompt", "x", "--top_p", "1.0", "--temperature", "5") != greedy


def test_statistics_name_times_and_tokens(run):
    out, error = run("--prompt", "def ", "--stats", "--temperature", "0")
    assert out == run("--prompt", "def ", "--temperature", "0")[0]
    pattern = (
        r"model loaded in \d+\.\d s; 4 tokens of prompts, first token after \d+\.\d\d s; "
        r"then (\d+) tokens at [\d,]+ tokens/s \(\d+\.\d\d ms per step\)\n"
    )
    assert 0 < int(re.fullmatch(pattern, error)[1]) <= 11
    assert run("--prompt", "def ", "--stats", "--max_new_tokens", "0")[0] == "def \n"


def test_lower_precision_and_chunks(run):
    whole = run("--prompt", "a" * 50, "--temperature", "0")
    assert run("--prompt", "a" * 50, "--temperature", "0", "--prefill_chunk", "7") == whole
    out, _ = run("--prompt", "a" * 50, "--temperature", "0", "--dtype", "bfloat16")
    assert out.startswith("a" * 50)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("not json", "line 1: not a JSON object with a string"),
        ('{"text": "x"}', "line 1: not a JSON object"),
        ('{"prompt": "x"}\n{"prompt": 3}', "line 2: not a JSON object"),
        ('{"prompt": "\\ud800"}', "line 1: prompt '\\ud800' is not UTF-8"),
        ("\n\n", "has no line"),
        (b"\xff\xfe", "cannot be read as UTF-8 text"),
        (None, "cannot be read"),
    ],
)
def test_bad_files_of_prompts_are_sentences(lines, sentence, checkpoints, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    if lines is not None:
        path.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    argv = ["--checkpoint", str(checkpoints["linear"]), "--prompts", str(path)]
    assert generate.main(argv) != 0
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--top_p", "0"], "top_p is 0.0"),
        (["--top_p", "1.1"], "top_p is 1.1"),
        (["--batch_size", "0"], "batch_size is 0"),
        (["--prefill_chunk", "-1"], "prefill_chunk is -1"),
        (["--tensor_parallel_degree", "0"], "tensor_parallel_degree is 0"),
        (["--tensor_parallel_degree", "2"], "which does not divide 1 processes"),
    ],
)
def test_bad_options_are_sentences(argv, sentence, checkpoints, capsys):
    assert generate.main(["--checkpoint", str(checkpoints["linear"]), *argv]) == 73
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_text_that_grows_is_the_text_of_all_tokens(name, text):
    tokenizer = TOKENIZERS[name]()
    tokens = tokenizer.encode(text * 3).tolist()
    stream, parts = TextStream(tokenizer, []), []
    for token in tokens:
        parts.append(stream.add(token))
    assert "".join(parts) + stream.finish() == tokenizer.decode(tokens)


def test_a_character_is_printed_once_it_is_complete():
    stream = TextStream(ByteTokenizer(), [65])
    assert [stream.add(byte) for byte in "\u20ac!".encode()] == ["", "", "\u20ac", "!"]
    # Bytes that are no character are shown as such with what follows, or at the end.
    assert [stream.add(0xFF), stream.add(65)] == ["", "\ufffdA"]
    assert stream.add(0xE2) == "" and stream.finish() == "\ufffd"
