"""The simulation of benchmarks/cost_model.py: fitted to the measurements, checked, projected.

    python benchmarks/projection.py

What is measured and goes in as it is: the local work of a call (rows without a group) and of a step
(one GPU), and the exchange alone on 2, 4 and 8 GPUs. What is fitted: `Calibration`. What is
predicted: more than 8 ranks. The network between hosts is assumed.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cost_model
import numpy as np
from cost_model import AttentionWork, Exchange, ExchangeCost, Link, Network, StepWork

RESULTS = Path(__file__).parent / "results"
NO_GROUP = "lasp, no group"
# Rows of a report over ranks: name -> method and layout.
CALLS = {
    "lasp ring": ("ring, memory", "contiguous"),
    "lasp ring, messages": ("ring, messages", "contiguous"),
    "lasp all_gather": ("all_gather", "contiguous"),
    "lasp doubling": ("doubling", "contiguous"),
    "lasp ring, zigzag": ("ring, memory", "zigzag"),
    "lasp all_gather, zigzag": ("all_gather", "zigzag"),
    "lasp doubling, zigzag": ("doubling", "zigzag"),
}
# TNL-1B, as benchmarks/training.py trains it: 16 layers of 2,048, GLU of 5,632, 64,000 tokens.
LAYERS, DIM, GLU_DIM, VOCABULARY = 16, 2048, 5632, 64000
BLOCK = 5 * DIM**2 + 3 * DIM * GLU_DIM
STATE_BYTES = 16 * 128 * 128 * 4
# dq hides the ring in memory from this number of tokens on: `_LONG_SCAN` of lasp/functional.py,
# at 16 heads of 128. Rounds of doubling start after dq, and NCCL's kernels compete with it: what
# these methods take is added to dq's time in all measured rows.
HIDES_FROM = 2**25 // (16 * 128)


@dataclass(frozen=True)
class Row:
    """A measured time and what the simulation says, in seconds.

    Attributes:
        tokens: per rank; of an exchange alone, bytes of the state.
    """

    name: str
    ranks: int
    tokens: int
    kind: str
    measured: float
    simulated: float

    @property
    def error(self) -> float:
        return self.simulated / self.measured - 1


@dataclass(frozen=True)
class Calibration:
    """Fitted seconds of a call over ranks beyond local work and exchange.

    Attributes:
        per_token: {kind: seconds}, kind "forward" or "backward", of all methods: the state of the
            last segment, which a call without a group leaves out.
        own: {(method, layout): {kind: constant}}; of doubling, per round.
    """

    per_token: dict[str, float]
    own: dict[tuple[str, str], dict[str, float]]

    def extra(self, kind: str, key: tuple[str, str], size: int, tokens: float) -> float:
        own = self.own.get(key, {}).get(kind, 0.0) * times_own(key, size)
        return self.per_token[kind] * tokens + own


def times_own(key: tuple[str, str], size: int) -> int:
    """How often a call has the constant of its method: doubling composes states in every round."""
    method, layout = key
    return cost_model.steps_and_bytes(method, size, 0, layout)[0] if method == "doubling" else 1


ZERO = Calibration({"forward": 0.0, "backward": 0.0}, {})


def reports() -> list[dict]:
    paths = sorted(RESULTS.glob("sequence_parallel_*.json"))
    return [json.loads(path.read_text()) for path in paths]


def measured_exchange(report: dict, method: str, layout: str, state_bytes: int) -> float:
    """Seconds of the exchange alone."""
    wanted = (method, layout, state_bytes)
    (row,) = (r for r in report["exchanges"] if (r["method"], r["layout"], r["bytes"]) == wanted)
    return row["ms"] / 1e3


def exchange_costs(many: Sequence[dict]) -> dict[str, ExchangeCost]:
    """`ExchangeCost` by method, fitted to the contiguous exchanges of all reports together."""
    costs = {}
    for method in cost_model.METHODS:
        rows = [
            (report["ranks"], row["bytes"], row["ms"] / 1e3)
            for report in many
            for row in report["exchanges"]
            if (row["method"], row["layout"]) == (method, "contiguous")
        ]
        # The simulation is linear in the three durations: one exchange with each alone.
        units = (ExchangeCost(1, 0, 0), ExchangeCost(0, 1, 0), ExchangeCost(0, 0, 1))
        table = [
            [Exchange(method, size, data, {method: unit}).seconds() for unit in units]
            for size, data, _ in rows
        ]
        times = np.array([time for *_, time in rows])
        if method == "doubling":
            # Its first round is cheaper than the others: `start` may be below zero.
            table = [[1.0, *row[1:]] for row in table]
        start, step, per_byte = _least_squares(np.array(table), times, method != "doubling")
        costs[method] = ExchangeCost(start, step, per_byte)
    return costs


def _least_squares(table: np.ndarray, times: np.ndarray, positive: bool) -> list[float]:
    """Least relative errors; columns that would be negative are left out if `positive`."""
    scaled = table / times[:, None]
    used = list(range(table.shape[1]))
    while True:
        found = np.linalg.lstsq(scaled[:, used], np.ones(len(times)), rcond=None)[0]
        if not positive or found.min() >= 0:
            break
        del used[int(found.argmin())]
    result = [0.0] * table.shape[1]
    for i, value in zip(used, found, strict=True):
        result[i] = float(value)
    return result


def local_work(many: Sequence[dict], tokens: float) -> tuple[float, float]:
    """Seconds of a forward, and with its backward, without a group: means over the reports,
    straight lines between measured lengths and beyond the longest."""
    found: dict[int, list[tuple[float, float]]] = {}
    for report in many:
        for row in report["rows"]:
            if row["name"] == NO_GROUP:
                times = (row["forward_ms"] / 1e3, row["both_ms"] / 1e3)
                found.setdefault(row["tokens"], []).append(times)
    lengths = sorted(found)
    means = [[statistics.mean(t[i] for t in found[n]) for n in lengths] for i in range(2)]
    return _line(tokens, lengths, means[0]), _line(tokens, lengths, means[1])


def _line(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Piecewise linear, with the last two points beyond the last and the first two before."""
    i = min(max(int(np.searchsorted(xs, x)), 1), len(xs) - 1)
    slope = (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1])
    return float(ys[i - 1] + slope * (x - xs[i - 1]))


