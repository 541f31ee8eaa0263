"""Where the ranks of a job meet: a store of their own, and a comparison of their settings.

    store, hosts = meet(rank, size, facts, problem=None, timeout_seconds=300)

Before any process group exists, every rank publishes its facts (settings, versions) in the store
that torchrun provides, rank 0 compares them, and all ranks raise the same error or none. If they
are on several hosts, these try whether they reach each other (launch/hosts.py).

torchrun keeps that store over restarts, with all keys of the processes before, among them the
addresses by which process groups connect. So the ranks of each start agree on a prefix: a rank
announces itself by a random word, rank 0 answers that word with the prefix of this start. A word of
a dead process gets an answer that no rank reads. (The number of restarts would not do as a prefix:
after a node was lost, torchrun's agents count differently.)
"""

import dataclasses
import json
import os
import platform
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import lasp
from launch.exit_codes import ConfigError, HungRankError, RemoteRankError, UserError
from launch.hosts import Host, Hosts, connect_hosts, list_ranks, unreachable
from launch.toml_config import flat

# Settings that may differ between ranks: where a host mounts a folder or file. What model.config
# and the data's folders hold, and their weights, is compared once they are open.
PATHS = ("data.folder", "data.folders", "job.config_file", "job.dump_folder", "model.config")
# Differences that a message lists.
_LISTED = 3
_POLL_SECONDS = 0.02


def settings(config: Any) -> dict[str, Any]:
    """What must be equal on all ranks of a config, a dataclass of sections, by name."""
    found = flat(dataclasses.asdict(config))
    return {name: value for name, value in found.items() if name not in PATHS}


def versions() -> dict[str, Any]:
    """The versions that must be equal on all ranks."""
    return {
        "the version of lasp": lasp.__version__,
        "the version of torch": torch.__version__,
        "the version of Python": platform.python_version(),
    }


def difference(of_ranks: Sequence[Mapping[str, Any]]) -> str | None:
    """What differs between the facts of the ranks, with the values and the ranks that have them;
    None if nothing does."""
    names = dict.fromkeys(name for facts in of_ranks for name in facts)
    different = []
    for name in names:
        ranks: dict[str, list[int]] = {}
        for rank, facts in enumerate(of_ranks):
            # As JSON: NaN equals itself, and a tuple that was sent the list that arrives.
            value = json.dumps(facts[name]) if name in facts else "absent"
            ranks.setdefault(value, []).append(rank)
        if len(ranks) > 1:
            seen = ", ".join(f"{value} on {list_ranks(of)}" for value, of in ranks.items())
            different.append(f"{name} is {seen}")
    if not different:
        return None
    more = len(different) - _LISTED
    return "; ".join(different[:_LISTED]) + (f"; and {more} more" if more > 0 else "")


def differs_error(text: str) -> ConfigError:
    """The error of ranks that differ in `text`, a `difference`."""
    return ConfigError(
        f"the ranks were started with different settings or data: {text}. Start all ranks with the "
        "same command, files and versions."
    )


def meet(
    rank: int,
    size: int,
    facts: Mapping[str, Any],
    *,
    problem: UserError | None = None,
    timeout_seconds: float,
) -> tuple[dist.Store, Hosts]:
    """The store of this start of the job, and its hosts. All ranks call this, also one that cannot
    run.

    Args:
        facts: what must be equal on all ranks, by name: values that JSON holds.
        problem: why this rank cannot run; then all ranks raise, this one its own error.

    Raises:
        ConfigError: ranks have different facts, or hosts cannot reach each other (RemoteRankError
            on all but rank 0); or the environment does not say where they meet.
        HungRankError: a rank does not come within `timeout_seconds`.
    """
    deadline = time.monotonic() + timeout_seconds
    limit = timedelta(seconds=timeout_seconds)
    try:
        root, _, _ = next(iter(dist.rendezvous("env://", timeout=limit)))
        root.set_timeout(limit)
        announced = dist.PrefixStore("lasp.start", root)
        word = secrets.token_hex(8)
        announced.set(f"word/{rank}", word)
        # All ranks on this host: it need not be reached.
        here = Host.here(is_alone=os.environ.get("LOCAL_WORLD_SIZE") == str(size))
        report = [facts, problem and [str(problem), problem.exit_code], dataclasses.astuple(here)]
        mine = json.dumps(report)
        if rank == 0:
            store = dist.PrefixStore(f"lasp.{word}", root)
            store.set("facts/0", mine)
            _gather_starts(announced, store, word, size, deadline)
            everyone = [json.loads(store.get(f"facts/{each}")) for each in range(size)]
            hosts = Hosts([Host(*host) for *_, host in everyone])
            store.set("hosts", hosts.to_json())
            verdict = _verdict(everyone, hosts)
            store.set("verdict", json.dumps(verdict))
        else:
            prefix = announced.get(f"prefix/{word}").decode()
            store = dist.PrefixStore(f"lasp.{prefix}", root)
            store.set(f"facts/{rank}", mine)
            verdict = json.loads(store.get("verdict"))
            hosts = Hosts.from_json(store.get("hosts"))
        if verdict is None and hosts.are_several:
            text = connect_hosts(store, rank, hosts, deadline)
            verdict = text and [None, text, ConfigError.exit_code]
        if rank != 0:
            store.set(f"read/{rank}", "")
    except ValueError as error:
        raise ConfigError(
            f"this is one of {size} processes, but {error}: start them with torchrun."
        ) from None
    except dist.DistError as error:
        raise HungRankError(
            f"rank {rank} on {socket.gethostname()} cannot meet the others within "
            f"{timeout_seconds:g} s (comm.init_timeout_seconds): {error}."
        ) from None
    if verdict is None:
        return store, hosts
    if rank == 0:
        # The store may end with this process.
        _wait_for([f"read/{each}" for each in range(1, size)], store, deadline)
    failed, message, code = verdict
    if problem is not None and failed == rank:
        raise problem
    if failed is None and rank == 0:
        raise ConfigError(message)
    raise RemoteRankError(message, code)


def _gather_starts(announced, store, prefix: str, size: int, deadline: float) -> None:
    """Answer the words of all ranks until each has published its facts below the prefix."""
    missing, answered = set(range(1, size)), set()
    while missing:
        for rank in sorted(missing):
            if announced.check([f"word/{rank}"]):
                word = announced.get(f"word/{rank}").decode()
                if word not in answered:
                    announced.set(f"prefix/{word}", prefix)
                    answered.add(word)
        missing = {rank for rank in missing if not store.check([f"facts/{rank}"])}
        if missing and time.monotonic() > deadline:
            raise HungRankError(
                f"{list_ranks(sorted(missing))} of {size} did not start in time "
                "(comm.init_timeout_seconds): see whether their processes and hosts run."
            )
        if missing:
            time.sleep(_POLL_SECONDS)


def _wait_for(keys: list[str], store, deadline: float) -> None:
    while not all(store.check([key]) for key in keys) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _verdict(everyone: list[Any], hosts: Hosts) -> list[Any] | None:
    """[the rank that refuses or None, the message, the exit code]; None: nothing is wrong."""
    for rank, (_, problem, _) in enumerate(everyone):
        if problem is not None:
            return [rank, *problem]
    text = difference([facts for facts, *_ in everyone])
    if text is not None:
        return [None, str(differs_error(text)), ConfigError.exit_code]
    if hosts.are_several:
        for number in range(len(hosts.hosts)):
            if (text := unreachable(hosts, number)) is not None:
                return [None, text, ConfigError.exit_code]
    return None
