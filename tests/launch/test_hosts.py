"""The hosts of a job: names for messages, addresses, connections. Jobs over several hosts are in
tests/network."""

import contextlib
import math
import socket
import threading
import time
from unittest import mock

import pytest
import torch.distributed as dist

from lasp.exchange import shared_memory
from launch import dump_folder, hosts, train
from launch.config import load_config
from launch.distributed import get_rank_info
from launch.dump_folder import check_shared
from launch.hosts import Host, Hosts, connect_hosts, gloo_address, list_ranks, unreachable
from launch.resolve import describe_hosts
from parallel.mesh import ParallelDims
from tests.launch.runs import flags
from tests.launch.test_distributed import make_ctx

TWO = Hosts([Host("a", "1", "10.0.0.1")] * 2 + [Host("b", "2", "10.0.0.2")] * 2)


def test_ranks_are_named_with_their_host_if_there_are_several():
    assert Hosts([Host("a", "1")] * 4).rank(3) == "rank 3"
    assert TWO.rank(3) == "rank 3 on b"
    assert TWO.host(1) == "b (ranks 2 and 3)"
    assert list_ranks([0, 1, 3]) == "ranks 0, 1 and 3"
    assert list_ranks(range(8, 16)) == "ranks 8 to 15"


def test_hosts_of_one_name_are_told_apart():
    twins = Hosts([Host("node", "1", "10.0.0.1"), Host("node", "2", "10.0.0.2")])
    assert twins.are_several
    assert twins.rank(1) == "rank 1 on node (10.0.0.2)"


def test_hosts_survive_the_store():
    mixed = Hosts([Host("b", "2"), Host("a", "1"), Host("b", "2"), Host("a", "1")])
    copy = Hosts.from_json(mixed.to_json())
    assert [copy.rank(rank) for rank in range(4)] == [mixed.rank(rank) for rank in range(4)]
    assert copy.ranks_of(0) == [0, 2] and copy.num_ranks == 4


def test_another_host_name_is_another_host(monkeypatch):
    here = shared_memory.host_id()
    assert shared_memory.host_id() == here
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    assert shared_memory.host_id() != here


def resolve_to(monkeypatch, *addresses):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (each, 0)) for each in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