def with_extra(
    work: AttentionWork, calibration: Calibration, key: tuple[str, str], size: int, tokens: float
) -> AttentionWork:
    """What a call over ranks computes."""
    forward, backward = (calibration.extra(k, key, size, tokens) for k in ("forward", "backward"))
    return replace(work, scan=work.scan + forward, dkdv=work.dkdv + backward)


def exchange_rows(many: Sequence[dict], costs: dict[str, ExchangeCost]) -> list[Row]:
    """The exchanges alone that `costs` were fitted to, beside what they say."""
    rows = []
    for report in many:
        for row in report["exchanges"]:
            method = row["method"]
            if method in costs and row["layout"] == "contiguous":
                exchange = Exchange(method, report["ranks"], row["bytes"], costs)
                common = (method, report["ranks"], row["bytes"], "exchange")
                rows.append(Row(*common, row["ms"] / 1e3, exchange.seconds()))
    return rows


def call_rows(
    many: Sequence[dict],
    costs: dict[str, ExchangeCost],
    calibration: Calibration,
    alone_measured: bool = True,
) -> list[Row]:
    """All measured calls beside the simulation; "both" is forward and backward.

    Args:
        alone_measured: take the exchange alone as measured on as many ranks; else as `costs` say.
    """
    rows = []
    for report in many:
        times = {(r["name"], r["tokens"]): r for r in report["rows"]}
        for (name, tokens), row in times.items():
            if name not in CALLS or name in report.get("outdated", ()):
                continue
            local = times[NO_GROUP, tokens]
            work = cost_model.attention_work(local["forward_ms"] / 1e3, local["both_ms"] / 1e3)
            method, layout = key = CALLS[name]
            exchange = Exchange(method, report["ranks"], STATE_BYTES, costs, layout=layout)
            if alone_measured:
                alone = measured_exchange(report, method, layout, STATE_BYTES)
                exchange = exchange.measured_to_take(alone)
            hides = method == "ring, memory" and tokens >= HIDES_FROM
            work = with_extra(work, calibration, key, report["ranks"], tokens)
            forward, both = cost_model.call(work, exchange, hides)
            common = (name, report["ranks"], tokens)
            rows.append(Row(*common, "forward", row["forward_ms"] / 1e3, forward))
            rows.append(Row(*common, "both", row["both_ms"] / 1e3, both))
    return rows


