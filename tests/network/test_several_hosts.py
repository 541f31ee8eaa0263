"""Jobs over two hosts of two ranks: the results of one host, and faults that end with a sentence.

`make test` runs the first two tests.
"""

import re
import shutil
import sys
import time

import pytest

from launch.exit_codes import HUNG, ConfigError
from tests.faults.jobs import START, Job
from tests.launch.runs import flags, losses, output_of, start
from tests.network.hosts import ROOT, delays_links, main

PORT = "29500"
STEPS = 6
# Seconds: of the job, and in addition what it takes to see that ranks are silent or that the store
# does not answer, on a loaded machine.
TRAIN, INIT, SLACK = 6, 60, 45


def arguments(folder, data, **changes):
    wanted = dict(
        job__dump_folder=folder,
        data__source="folder",
        data__folder=data,
        training__steps=STEPS,
        checkpoint__interval=3,
        parallelism__context_parallel_degree=-1,
        comm__init_timeout_seconds=INIT,
    )
    values = flags(**(wanted | changes))
    return [*values, "--sample.no_enable", "--validation.no_enable"]


class Started:
    """A command on each host, and what it prints."""

    def __init__(self, hosts, folder, command, variables=None):
        """`command(number)` is that of a host; `variables` are those of host1."""
        self.outputs = [folder / f"{host.name}.log" for host in hosts]
        self.processes = [
            host.start(
                command(number),
                self.outputs[number],
                OMP_NUM_THREADS="1",
                CUDA_VISIBLE_DEVICES="",
                **((variables or {}) if number else {}),
            )
            for number, host in enumerate(hosts)
        ]

    def text(self, number):
        return self.outputs[number].read_text(errors="replace")

    def texts(self):
        return "\n".join(f"host{n}:\n{self.text(n)}" for n in range(len(self.outputs)))

    def wait_for(self, text, seconds=START):
        """Wait until host0 has printed something."""
        deadline = time.monotonic() + seconds
        while text not in self.text(0):
            assert self.processes[0].poll() is None and time.monotonic() < deadline, self.texts()
            time.sleep(0.05)

    def wait(self, seconds=START, numbers=(0, 1)):
        """The exit codes of the hosts' commands; None for one that has not ended in time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            codes = [self.processes[number].poll() for number in numbers]
            if None not in codes:
                break
            time.sleep(0.05)
        return codes


def torchrun(hosts, folder, argv, variables=None):
    def command(number):
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
            *("--node_rank", str(number), "--nproc_per_node", "2"),
            *("--master_addr", "host0", "--master_port", PORT),
            *("launch/train.py", *argv),
        ]

    return Started(hosts, folder, command, variables)


def assert_equal_losses(folder, expected):
    found = losses(folder)
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=0, abs=1e-6), step


def test_two_hosts_train_as_one(hosts, data, tmp_path):
    def arguments_of(folder):
        argv = arguments(tmp_path / folder, data, training__steps=3)
        return [*argv, "--checkpoint.no_enable"]

    argv = arguments_of("two")

    def command(number):
        script = [sys.executable, "-m", "tests.network.ranks"]
        return [*script, str(2 * number), "2", "4", "host0", PORT, *map(str, argv)]

    two = Started(hosts, tmp_path, command)
    one = Job(tmp_path / "logs", arguments_of("one"), size=4)
    try:
        assert one.wait(START) == [0] * 4, one.outputs()
    finally:
        one.end()
    assert two.wait() == [0, 0], two.texts()
    assert "hosts:       2 of 2 ranks each; cp 4 crosses 2 hosts" in two.text(0)
    assert_equal_losses(tmp_path / "two", losses(tmp_path / "one"))


def test_the_command_line_runs_a_command_per_host(hosts, capsys):
    assert main(["hostname; cat /etc/hosts", "hostname; exit 3"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "host0: host0" in lines and "host1: host1" in lines
    assert f"host0: {hosts[1].address} host1" in lines


@pytest.fixture(scope="module")
def one_host(data, tmp_path_factory):
    """The losses of four ranks on this machine, under torchrun."""
    folder = tmp_path_factory.mktemp("one-host")
    process = start(arguments(folder, data), 4)
    output = output_of(process)
    assert process.returncode == 0, output
    return losses(folder)


@pytest.mark.faults
def test_torchrun_on_two_hosts_saves_and_one_host_resumes(hosts, data, one_host, tmp_path):
    folder = tmp_path / "out"
    argv = arguments(folder, data)
    job = torchrun(hosts, tmp_path, argv)
    assert job.wait() == [0, 0], job.texts()
    assert_equal_losses(folder, one_host)
    shutil.rmtree(folder / "checkpoint" / f"step-{STEPS:08d}")
    process = start(argv, 2)
    output = output_of(process)
    assert process.returncode == 0, output
    assert re.search(r"resume: .*/step-00000003\n", output)
    assert_equal_losses(folder, one_host)


@pytest.mark.faults
@pytest.mark.parametrize("link", ["20mbit", "20mbit and 5ms"])
def test_a_slow_link_changes_no_result(hosts, data, one_host, tmp_path, link):
    rate, _, delay = link.partition(" and ")
    if delay and not delays_links():
        pytest.skip("this kernel cannot delay packets (netem)")
    for host in hosts:
        host.slow_down(rate, delay or None)
    job = torchrun(hosts, tmp_path, arguments(tmp_path / "out", data))
    assert job.wait() == [0, 0], job.texts()
    assert_equal_losses(tmp_path / "out", one_host)


HOST0, HOST1 = r"host0 \(ranks 0 and 1\)", r"host1 \(ranks 2 and 3\)"
SILENT1 = rf"error: {HOST1} is down or cannot be reached: rank 2 was last seen in step \d+, "
LOST0 = rf"error: the store of the job, on {HOST0}, does not answer: that host is down or cannot"


@pytest.mark.faults
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("host1 is cut off", {0: SILENT1, 1: LOST0}),
        ("host0 is cut off", {0: SILENT1, 1: LOST0}),
        ("host1 is killed", {0: SILENT1}),
        ("host0 is killed", {1: LOST0}),
    ],
)
def test_a_host_that_is_lost_is_named(hosts, data, tmp_path, fault, said):
    argv = arguments(
        tmp_path / "out", data, training__steps=10000, comm__train_timeout_seconds=TRAIN
    )
    job = torchrun(hosts, tmp_path, [*argv, "--checkpoint.no_enable"])
    job.wait_for("step: 3/")
    host, _, what = fault.partition(" is ")
    struck = hosts[int(host[-1])]
    struck.kill() if what == "killed" else struck.cut()
    began = time.monotonic()
    codes = job.wait(TRAIN + 2 * SLACK, list(said))
    seconds = time.monotonic() - began
    assert codes == [1] * len(said), job.texts()
    for number, sentence in said.items():
        assert re.search(sentence, job.text(number)), job.text(number)
        assert f"exitcode  : {HUNG}" in job.text(number)
        assert f"on host{number} waited in step" in job.text(number)
    print(f"{fault}: ended after {seconds:.1f} s, with a limit of {TRAIN} s")
    assert seconds < TRAIN + SLACK, job.texts()


# (names that host1 resolves in addition to host0's, its environment variables, the sentence).
UNREACHABLE = {
    "a name that does not resolve": (
        "",
        {},
        f"error: other hosts cannot reach {HOST1}: it cannot resolve its own name 'host1'",
    ),
    "a name that is its own only": (
        "127.0.1.1 host1\n",
        {},
        f"error: other hosts cannot reach {HOST1}: its name 'host1' resolves to the address "
        "127.0.1.1, which",
    ),
    "an interface that leads nowhere": (
        "10.77.0.2 host1\n",
        {"GLOO_SOCKET_IFNAME": "docker0"},
        f"error: {HOST0} cannot connect to {HOST1} at 172.17.0.1",
    ),
    "an interface that is not there": (
        "10.77.0.2 host1\n",
        {"GLOO_SOCKET_IFNAME": "ib0"},
        f"error: other hosts cannot reach {HOST1}: GLOO_SOCKET_IFNAME is ib0, but it has the "
        "interfaces lo, .*eth0",
    ),
}


@pytest.mark.faults
@pytest.mark.parametrize("case", UNREACHABLE)
def test_a_host_that_others_cannot_reach_is_named_before_training(hosts, data, tmp_path, case):
    names, variables, sentence = UNREACHABLE[case]
    hosts[1].write_names(f"127.0.0.1 localhost\n10.77.0.1 host0\n{names}")
    job = torchrun(hosts, tmp_path, arguments(tmp_path / "out", data), variables)
    assert job.wait() == [1, 1], job.texts()
    assert re.search(sentence, job.text(0)), job.text(0)
    for number in (0, 1):
        assert f"exitcode  : {ConfigError.exit_code}" in job.text(number)
    assert "step: 1/" not in job.text(0)


@pytest.mark.faults
def test_a_dump_folder_that_is_not_shared_is_refused(hosts, data, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    hosts[1].run(["mount", "-t", "tmpfs", "tmpfs", str(folder)])
    job = torchrun(hosts, tmp_path, arguments(folder, data))
    assert job.wait() == [1, 1], job.texts()
    said = "job.dump_folder .* of rank 0 on host0 is not that of rank 2 on host1"
    assert re.search(f"error: {said}", job.texts()), job.texts()
    assert not list(folder.glob(".seen*"))


def documented(text):
    """{host: command} of a page: the indented commands below a line "On hostN"."""
    commands = re.findall(r"^On `(host\d)`:\n\n((?:    .*\n)+)", text, re.M)
    return {host: re.sub(r"\\\n", " ", command) for host, command in commands}


@pytest.mark.faults
def test_the_documented_commands_train_on_two_hosts(hosts, tmp_path):
    commands = documented((ROOT / "docs" / "several_hosts.md").read_text())
    assert commands.keys() == {"host0", "host1"}
    clone = tmp_path / "lasp"
    for name in ("lasp", "parallel", "launch"):
        shutil.copytree(ROOT / name, clone / name)
    folder = f"cd {clone} && export PATH={sys.prefix}/bin:$PATH PYTHONPATH={clone}"
    job = Started(hosts, tmp_path, lambda n: ["sh", "-c", f"{folder}; {commands[f'host{n}']}"])
    assert job.wait() == [0, 0], job.texts()
    assert "sample of step" in job.text(0)
    assert list((clone / "outputs").glob("*/checkpoint/step-*"))