def test_a_name_of_no_use_to_other_hosts_is_a_problem(monkeypatch):
    # 192.0.2.1 is reserved for documentation: no host has it.
    resolve_to(monkeypatch, "192.0.2.1", "127.0.0.1")
    address, problem = gloo_address()
    assert address == "127.0.0.1"
    assert problem == (
        "its name 'here' resolves to the address 127.0.0.1, which is of use inside it only"
    )
    resolve_to(monkeypatch, "192.0.2.1")
    assert gloo_address() == (
        "",
        "its name 'here' resolves to 192.0.2.1, which is no address of it",
    )

    def fail(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert gloo_address()[1] == "it cannot resolve its own name 'here' (Name or service not known)"


def test_an_interface_is_looked_up(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    address, problem = gloo_address()
    assert address == "127.0.0.1" and problem.startswith("GLOO_SOCKET_IFNAME is lo, with the addre")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert gloo_address()[1].startswith("GLOO_SOCKET_IFNAME is ib0, but it has the interfaces lo")


def test_the_problem_of_a_host_becomes_a_sentence():
    both = Hosts([Host("a", "1"), Host("b", "2", problem="it cannot resolve its own name 'b'")])
    assert unreachable(both, 0) is None
    assert unreachable(both, 1).startswith(
        "other hosts cannot reach b (rank 1): it cannot resolve its own name 'b'. On that host, "
    )


def connect(of_ranks):
    """What `connect_hosts` returns on each rank: threads, which meet in one store."""
    store = dist.HashStore()
    found = [None] * of_ranks.num_ranks

    def run(rank):
        found[rank] = connect_hosts(store, rank, of_ranks, time.monotonic() + 60)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    return found


def loopback(number):
    return Host(f"host{number}", str(number), f"127.0.0.{number + 1}")


@pytest.mark.parametrize("number", [2, 3])
def test_hosts_that_reach_each_other_connect(number):
    each = [loopback(n) for n in range(number) for _ in range(2)]
    assert connect(Hosts(each)) == [None] * (2 * number)


def test_a_host_whose_address_is_unknown_is_not_tried():
    assert connect(Hosts([loopback(0), Host("b", "b")])) == [None, None]


def test_a_host_that_does_not_answer_is_named_on_all_ranks(monkeypatch):
    real = socket.create_connection

    def refuse(target, timeout):
        if target[0] == "127.0.0.2":
            raise ConnectionRefusedError(111, "Connection refused")
        return real(target, timeout)

    monkeypatch.setattr(socket, "create_connection", refuse)
    found = connect(Hosts([loopback(0), loopback(1), loopback(2)]))
    assert len(set(found)) == 1
    assert found[0].startswith(
        "host0 (rank 0) cannot connect to host1 (rank 1) at 127.0.0.2 (Connection refused). "
    )


def test_another_program_at_the_address_of_a_host_is_noticed(monkeypatch):
    monkeypatch.setattr(hosts, "_answer", lambda listening, token, limit: listening.accept()[0])
    found = connect(Hosts([loopback(0), loopback(1)]))
    assert "something else answers there" in found[0] and found[0] == found[1]


@pytest.mark.parametrize(
    ("degrees", "per_host", "crossed"),
    [
        (dict(dp_shard=8, cp=8), 8, dict(dp_shard=8, cp=1)),
        (dict(cp=16, tp=4), 8, dict(cp=8, tp=1)),
        (dict(dp_replicate=2, dp_shard=4, cp=2), 8, dict(dp_replicate=2, dp_shard=1, cp=1)),
        (dict(cp=4, tp=4), 2, dict(cp=4, tp=2)),
        # Groups of three on hosts of four: two of the four groups cross a border.
        (dict(dp_shard=4, cp=3), 4, dict(dp_shard=3, cp=2)),
    ],
)
def test_the_degrees_that_cross_hosts(degrees, per_host, crossed):
    size = math.prod(degrees.values())
    dims = ParallelDims.resolve(size, **{"dp_replicate": 1, "dp_shard": 1, **degrees})
    assert dims.hosts_of_groups(per_host) == crossed


def dry_run(capsys, *more, **changes):
    arguments = flags(data__source="random", job__dry_run=None, job__dry_run_gpus=8, **changes)
    code = train.main([*arguments, "--training.global_batch_size", "-1", *more])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_the_dry_run_says_what_crosses_hosts(capsys, one_process):
    layout = ["--parallelism.context_parallel_degree", "4", "--job.dry_run_gpus_per_host", "4"]
    code, output = dry_run(capsys, *layout)
    assert code == 0, output
    assert (
        "hosts:       2 of 4 ranks each; dp_replicate 2 crosses 2 hosts, cp 4 stays in one\n"
        in output
    )


def test_the_summary_warns_of_what_is_slow_between_hosts():
    def line(**changes):
        arguments = flags(job__dry_run=None, job__dry_run_gpus=12, **changes)
        return describe_hosts(get_rank_info(load_config(arguments)))

    tp = line(job__dry_run_gpus_per_host=4, parallelism__tensor_parallel_degree=6)
    assert "tp 6 crosses 2 hosts. Tensor parallelism sends" in tp
    assert tp.endswith("a parallelism.tensor_parallel_degree that divides 4, such as 2")
    cp = line(job__dry_run_gpus_per_host=4, parallelism__context_parallel_degree=3)
    assert "cp 3 crosses 2 hosts. Sequences, of cp 3 x tp 1 = 3 ranks each, do not start" in cp
    inside = line(job__dry_run_gpus_per_host=6, parallelism__context_parallel_degree=3)
    assert inside == "2 of 6 ranks each; dp_replicate 4 crosses 2 hosts, cp 3 stays in one"


@pytest.mark.parametrize("gpus", [0, 12])
def test_hosts_that_do_not_divide_the_gpus_are_refused(capsys, one_process, gpus):
    line = ["--job.dry_run", "--job.dry_run_gpus", str(gpus), "--job.dry_run_gpus_per_host", "8"]
    assert train.main(line) == 73
    said = f"job.dry_run_gpus_per_host is 8: job.dry_run_gpus, which is {gpus}, must be a multiple"
    assert said in capsys.readouterr().err


def check_shared_here(group, folder):
    ctx = make_ctx(group)
    ctx.hosts = TWO
    blind = mock.patch.object(dump_folder.os.path, "exists", return_value=False)
    with (
        mock.patch.object(dump_folder, "_VISIBLE_SECONDS", 0.1),
        blind if ctx.rank == 3 else contextlib.nullcontext(),
    ):
        try:
            check_shared(ctx, folder)
        except ValueError as error:
            return str(error)


def test_a_folder_that_a_host_does_not_see_is_refused_on_all_ranks(pool, tmp_path):
    for said in pool.run(check_shared_here, tmp_path, size=4):
        assert said.startswith(
            f"job.dump_folder {tmp_path} of rank 0 on a is not that of rank 3 on b: checkpoints are"
        )
    assert list(tmp_path.iterdir()) == []
