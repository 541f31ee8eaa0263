"""Speed and memory over the length: lightning attention beside others, as the papers show it.

    python benchmarks/attention_speed.py                        # one GPU; half an hour
    python benchmarks/attention_speed.py --parts attention      # without models
    python benchmarks/attention_speed.py --lengths 64 128 --tokens 128 --model-tokens 128 \
        --heads 2 --head-size 16 --parts attention tiny         # on a CPU, to see it work

Forward and backward. Part "attention" is the operator alone, 16 heads of 128 (those of TNL-1b) in
bfloat16; "fla" is the same for kernels of fla-core, where it is installed, which tune themselves
for minutes. A preset of TNLConfig is the gradient of a model's loss with that attention: float32
weights, bfloat16 products, eager, without an optimizer.

Tokens: a call has `--tokens` of them (65,536), one of a model `--model-tokens` (131,072), as many
sequences as that makes, or one sequence where it is longer; so short lengths fill the GPU as long
ones do. (A model's call also casts every weight and adds to its gradient: with half the tokens,
short lengths of TNL-1b would be 1% slower for that alone.) Of models all blocks are recomputed, but
for quadratic attention and the cumulative sum, whose results are kept. "TNL, in segments" takes the
sequence 32,768 tokens at a time instead (`parallel.streaming`; the same passes over each token),
which only states of constant size allow, and one GPU needs for 1,048,576 tokens of TNL-1b.

A curve ends at the first length that does not fit in memory, or whose call is expected to take
longer than a limit, from the length before and the growth of its work. The row says which. Memory
is the most that tensors took, inputs and weights included.

Every row is written to the JSON file at once; another run measures what is missing there, and again
what was measured with other sequences in a call.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import attention_speed_report
import baselines
import resume
import torch
import versions
from attention_baselines import BASELINES, KEPT_OPERATORS
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import lasp
from lasp.tnl import TNL, TNLConfig
from lasp.tnl.model import TNLState
from parallel.activation_checkpoint import EXCHANGE_OPS
from parallel.loss import chunked_cross_entropy
from parallel.streaming import backward_in_segments

RESULTS = Path(__file__).parent / "results"
LENGTHS = tuple(2**n for n in range(10, 21))
PARTS = ("attention", "1b", "385m", "fla")
SEGMENT = 32768
# A larger relative error of o, dq, dk or dv is no rounding. In bfloat16 the gradients of 1 + elu,
# small differences of large sums, have 0.026, others 0.006 at most.
ERROR = 0.1
# Rounds of calls behind a time, and seconds of one round, of a call at least.
ROUNDS, ROUND_SECONDS = 3, 0.2
# A call that takes longer is measured once.
SLOW = 3.0
LASP = "lasp"


@dataclass(frozen=True)
class Attention:
    """An attention (q, k, v, log_decay) -> o.

    Attributes:
        quadratic: its work grows with the square of the length.
    """

    function: Callable
    quadratic: bool = False


@dataclass(frozen=True)
class Model:
    """A model of a preset.

    Attributes:
        overrides: fields of its config.
        attention: a name in `attentions`, in place of lightning attention; None: the model's own.
        segmented: the sequence is taken in segments.
    """

    overrides: tuple[tuple[str, Any], ...] = ()
    attention: str | None = None
    quadratic: bool = False
    segmented: bool = False


# Features that must be positive take no other activation and no LRPE.
_PLAIN = (("activation", "none"), ("lrpe_layers", ()))
MODELS = {
    "TNL": Model(),
    "softmax": Model((("layer_types", "S"), ("lrpe_layers", ())), quadratic=True),
    "Lightning Attention-1": Model(attention="Lightning Attention-1", quadratic=True),
    "TNL, in segments": Model(segmented=True),
    "1 + elu": Model(_PLAIN, "1 + elu"),
    "cumulative sum, by head": Model(attention="cumulative sum, by head"),
}


def attentions(device: torch.device) -> dict[str, Attention]:
    """Those of part "attention" that this machine can run, in the order of measurement."""
    found = {LASP: Attention(lasp.lightning_attention)}
    quadratic = ("softmax (SDPA)", "Lightning Attention-1")
    for name, function in BASELINES.items():
        if device.type == "cuda" or name != "Lightning Attention-1":
            found[name] = Attention(function, name in quadratic)
    return found


def fla_attentions(heads: int, size: int, device: torch.device) -> dict[str, Attention]:
    """Those of part "fla"."""
    if device.type != "cuda":
        return {}
    # Long enough to leave out the kernel for short calls.
    chunked = baselines.find((1, 2**20, heads, size, size))
    parallel = baselines.find_parallel()
    linear = {name: Attention(function) for name, function in chunked.items()}
    return linear | {name: Attention(each, quadratic=True) for name, each in parallel.items()}


def attention_case(
    function: Callable, arguments: argparse.Namespace, sequences: int, length: int
) -> Callable[[], object]:
    """Forward and backward of an attention."""
    heads, size = arguments.heads, arguments.head_size
    leaves, do, log_decay = _inputs(sequences, length, heads, size, arguments.device)

    def call():
        return torch.autograd.grad(function(*leaves, log_decay), leaves, do)

    return call


def _inputs(sequences, length, heads, size, device):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def normal(spread):
        x = torch.randn(
            sequences, length, heads, size, device=device, dtype=dtype, generator=generator
        )
        return x.mul_(spread)

    q, k, v, do = normal(0.25), normal(0.25), normal(1.0), normal(1.0)
    # A layer in the middle of a model.
    log_decay = lasp.decay.tnl(heads, 12, 24).to(device)
    return [x.requires_grad_() for x in (q, k, v)], do, log_decay


def worst_error(name: str, function: Callable, arguments: argparse.Namespace) -> float:
    """Largest relative error of o, dq, dk, dv over 300 tokens against float64: lasp's definition,
    or the baseline itself, which tests compare with its own."""
    sizes = arguments.heads, arguments.head_size
    leaves, do, log_decay = _inputs(1, 300, *sizes, arguments.device)
    exact = [x.detach().cpu().double().requires_grad_() for x in leaves]
    definition = BASELINES.get(name, lambda *x: lasp.reference.quadratic(*x)[0])
    if name == "Lightning Attention-1":
        definition = lambda *x: lasp.reference.quadratic(*x)[0]  # noqa: E731
    truth, o = definition(*exact, log_decay.cpu().double()), function(*leaves, log_decay)
    found = [o, *torch.autograd.grad(o, leaves, do)]
    wanted = [truth, *torch.autograd.grad(truth, exact, do.cpu().double())]
    return max(
        ((a.detach().cpu().double() - b.detach()).norm() / b.detach().norm()).item()
        for a, b in zip(found, wanted, strict=True)
    )


def model_case(
    model: TNL, kind: Model, arguments: argparse.Namespace, sequences: int, length: int
) -> Callable[[], object]:
    """The gradients of the model's loss, on random tokens."""
    device = arguments.device
    shape, vocab = (sequences, length), model.config.vocab_size
    generator = torch.Generator(device).manual_seed(0)
    tokens, labels = (
        torch.randint(vocab, shape, device=device, generator=generator) for _ in range(2)
    )
    scale = 1 / labels.numel()
    # Around each forward, as in training, so that its copies of weights end with it.
    autocast = functools.partial(
        torch.autocast, device.type, torch.bfloat16, enabled=arguments.autocast
    )

    def whole():
        with autocast():
            hidden = model(tokens, return_hidden=True)
            loss = chunked_cross_entropy(hidden, model.head_weight, labels)
        (loss * scale).backward()

    def run(index, states, *, states_only):
        part = slice(index * arguments.segment, (index + 1) * arguments.segment)
        past = None if states is None else TNLState(list(states), part.start)
        with autocast():
            if states_only:
                return None, model(tokens[:, part], states=past, states_only=True).layers
            hidden, after = model(
                tokens[:, part], states=past, return_states=True, return_hidden=True
            )
            return chunked_cross_entropy(hidden, model.head_weight, labels[:, part]), after.layers

    def call():
        # Of the last call; a backward adds to them.
        model.zero_grad(set_to_none=True)
        if kind.segmented:
            backward_in_segments(run, -(-length // arguments.segment), loss_scale=scale)
        else:
            whole()

    return call


@contextlib.contextmanager
def attending_by(function: Callable | None) -> Iterator[None]:
    """Linear layers of a model attend by this function inside; None: as they are."""
    if function is None:
        yield
        return

    def attention(q, k, v, log_decay, **options):
        for name in ("initial_state", "output_final_state", "cu_seqlens", "group"):
            assert not options.get(name), f"no baseline has {name}"
        return function(q, k, v, log_decay)

    with mock.patch.object(lasp, "lightning_attention", attention):
        yield


def build(preset: str, kind: Model, device: torch.device) -> TNL:
    """The model; unless it takes segments, each block is recomputed in the backward."""
    with torch.device("meta"):
        model = TNL(TNLConfig.preset(preset, **dict(kind.overrides)))
    model.to_empty(device=device)
    model.init_weights()
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_attention)
    if not kind.segmented:
        for block in model.blocks:
            block.forward = functools.partial(
                checkpoint,
                block.forward,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=contexts,
            )
    return model


def _keep_attention(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    kept = op.name().split(".")[0] in (*EXCHANGE_OPS, *KEPT_OPERATORS)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds of a call, back to back."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - began) / calls


def measure(
    make: Callable[[], Callable[[], object]],
    expected: float | None,
    device: torch.device,
    *,
    may_fail: bool,
) -> dict[str, Any]:
    """The figures of a call: its time and its memory, or a note why there are none.

    Args:
        expected: seconds, from a shorter length whose kernels this process has compiled: a slow
            first call close to it is the measurement, not a warm-up. None: unknown.
        may_fail: an error of the call is a note too.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        call = make()
        # It compiles kernels, and takes its memory from the device.
        first = seconds_of(call, 1, device)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        if expected is not None and SLOW < first < 1.5 * expected:
            times = [first]
        else:
            times = [seconds_of(call, 1, device)]
            if times[0] < SLOW:
                calls = max(1, int(ROUND_SECONDS / times[0]))
                times = [seconds_of(call, calls, device) for _ in range(ROUNDS)]
    except Exception as error:
        # Triton has no class of its own for it.
        if "out of memory" in str(error):
            return {"note": "out of memory"}
        if not may_fail:
            raise
        # Raises if the device can run nothing more.
        synchronize(device)
        return {"note": f"{type(error).__name__}: {error}".splitlines()[0][:120]}
    return {"seconds": statistics.median(times), "memory_gib": peak}


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Run:
    """The rows of a run, in the report and on disk.

    Args:
        arguments: of the command line.
        began: `time.perf_counter()` at the start.
    """

    def __init__(self, arguments: argparse.Namespace, began: float) -> None:
        self.arguments, self.began = arguments, began
        self.report = _begin(arguments)

    def out_of_time(self) -> bool:
        return time.perf_counter() - self.began > self.arguments.seconds

    def curve(
        self,
        part: str,
        name: str,
        quadratic: bool,
        make: Callable[[int, int], Callable],
        lengths: Sequence[int] = (),
    ) -> None:
        """Measure what is missing of a curve, up to its end; `make` gets the sequences and the
        length of a case and returns its call."""
        rows = self.report["rows"]
        last: dict[str, Any] | None = None
        is_warm = False
        for length in lengths or self.arguments.lengths:
            key = (part, name, length)
            row = next((r for r in rows if (r["part"], r["name"], r["seq_len"]) == key), None)
            if row is None or self._is_outdated(row):
                if self.out_of_time():
                    return
                measured = self._row(part, name, quadratic, length, last, make, is_warm)
                is_warm = True
                if row is None:
                    rows.append(measured)
                else:
                    rows[rows.index(row)] = measured
                row = measured
                self.write()
                print(json.dumps(row), flush=True)
            if row.get("note"):
                return
            last = row

    def _is_outdated(self, row: dict[str, Any]) -> bool:
        """Whether this run would measure the row in another way: with other sequences, or under a
        limit that admits it."""
        sequences = attention_speed_report.sequences_of(row, self.report)
        return (
            row["sequences"] != sequences
            or row.get("expected_seconds", math.inf) <= self.arguments.limit
        )

    def _row(self, part, name, quadratic, length, last, make, is_warm):
        arguments = self.arguments
        row = {"part": part, "name": name, "seq_len": length}
        sequences = row["sequences"] = attention_speed_report.sequences_of(row, self.report)
        row["date"] = datetime.date.today().isoformat()
        expected = None
        if last is not None:
            grown = sequences * length / (last["sequences"] * last["seq_len"])
            expected = last["seconds"] * grown * (length / last["seq_len"] if quadratic else 1)
            if expected > arguments.limit:
                limit = f"limit {arguments.limit:g} s"
                note = f"over the time limit: about {expected:.0f} s, {limit}"
                return row | {"note": note, "expected_seconds": expected}
        case = functools.partial(make, sequences, length)
        # Of what others wrote, an error is their result.
        may_fail = name.startswith("fla ")
        # A row of an earlier process says how long a call takes, not that its kernels are compiled.
        known = expected if is_warm else None
        found = measure(case, known, arguments.device, may_fail=may_fail)
        release()
        if "seconds" in found:
            found["tokens_per_second"] = sequences * length / found["seconds"]
        return row | found

    def write(self) -> None:
        """Without tables and charts, which take a second."""
        attention_speed_report.write_json(self.report, self.arguments.out)


def _begin(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report of the folder, or one without rows."""
    head = {
        "device": torch.cuda.get_device_name() if arguments.device.type == "cuda" else "CPU",
        "versions": versions.installed("torch", "triton", "fla-core"),
        "tokens": arguments.tokens,
        "model_tokens": arguments.model_tokens,
        "segment": arguments.segment,
        "heads": arguments.heads,
        "head_size": arguments.head_size,
    }
    path = arguments.out / "attention_speed.json"
    if not arguments.again and path.exists():
        before = json.loads(path.read_text())
        others = resume.differing(before, head, head)
        if others:
            raise SystemExit(
                f"{path} is of a run with other {', '.join(others)}: give another --out, or "
                "--again to measure everything anew."
            )
        return before
    return head | {"errors": {}, "rows": []}


def attention_part(run: Run, found: dict[str, Attention]) -> None:
    """Attentions alone: correctness first."""
    arguments, errors = run.arguments, run.report["errors"]
    for name, attention in found.items():
        if not _wanted(name, arguments) or run.out_of_time():
            continue
        if name not in errors:
            errors[name] = worst_error(name, attention.function, arguments)
            print(f"{name}: relative error {errors[name]:.1e}", flush=True)
        if not errors[name] < ERROR:
            raise SystemExit(f"{name}: error {errors[name]} of o, dq, dk or dv is above {ERROR}")
        make = functools.partial(attention_case, attention.function, arguments)
        run.curve("attention", name, attention.quadratic, make)


def model_part(run: Run, preset: str) -> None:
    """Every model of a preset."""
    arguments = run.arguments
    known = attentions(arguments.device)
    for name, kind in MODELS.items():
        if not _wanted(name, arguments) or run.out_of_time():
            continue
        if kind.attention is not None and kind.attention not in known:
            continue
        function = None if kind.attention is None else known[kind.attention].function
        model = build(preset, kind, arguments.device)
        lengths = arguments.lengths
        if kind.segmented:
            # Of one segment nothing is computed twice.
            lengths = [each for each in lengths if each >= 2 * arguments.segment]
        make = functools.partial(model_case, model, kind, arguments)
        with attending_by(function):
            if lengths:
                run.curve(preset, name, kind.quadratic, make, lengths)
        del model, make
        release()


def _wanted(name: str, arguments: argparse.Namespace) -> bool:
    return arguments.only is None or name in arguments.only


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--parts", nargs="*", default=list(PARTS), help="attention, fla, presets of models")
    add("--only", nargs="*", help="names of rows; default: all")
    add("--lengths", nargs="*", type=int, default=list(LENGTHS), help="in rising order")
    add("--tokens", type=int, default=65536, help="of a call, where sequences are shorter")
    add("--model-tokens", type=int, default=131072, help="the same of a model's call")
    add("--segment", type=int, default=SEGMENT, help="tokens of a segment")
    add("--heads", type=int, default=16, help="of the part attention")
    add("--head-size", type=int, default=128, help="of the part attention")
    add("--limit", type=float, default=20, help="seconds of a call, above which a curve ends")
    add("--seconds", type=float, default=3600, help="start no case after this")
    add("--out", type=Path, default=RESULTS, help="folder for the results")
    add("--again", action="store_true", help="measure the rows that are there too")
    arguments = parser.parse_args()
    arguments.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments.autocast = arguments.device.type == "cuda"
    if arguments.lengths != sorted(set(arguments.lengths)) or min(arguments.lengths) < 1:
        parser.error(f"--lengths {arguments.lengths}: give positive numbers in rising order.")
    return arguments


def main() -> None:
    began, arguments = time.perf_counter(), parse_arguments()
    large = set(arguments.parts) - {"attention", "fla", "tiny"}
    if arguments.device.type == "cpu" and (large or max(arguments.lengths) > 4096):
        raise SystemExit(
            "This machine has no CUDA GPU: try --parts attention tiny --lengths 64 128 "
            "--tokens 128 --model-tokens 128 --heads 2 --head-size 16."
        )
    run = Run(arguments, began)
    for part in arguments.parts:
        if part == "attention":
            attention_part(run, attentions(arguments.device))
        elif part == "fla":
            sizes = arguments.heads, arguments.head_size
            found = fla_attentions(*sizes, arguments.device)
            # The linear form has many variants, the quadratic one few.
            if any(_wanted(name, arguments) and not each.quadratic for name, each in found.items()):
                baselines.compile_ahead([(1, 2**20, *sizes, sizes[1])], timeout_s=120)
            attention_part(run, found)
        else:
            model_part(run, part)
        print(f"{part}: done after {time.perf_counter() - began:.0f} s", flush=True)
    attention_speed_report.write(run.report, arguments.out)
    print(attention_speed_report.table(run.report), flush=True)


if __name__ == "__main__":
    main()
