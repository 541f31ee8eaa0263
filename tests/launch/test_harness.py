"""The adapter for lm-evaluation-harness: texts in batches are scored and continued as each by
itself."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F

from lasp.tnl import TNL, TNLConfig
from launch.build import get_family
from launch.evaluation import harness
from launch.evaluation.scoring import TextScorer
from launch.exit_codes import ConfigError
from launch.generate import load_model
from tests.launch.runs import as_one_process, run_here

VOCABULARY, END = 50, 49
NO_HARNESS = "needs lm-evaluation-harness: pip install -e '.[eval]'"


def make_model(layer_types="L", **fields):
    torch.manual_seed(0)
    shape = dict(vocab_size=VOCABULARY, dim=32, num_layers=2, num_heads=2, glu_dim=48)
    return TNL(TNLConfig(**shape, layer_types=layer_types, init_std=0.2, **fields)).eval()


def text(length, seed):
    return torch.randint(END, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def by_itself(model, context, continuation):
    """The score of one text, by one forward over all of it."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *continuation]]))[0, len(context) - 1 : -1]
    labels = torch.tensor(continuation, dtype=torch.int64)
    score = -F.cross_entropy(logits, labels, reduction="sum").item() if continuation else 0.0
    return score, bool((logits.argmax(1) == labels).all())


class Tokens:
    """Counts the tokens that a model reads."""

    def __init__(self, model):
        self.count = 0
        model.embedding.register_forward_hook(self.add)

    def add(self, module, inputs, output):
        self.count += inputs[0].numel()


@pytest.mark.parametrize("layer_types", ["L", "LS"])
@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 100), (3, 4), (8, 7)])
def test_scores_are_those_of_each_text_by_itself(layer_types, batch_size, chunk):
    model = make_model(layer_types)
    scorer = TextScorer(model, get_family("tnl"), batch_size=batch_size, chunk=chunk)
    contexts = [text(length, length) for length in (1, 9, 9, 2, 17)]
    contexts[2] = text(9, 100)
    requests = [(each, text(n, 7 + n)) for n in (1, 4, 11, 0) for each in contexts]
    # The most likely continuation of a context.
    with torch.no_grad():
        best = model(torch.tensor([contexts[1]]))[0, -1].argmax().item()
    requests.append((contexts[1], [best]))
    for found, request in zip(scorer.score(requests), requests, strict=True):
        score, is_greedy = by_itself(model, *request)
        assert found == (pytest.approx(score, rel=1e-5, abs=1e-5), is_greedy)
    assert scorer.score(requests[-1:])[0][1] is True


@pytest.mark.parametrize("fields", [{}, {"position_embeddings": 64}])
def test_a_batch_of_continuations_may_be_of_one_context(fields):
    model = make_model(**fields)
    scorer = TextScorer(model, get_family("tnl"), batch_size=2)
    contexts = [text(5, 1), text(2, 2)]
    # Sorted by length, the last of three is alone in its batch and follows the first context.
    requests = [(contexts[0], text(1, 3)), (contexts[0], text(4, 4)), (contexts[1], text(1, 5))]
    for (score, _), request in zip(scorer.score(requests), requests, strict=True):
        assert score == pytest.approx(by_itself(model, *request)[0], rel=1e-5)
    assert scorer.generate(contexts, 0, eos_token_id=END) == [[], []]


def test_a_context_is_read_once_for_all_of_its_continuations():
    model = make_model()
    read = Tokens(model)
    scorer = TextScorer(model, get_family("tnl"), batch_size=4)
    context = text(1000, 0)
    scorer.score([(context, text(3, seed)) for seed in range(10)])
    assert read.count == 999 + 10 * 3


@pytest.mark.parametrize("layer_types", ["L", "LS"])
def test_continuations_are_those_of_each_text_by_itself(layer_types):
    model = make_model(layer_types)
    scorer = TextScorer(model, get_family("tnl"), batch_size=2)
    contexts = [text(length, length) for length in (3, 12, 7)]
    found = scorer.generate(contexts, 6, eos_token_id=END)
    for tokens, context in zip(found, contexts, strict=True):
        alone = model.generate(torch.tensor([context]), 6)[0, len(context) :].tolist()
        assert tokens == alone
    # A token of one continuation as its end.
    end = found[1][2]
    assert scorer.generate(contexts[1:2], 6, eos_token_id=end) == [found[1][: found[1].index(end)]]


