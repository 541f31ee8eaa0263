"""Several "hosts" on one machine: network namespaces with addresses and host names of their own.

    with Hosts(2) as hosts:                     # host0 is 10.77.0.1, host1 10.77.0.2
        process = hosts[1].start(["ping", "-c1", "host0"], path)
        hosts[1].cut()                          # its link goes down
        hosts[0].kill()                         # all its processes, at once

or, on the command line, one command of a shell per host:

    python -m tests.network.hosts 'hostname; ping -c1 host1' 'sleep 5'

A host is a process that waits, with namespaces of its own: network, host name, processes, mounts.
It has its own /etc/hosts and /dev/shm, and shares all other files, as hosts with a network file
system do. `eth0` leads to a bridge, in a namespace of its own too; `docker0` leads nowhere and has
the same address on each host, as with Docker. Nothing has a name outside: when the processes have
ended, however they ended, the kernel takes everything down.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Seconds for a command that sets up or changes a host.
_PATIENCE = 60
_TOOLS = ("ip", "mount", "nsenter", "tc", "unshare")
# In the namespaces of a host, process 1: all others end with it. It ends when its input is
# closed, as by the end of this process.
_WAIT = ["cat"]


def why_not() -> str | None:
    """Why this machine or user can have no such hosts; None if it can."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs the commands {', '.join(missing)} (util-linux, iproute2)"
    try:
        with Hosts(1):
            return None
    except (subprocess.CalledProcessError, OSError) as error:
        reason = (getattr(error, "stderr", None) or "").strip().splitlines()
        return f"namespaces are not allowed here: {reason[0] if reason else error}"


def delays_links() -> bool:
    """Whether the kernel can delay packets (netem); it can limit rates in any case."""
    with Hosts(1) as hosts:
        command = "tc qdisc replace dev eth0 root netem delay 1ms"
        return hosts[0].run(command.split(), check=False).returncode == 0