def calibrate(
    many: Sequence[dict], costs: dict[str, ExchangeCost], exclude: Iterable[Row] = ()
) -> Calibration:
    """The `Calibration` of least relative errors over all rows but `exclude`."""
    excluded = {(r.name, r.ranks, r.tokens, r.kind) for r in exclude}
    rows = [
        r
        for r in call_rows(many, costs, ZERO)
        if (r.name, r.ranks, r.tokens, r.kind) not in excluded
    ]
    kinds = ("forward", "backward")
    keys = [(key, kind) for key in CALLS.values() for kind in kinds]
    table = np.zeros((len(rows), len(kinds) + len(keys)))
    for line, row in zip(table, rows, strict=True):
        key = CALLS[row.name]
        for i, kind in enumerate(kinds[:1] if row.kind == "forward" else kinds):
            line[i] = row.tokens
            line[len(kinds) + keys.index((key, kind))] = times_own(key, row.ranks)
    measured = np.array([row.measured for row in rows])
    missing = measured - np.array([row.simulated for row in rows])
    found = np.linalg.lstsq(table / measured[:, None], missing / measured, rcond=None)[0].tolist()
    own: dict[tuple[str, str], dict[str, float]] = {}
    for (key, kind), value in zip(keys, found[len(kinds) :], strict=True):
        own.setdefault(key, {})[kind] = value
    return Calibration(dict(zip(kinds, found, strict=False)), own)


def step_work(
    many: Sequence[dict], training: dict, calibration: Calibration, key: tuple[str, str], size: int
) -> Callable[[float], StepWork]:
    """The work of a step of TNL-1B by tokens per rank, all blocks recomputed."""
    # One sequence per step on one GPU; below the shortest the line through the two shortest.
    single = {
        row["seq_len"]: row["step_seconds"]
        for row in training["rows"]
        if row["gpus"] == 1 and row["name"] in ("full", "one GPU, full")
        if row["model"] == "TNL 1b" and row["tokens_per_step"] == row["seq_len"]
    }
    lengths = sorted(single)
    times = [single[n] for n in lengths]
    # What a step of no tokens would take.
    fixed = max(_line(0, lengths, times), 0.0)
    head_parts, block_parts = 3 * VOCABULARY * DIM, 4 * LAYERS * BLOCK

    def of(tokens: float) -> StepWork:
        compute = _line(tokens, lengths, times) - fixed
        head = compute * head_parts / (head_parts + block_parts)
        forward, both = local_work(many, tokens)
        # Of a layer: two forwards, one of them recomputed, and a backward of twice the time.
        rest = (compute - head) / LAYERS - forward - both
        before = rest / 4 * 4 * DIM**2 / BLOCK
        attention = cost_model.attention_work(forward, both)
        if size > 1:
            attention = with_extra(attention, calibration, key, size, tokens)
        return StepWork(
            layers=LAYERS,
            attention=attention,
            before=before,
            after=rest / 4 - before,
            head=head,
            fixed=fixed,
            weight_bytes=2 * BLOCK,
            grad_bytes=4 * BLOCK,
        )

    return of


def near_link(many: Sequence[dict]) -> Link:
    """NCCL's collectives inside a host, by its all-gather over the most ranks measured."""
    report = max(many, key=lambda report: report["ranks"])
    rows = [r for r in report["exchanges"] if r["method"] == "nccl all-gather"]
    others = report["ranks"] - 1
    return cost_model.fit([(1, others * r["bytes"], r["ms"] / 1e3) for r in rows])