def test_a_missing_harness_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert harness.main() == 73
    assert "pip install -e '.[eval]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run")
    with as_one_process():
        assert run_here(folder, data, "--sample.no-enable") == 0
    return folder / "checkpoint"


DOCUMENTS = [
    {"context": "line 3 of document 2:", "choices": [" 6", " 9999"], "gold": 0},
    {"context": "line 4 of", "choices": ["\x00 q", " document"], "gold": 1},
]
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
doc_to_target: gold
metric_list: [{metric: acc}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}"
metric_list: [{metric: bits_per_byte}]
""",
    "continue": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
""",
}


@pytest.mark.parametrize(
    ("given", "options", "until"),
    [
        ({"until": "Q:"}, {"max_new_tokens": 256}, ["Q:"]),
        # Greedy, so that what concerns sampling has no effect.
        ({"temperature": 0.0, "top_p": 0.9, "max_tokens": 7}, {"max_new_tokens": 7}, []),
        (
            {"do_sample": True, "temperature": 0.5, "top_k": 3, "until": ["", "\n"]},
            {"max_new_tokens": 256, "temperature": 0.5, "top_k": 3, "top_p": None},
            ["\n"],
        ),
        (
            {"do_sample": True, "temperature": 0.5, "top_p": 0.9},
            {"max_new_tokens": 256, "temperature": 0.5, "top_k": None, "top_p": 0.9},
            [],
        ),
        ({"do_sample": True, "temperature": 0, "min_p": 0.1}, {"max_new_tokens": 256}, []),
        ({"do_sample": True, "temperature": 0.5, "min_p": 0.1}, "'min_p': sampling knows", None),
    ],
)
def test_generation_options_of_tasks(given, options, until):
    pytest.importorskip("lm_eval", reason=NO_HARNESS)
    from launch.evaluation.harness_model import _generate_options

    if until is None:
        with pytest.raises(ConfigError, match=options):
            _generate_options(given)
    else:
        assert _generate_options(given) == (options, until)


def test_the_harness_runs_local_tasks(checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason=NO_HARNESS)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from launch.evaluation import harness_model  # noqa: F401 (registers the model)

    documents = tmp_path / "documents.jsonl"
    documents.write_text("\n".join(map(json.dumps, DOCUMENTS)))
    for name, body in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        head += f"dataset_kwargs: {{data_files: {{test: {documents}}}}}"
        (tmp_path / f"{name}.yaml").write_text(head + body)
    found = simple_evaluate(
        model="lasp_tnl",
        model_args={"checkpoint": str(checkpoint), "chunk": 5},
        batch_size=2,
        # The harness's default.
        device="cuda:0",
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    model, _, tokenizer = load_model(checkpoint, torch.device("cpu"))

    def score(context, continuation):
        tokens = tokenizer.encode(context).tolist() if context else [tokenizer.eod_id]
        return by_itself(model, tokens, tokenizer.encode(continuation).tolist())[0]

    correct, nats, size = 0, 0.0, 0
    for each, logged in zip(DOCUMENTS, found["samples"]["choice"], strict=True):
        expected = [score(each["context"], choice) for choice in each["choices"]]
        values = [float(response[0]) for response in logged["filtered_resps"]]
        assert values == pytest.approx(expected, rel=1e-4)
        correct += expected[each["gold"]] == max(expected)
        nats -= score("", each["context"])
        size += len(each["context"])
    results = found["results"]
    assert results["choice"]["acc,none"] == correct / len(DOCUMENTS)
    assert results["rolling"]["bits_per_byte,none"] == pytest.approx(
        nats / size / torch.log(torch.tensor(2.0)).item(), rel=1e-4
    )
    for each, logged in zip(DOCUMENTS, found["samples"]["continue"], strict=True):
        tokens = tokenizer.encode(each["context"]).tolist()
        new = model.generate(torch.tensor([tokens]), 12)[0, len(tokens) :].tolist()
        assert logged["resps"][0][0] == tokenizer.decode(new).split("\n")[0]