class Host:
    """A host: see `Hosts`.

    Attributes:
        name: its host name, which all hosts resolve.
        address: of its eth0.
    """

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address, self._port = name, address, f"to-{name}"
        self._folder = folder / name
        self._folder.mkdir()
        self._switch = 0
        kinds = ["--net", "--uts", "--mount", "--pid"]
        self._holder = _Holder([*kinds, "--fork", "--kill-child", "--mount-proc"])

    def set_up(self, switch: int, hosts: str) -> None:
        """Connect it to the namespace of the bridge (of process `switch`)."""
        self._switch = switch
        pid = str(self._holder.pid)
        _in_namespace(
            switch,
            ("ip", "link", "add", self._port, "type", "veth", "peer", "eth0", "netns", pid),
            ("ip", "link", "set", self._port, "master", "bridge", "up"),
        )
        self.run(["hostname", self.name])
        self.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"])
        self.write_names(hosts)
        for line in (
            "link set lo up",
            f"addr add {self.address}/24 dev eth0",
            "link set eth0 up",
            "link add docker0 type veth peer nowhere",
            "addr add 172.17.0.1/16 dev docker0",
            "link set nowhere up",
            "link set docker0 up",
        ):
            self.run(["ip", *line.split()])

    def write_names(self, text: str) -> None:
        """Replace its /etc/hosts."""
        names = self._folder / "hosts"
        is_mounted = names.exists()
        names.write_text(text)
        if not is_mounted:
            self.run(["mount", "--bind", str(names), "/etc/hosts"])

    def command(self, command: Sequence[str]) -> list[str]:
        """What runs a command in this host."""
        enter = ["nsenter", "--target", str(self._holder.pid), "--net", "--uts", "--mount", "--pid"]
        # nsenter goes to the root folder of the mounts.
        return [*enter, f"--wdns={os.getcwd()}", "--", *command]

    def run(self, command: Sequence[str], check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a short command in this host."""
        return _run(self.command(command), check=check)

    def start(
        self, command: Sequence[str], output: Path, cwd: Path = ROOT, **variables: str
    ) -> subprocess.Popen[str]:
        """Start a command in this host, with environment variables, all output to a file. It ends
        with the host at the latest."""
        enter = self.command(command)
        enter = [f"--wdns={cwd}" if part.startswith("--wdns=") else part for part in enter]
        with output.open("w") as file:
            return subprocess.Popen(
                enter,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, **variables},
                start_new_session=True,
            )

    def cut(self) -> None:
        """Its link goes down: neither side is told."""
        _in_namespace(self._switch, ("ip", "link", "set", self._port, "down"))

    def slow_down(self, rate: str, delay: str | None = None) -> None:
        """Limit what leaves it to a rate such as "20mbit"; with a delay such as "5ms" (netem)."""
        limit = f"tbf rate {rate} burst 16kb latency 500ms"
        if delay is not None:
            limit = f"netem delay {delay} rate {rate}"
        self.run(f"tc qdisc replace dev eth0 root {limit}".split())

    def kill(self) -> None:
        """SIGKILL to all its processes at once; its network ends with them."""
        self._holder.end()


class Hosts(Sequence):
    """`number` hosts, host0 and so on, on one bridge; for a `with` statement."""

    def __init__(self, number: int) -> None:
        self._number, self._hosts = number, []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Hosts:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lasp-hosts-")))
            switch = _Holder(["--net"])
            stack.callback(switch.end)
            bridge = ("ip", "link", "add", "bridge", "type", "bridge")
            _in_namespace(switch.pid, bridge, ("ip", "link", "set", "bridge", "up"))
            for i in range(self._number):
                host = Host(f"host{i}", f"10.77.0.{i + 1}", folder)
                stack.callback(host.kill)
                self._hosts.append(host)
            for host in self._hosts:
                host.set_up(switch.pid, self.names())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def names(self) -> str:
        """The /etc/hosts of each host."""
        lines = [f"{host.address} {host.name}" for host in self._hosts]
        return "\n".join(["127.0.0.1 localhost", *lines, ""])

    def __getitem__(self, index):
        return self._hosts[index]

    def __len__(self) -> int:
        return len(self._hosts)


class _Holder:
    """A waiting process in namespaces of its own, which `options` of unshare name."""

    def __init__(self, options: list[str]) -> None:
        self._process = subprocess.Popen(
            ["unshare", *options, *_WAIT],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            self.pid = self._pid_inside("--fork" in options)
        except BaseException:
            self.end()
            raise

    def _pid_inside(self, forks: bool) -> int:
        """The process that waits, once it does."""
        pid, deadline = self._process.pid, time.monotonic() + _PATIENCE
        while self._process.poll() is None and time.monotonic() < deadline:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            inside = int(children[0]) if forks and children else pid
            with contextlib.suppress(FileNotFoundError):
                if Path(f"/proc/{inside}/comm").read_text().strip() == _WAIT[0]:
                    return inside
            time.sleep(0.005)
        self.end()
        code, error = self._process.returncode, self._process.stderr.read()
        raise subprocess.CalledProcessError(code, self._process.args, stderr=error)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()


def _in_namespace(pid: int, *commands: Sequence[str]) -> None:
    """Run commands in the network namespace of a process."""
    for command in commands:
        _run(["nsenter", "--target", str(pid), "--net", "--", *command])


def _run(command: Sequence[str], check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=check, timeout=_PATIENCE)


def main(commands: list[str]) -> int:
    """Run one shell command per host and show what each prints; 1 if one fails."""
    if (reason := why_not()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder, Hosts(len(commands)) as hosts:
        outputs = [Path(folder, host.name) for host in hosts]
        processes = [
            host.start(["sh", "-c", command], output, Path.cwd())
            for host, command, output in zip(hosts, commands, outputs, strict=True)
        ]
        shown = [0] * len(hosts)
        while True:
            is_over = all(process.poll() is not None for process in processes)
            for i, output in enumerate(outputs):
                lines = output.read_text(errors="replace").splitlines()
                if not is_over:
                    # The last one may be incomplete.
                    lines = lines[:-1]
                for line in lines[shown[i] :]:
                    print(f"{hosts[i].name}: {line}", flush=True)
                shown[i] = max(shown[i], len(lines))
            if is_over:
                return int(any(process.returncode for process in processes))
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