@dataclass(frozen=True)
class Simulator:
    """All that is measured or fitted, to simulate training steps of TNL-1B.

    Attributes:
        slowdown: time of a step on several GPUs over its simulation, fitted; 1 on one GPU.
    """

    many: Sequence[dict]
    training: dict
    costs: dict[str, ExchangeCost]
    calibration: Calibration
    near: Link
    slowdown: float = 1.0

    @classmethod
    def fitted(cls, many: Sequence[dict], training: dict) -> Simulator:
        costs = exchange_costs(many)
        calibration = calibrate(many, costs)
        simulator = cls(many, training, costs, calibration, near_link(many))
        ratios = [row.measured / row.simulated for row in simulator.training_rows()]
        return replace(simulator, slowdown=statistics.median(ratios))

    def local_seconds(self, tokens: int) -> float:
        """Of a step on one GPU."""
        key = CALLS["lasp ring"]
        return step_work(self.many, self.training, self.calibration, key, 1)(tokens).local_seconds()

    def step_seconds(
        self,
        method: str,
        size: int,
        tokens: int,
        engine: str,
        network: Network | None = None,
        sequences: int = 1,
    ) -> float:
        """Of a step on `size` ranks with `tokens` each, times `sequences`."""
        in_memory = method in ("ring, memory", cost_model.TWO_LEVEL)
        key = ("ring, memory" if in_memory else method, "contiguous")
        work = step_work(self.many, self.training, self.calibration, key, size)(tokens)
        exchange = Exchange(method, size, STATE_BYTES, self.costs, network)
        hides = in_memory and tokens >= HIDES_FROM
        return self.slowdown * cost_model.step(
            work, exchange, engine, self.near, hides=hides, sequences=sequences
        )

    def efficiency(
        self, method: str, size: int, tokens: int, engine: str, network: Network | None
    ) -> float:
        """Speed per GPU relative to one GPU with as many tokens."""
        return self.local_seconds(tokens) / self.step_seconds(method, size, tokens, engine, network)

    def training_rows(self) -> list[Row]:
        """The measured steps over several ranks beside the simulation; those with tensor
        parallelism or segments are not simulated."""
        rows = []
        for row in self.training["rows"]:
            mesh = row.get("mesh") or {}
            if row["suite"] == "segments" or mesh.get("cp", 1) == 1 or mesh["tp"] > 1:
                continue
            size, tokens = mesh["cp"], row["seq_len"] // mesh["cp"]
            sequences = row["gpus"] // size
            seconds = self.step_seconds("ring, memory", size, tokens, "fsdp", sequences=sequences)
            common = (row["name"], row["gpus"], tokens, "step")
            rows.append(Row(*common, row["step_seconds"], seconds))
        return rows

    def left_out(self, training: bool) -> list[Row]:
        """The rows of each number of GPUs, simulated by what fits the others."""
        if training:
            found = []
            for size in sorted({row.ranks for row in self.training_rows()}):
                # Divided by this simulator's own slowdown, which saw all rows.
                others = [r for r in self.training_rows() if r.ranks != size]
                factor = statistics.median(r.measured / r.simulated for r in others)
                mine = [r for r in self.training_rows() if r.ranks == size]
                found += [replace(r, simulated=factor * r.simulated) for r in mine]
            return found
        found, rows = [], call_rows(self.many, self.costs, ZERO)
        for report in self.many:
            exclude = [r for r in rows if r.ranks == report["ranks"]]
            calibration = calibrate(self.many, self.costs, exclude)
            found += call_rows([report], self.costs, calibration)
        return found


def ring_limit(simulator: Simulator, ring: str = "ring, messages") -> int:
    """The largest power of two up to which the ring over hosts, contiguous, is faster than
    all_gather and doubling in all of: DDP and FSDP, both networks, 32,768 and 262,144 tokens per
    rank."""
    best, size = 8, 16
    while size <= 4096:
        for network in (cost_model.INFINIBAND, cost_model.ETHERNET):
            for engine in ("ddp", "fsdp"):
                for tokens in (32768, 262144):
                    times = {
                        method: simulator.step_seconds(method, size, tokens, engine, network)
                        for method in (ring, "all_gather", "doubling")
                    }
                    if min(times, key=times.get) != ring:
                        return best
        best, size = size, 2 * size
    return best


def gather_limit(simulator: Simulator, layout: str = "zigzag") -> int:
    """The largest power of two up to which all_gather brings a state of 1 MiB to the last rank
    sooner than doubling, over InfiniBand. In zigzag a rank waits for all others in every layer."""
    size = 8
    while size < 4096:
        gather, doubling = (
            Exchange(
                method, 2 * size, STATE_BYTES, simulator.costs, cost_model.INFINIBAND, layout
            ).seconds()
            for method in ("all_gather", "doubling")
        )
        if gather > doubling:
            break
        size *= 2
    return size


def load() -> Simulator:
    """Fitted to benchmarks/results."""
    return Simulator.fitted(reports(), json.loads((RESULTS / "training.json").read_text()))
