"""The command line from outside: what is printed where, and the exit status."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

import relay
from relay.address import Address
from relay.cli import main
from relay.config import Config
from relay.core.auth import keys_line
from relay.demo import ADMIN_PORT, PREFERRED_PORT
from relay.net import pump

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[1]

#: No command takes longer than this for anything.
LIMIT_S = 30

Capsys: TypeAlias = pytest.CaptureFixture[str]

UPSTREAM = ["--upstream", "http://127.0.0.1:8000"]


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    """`relay serve` holds SIGHUP back until it can act on it; these tests' process is to go on as before."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """What `relay serve` would run with given flags: the daemon's place is taken."""
    configs: list[Config] = []

    def run(config: Config, load_config: Callable[[], Config] | None = None, *, source: str = "") -> int:
        configs.append(config)
        # What a reload would read is the same, flags included; without a file there is nothing to read.
        assert load_config is None or load_config() == config
        return 7

    supervisor = ModuleType("relay.daemon.supervisor")
    supervisor.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "relay.daemon.supervisor", supervisor)
    monkeypatch.setattr("relay.daemon.supervisor", supervisor, raising=False)

    def serve(*flags: str) -> Config:
        assert main(["serve", *flags]) == 7
        return configs.pop()

    return serve


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line on standard error after which `relay` ends with status 2."""

    def refused(*arguments: str) -> str:
        try:
            status: Any = main(arguments)
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        assert (status, out) == (2, "")
        (line,) = err.splitlines()
        return str(line)

    return refused


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], str]:
    """Writes a configuration file, and says where it is."""

    def write(text: str) -> str:
        path = tmp_path / "relay.toml"
        path.write_text(text)
        return str(path)

    return write


def test_serve_needs_no_more_than_an_upstream(served: Callable[..., Config]) -> None:
    config = served(*UPSTREAM)
    (pool,) = config.pools
    assert [upstream.url for upstream in pool.upstreams] == ["http://127.0.0.1:8000"]
    assert config.listen == Config().listen
    assert config.admin.address == Address("127.0.0.1", 8081)


def test_every_flag_of_serve(served: Callable[..., Config]) -> None:
    config = served(
        *["--listen", "127.0.0.1:0", "--listen", "unix:/run/relay.sock", "--admin", "off"],
        *["--upstream", "http://a:1", "--upstream", "unix:/run/vllm.sock", "--balance", "round_robin"],
        *["--workers", "1", "--log-format", "text", "--drain-s", "2.5"],
    )
    assert config.listen.addresses == (Address("127.0.0.1", 0), Address(unix_path="/run/relay.sock"))
    assert config.admin.address is None
    assert [upstream.url for upstream in config.pools[0].upstreams] == ["http://a:1", "unix:/run/vllm.sock"]
    assert config.pools[0].balance == "round_robin"
    assert (config.daemon.workers, config.daemon.drain_s, config.log.format) == (1, 2.5, "text")


def test_a_flag_wins_over_the_file_and_leaves_the_rest(
    served: Callable[..., Config], file: Callable[[str], str]
) -> None:
    path = file("""
        [listen]
        addresses = ["127.0.0.1:1"]
        [admin]
        address = "127.0.0.1:2"
        [daemon]
        drain_s = 3
        ready_delay_s = 4
        [[pool]]
        name = "chat"
        models = ["m"]
        upstreams = ["http://a:1"]
        [timeouts]
        connect_s = 5
        [log]
        format = "off"
    """)
    config = served("--config", path)
    assert (config.listen.addresses, config.admin.address) == ((Address("127.0.0.1", 1),), Address("127.0.0.1", 2))

    config = served("--config", path, "--upstream", "http://b:2", "--drain-s", "0", "--listen", "127.0.0.1:9")
    assert config.listen.addresses == (Address("127.0.0.1", 9),)
    assert config.admin.address == Address("127.0.0.1", 2)
    assert (config.daemon.drain_s, config.daemon.ready_delay_s, config.timeouts.connect_s) == (0, 4, 5)
    assert (config.pools[0].name, config.pools[0].models, config.log.format) == ("chat", ("m",), "off")
    assert [upstream.url for upstream in config.pools[0].upstreams] == ["http://b:2"]

    config = served("--config", file("[timeouts]\nconnect_s = 5"), *UPSTREAM)
    assert (len(config.pools), config.timeouts.connect_s) == (1, 5)


def test_without_an_upstream_serve_says_what_to_do(refused: Callable[..., str], file: Callable[[str], str]) -> None:
    wanted = "no upstream to send requests to; give --upstream http://HOST:PORT, or upstreams in a [[pool]]"
    assert refused("serve") == f"relay serve: --upstream: {wanted}"
    path = file("")
    assert refused("serve", "--config", path) == f"{path}:pool[0].upstreams: {wanted}"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--listen", "8080"], '--listen: "8080" has no host; write 127.0.0.1:8080'),
        (["--listen", "a:1", "--listen", "a:1"], "--listen: a:1 collides with a:1"),
        (["--listen", "127.0.0.1:8081"], "--admin: 127.0.0.1:8081 collides with 127.0.0.1:8081 (listen.addresses[0])"),
        (["--admin", "on"], '--admin: "on" has no port'),
        (["--upstream", "ftp://a"], '--upstream: "ftp://a" is not an engine\'s URL'),
        (["--upstream", "http://a/v1"], "--upstream: "),
        (
            ["--decode", "http://a:8000,http://b:8001"],
            '--decode: "http://a:8000,http://b:8001" is more than one engine; repeat the flag, once for each engine',
        ),
        (["--upstream", "http://127.0.0.1:8080"], "--upstream: http://127.0.0.1:8080 is this relay itself"),
        (["--balance", "fastest"], '--balance: "fastest" is not valid; allowed: "least_outstanding", "round_robin", '),
        (
            ["--admin", "0.0.0.0:8081"],
            "--admin: 0.0.0.0:8081 can be reached from other machines; allowed: loopback, or ",
        ),
        (["--upstream", "http://127.0.0.1:8000"], '--upstream: "http://127.0.0.1:8000" is there twice'),
        (["--workers", "0"], '--workers: "0" is not valid; allowed: "auto" or a whole number, 1 to 1024'),
        (["--log-format", "xml"], '--log-format: "xml" is not valid'),
        (["--drain-s", "-1"], '--drain-s: "-1" is not valid; allowed: seconds, 0 or more'),
        (["--drain-s", "nan"], '--drain-s: "nan" is not valid'),
        (["--drain-s"], "--drain-s: expected one argument"),
    ],
)
def test_a_wrong_flag_is_named(flags: list[str], said: str, refused: Callable[..., str]) -> None:
    assert refused("serve", *UPSTREAM, *flags).startswith(f"relay serve: {said}")


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["check"], ["version", "--x"], ["serve", "--up", "http://a:1"]]
)
def test_wrong_usage(arguments: list[str], refused: Callable[..., str]) -> None:
    assert refused(*arguments).endswith("--help)")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["serve", "--upstreams", "http://a:1"],
            "relay serve: unrecognized arguments: --upstreams http://a:1; perhaps --upstream is meant (see relay serve",
        ),
        (["serve", "--forcestream"], "relay serve: unrecognized arguments: --forcestream; perhaps --force-stream is"),
        (["serve", "--worker", "2"], "relay serve: unrecognized arguments: --worker 2; perhaps --workers is meant"),
        (["serve", "--model", "foo"], "relay serve: unrecognized arguments: --model foo (see relay serve --help"),
        (["serve", "--relod"], "relay serve: unrecognized arguments: --relod (see relay serve --help"),
        (["serve", "--health=/up"], "relay serve: unrecognized arguments: --health=/up (see relay serve --help"),
        (["--watch", "status"], "relay status: unrecognized arguments: --watch; flags stand behind relay status (see"),
        (
            ["serve", "a", "--upstrem=b"],
            "relay serve: unrecognized arguments: a --upstrem=b; perhaps --upstream is meant",
        ),
        (["status", "127.0.0.1:8081"], "relay status: unrecognized arguments: 127.0.0.1:8081 (see relay status --help"),
        (["key", "new", "a", "b"], "relay key new: unrecognized arguments: b (see relay key new --help"),
    ],
)
def test_what_no_flag_takes_is_told_by_the_command(
    arguments: list[str], said: str, refused: Callable[..., str]
) -> None:
    assert refused(*arguments).startswith(said)


def test_what_a_flag_did_not_say_is_the_files_problem(file: Callable[[str], str], capsys: Capsys) -> None:
    path = file("""
        [[pool]]
        max_queue = 3
        [[pool]]
        name = "other"
        models = ["m"]
        upstreams = ["http://a:1", "http://a:1"]
    """)
    assert main(["serve", "--config", path, "--upstream", "http://127.0.0.1:8081"]) == 2
    assert [line.partition(": ")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"{path}:pool[0].max_queue",
        f"{path}:pool[1].upstreams[1]",
        "relay serve",
    ]


def test_check_says_what_the_file_would_do(file: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    path = file("""
        [listen]
        addresses = ["127.0.0.1:80", "unix:/run/relay.sock"]
        [admin]
        address = "off"
        [[pool]]
        name = "chat"
        models = ["a", "b*"]
        upstreams = ["http://10.0.0.1:8000", { url = "unix:/run/vllm.sock", weight = 2, max_in_flight = 9 }]
        balance = "round_robin"
        max_in_flight = 10
        max_queue = 20
        [[pool]]
        name = "rest"
        upstreams = ["dns+http://engines:8000"]
        [failover]
        statuses = [503]
        [health]
        interval_s = 1
        [timeouts]
        connect_s = 1
        first_token_s = 600
        [log]
        format = "text"
    """)
    assert main(["check", "--config", path]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [
        f"{path}: ok",
        "  listen on http://127.0.0.1:80",
        "  listen on unix:/run/relay.sock",
        "  admin off",
        "  pool chat: a, b*; round_robin over",
        "    http://10.0.0.1:8000",
        "    unix:/run/vllm.sock, weight 2, at most 9 in flight",
        "    at most 10 in flight",
        "    at most 20 waiting",
        "  pool rest: every model; least_outstanding over",
        "    dns+http://engines:8000",
        "  differs from the defaults:",
        "    failover.statuses = [503] (default [502,503,504])",
        "    timeouts.connect_s = 1.0 (default 3.0)",
        "    health.interval_s = 1.0 (default 5.0)",
        '    log.format = "text" (default "json")',
    ]


def test_check_tells_the_halves_of_a_split_pool(file: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    prefill = '{ url = "http://a:1", bootstrap = "http://a:9" }'
    path = file(f'[[pool]]\nprefill = [{prefill}]\ndecode = ["http://b:2"]\nconnector = "mooncake"')
    assert main(["check", "--config", path]) == 0
    assert capsys.readouterr().out.splitlines()[3:6] == [
        "  pool default: every model; split, mooncake, least_outstanding over",
        "    prefill http://a:1, bootstrap server at http://a:9",
        "    decode http://b:2",
    ]


def test_check_tells_what_a_pool_has_of_its_own(file: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    settings = [
        'session_header = "X-Chat"',
        'callback_address = "10.0.0.9:9000"',
        'on_missing_kv = "error"',
        "drain_kv = false",
        'cached_tokens_from = "decode"',
        "force_stream = true",
        'include_usage = "always"',
        "keepalive_comment_s = 5.0",
    ]
    pool = ["[[pool]]", 'prefill = ["http://a:1"]', 'decode = ["http://b:2"]', 'connector = "ascend_layerwise"']
    assert main(["check", "--config", file("\n".join(pool + settings))]) == 0
    assert capsys.readouterr().out.splitlines()[6:] == [
        *[f"    {setting}" for setting in settings],
        "  all else is the default",
    ]


def test_check_reports_every_problem(file: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    path = file("[other]\n[[pool]]\nupstreams = []\n[limits]\nmax_connections = 0")
    assert main(["check", "--config", path]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.removeprefix(f"{path}:").partition(": ")[0] for line in err.splitlines()] == [
        "other",
        "limits.max_connections",
        "pool[0].upstreams",
    ]


def test_the_example_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    """Its values are the defaults that its comments call them."""
    assert main(["check", "--config", str(ROOT / "systemd/relay.toml")]) == 0
    assert capsys.readouterr().out.endswith("all else is the default\n")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool, bool]]:
    """What `relay status` would ask for: URL, `--watch`, `--json`."""
    calls: list[tuple[str, bool, bool]] = []

    def status(admin_url: str, watch: bool, as_json: bool) -> int:
        calls.append((admin_url, watch, as_json))
        return 0

    monkeypatch.setattr("relay.status.main", status)
    return calls


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ([], ("http://127.0.0.1:8081", False, False)),
        (["--admin", "[::1]:9", "--watch"], ("http://[::1]:9", True, False)),
        (["--admin", "unix:/run/relay/admin.sock", "--json"], ("unix:/run/relay/admin.sock", False, True)),
    ],
)
def test_status_asks_the_admin_side(
    flags: list[str], wanted: tuple[str, bool, bool], asked: list[tuple[str, bool, bool]]
) -> None:
    assert main(["status", *flags]) == 0
    assert asked == [wanted]


@pytest.mark.parametrize("address", ["8081", "off", "http://127.0.0.1:8081"])
def test_status_wants_an_address(address: str, refused: Callable[..., str]) -> None:
    assert refused("status", "--admin", address).startswith(f'relay status: --admin: "{address}" ')


def test_status_of_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        assert main(["status", "--admin", f"127.0.0.1:{port}"]) == 1
    assert capsys.readouterr().err.startswith(f"relay status: no answer from http://127.0.0.1:{port} (")


def test_the_flags_of_a_split_pool(served: Callable[..., Config]) -> None:
    config = served("--prefill", "http://a:1", "--prefill", "http://b:1", "--decode", "http://c:1",
                    "--connector", "mooncake")  # fmt: skip
    (pool,) = config.pools
    assert [each.url for each in pool.prefill] == ["http://a:1", "http://b:1"]
    assert [each.url for each in pool.decode] == ["http://c:1"]
    assert (pool.upstreams, pool.connector) == ((), "mooncake")


def test_the_flags_of_the_ascend_proxy(served: Callable[..., Config]) -> None:
    config = served(
        *["--host", "127.0.0.1", "--port", "9000", "--prefiller-hosts", "a", "b", "--prefiller-ports", "1", "2"],
        *["--decoder-hosts", "c", "--decoder-ports", "3"],
    )
    (pool,) = config.pools
    assert config.listen.addresses == (Address("127.0.0.1", 9000),)
    assert [each.url for each in pool.prefill] == ["http://a:1", "http://b:2"]
    assert [each.url for each in pool.decode] == ["http://c:3"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prefiller-hosts", "a", "b", "--prefiller-ports", "1"], "--prefiller-ports: 2 hosts and 1 ports"),
        (["--prefiller-hosts", "a", "--prefiller-ports", "99999"], '--prefiller-hosts: "http://a:99999" has no valid '),
        (["--decoder-hosts", "a b", "--decoder-ports", "1"], '--decoder-hosts: "http://a b:1" has no valid host'),
        (["--host", "a b"], '--host: "a b:8000" has no valid host'),
        (["--port", "70000"], '--host: "127.0.0.1:70000" has no valid port'),
    ],
)
def test_a_wrong_flag_of_the_ascend_proxy_is_named(flags: list[str], said: str, refused: Callable[..., str]) -> None:
    assert refused("serve", *flags).startswith(f"relay serve: {said}")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"relay {relay.__version__}"
    assert lines[-1] == ("pump interpreted" if pump.__file__.endswith(".py") else "pump compiled")
    assert [line.split()[0] for line in lines] == [
        *["relay", "Python", "trio", "h11", "httpx", "msgspec", "prometheus-client", "rich", "pump"]
    ]


def run_relay(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m relay` as a process of its own."""
    command = [sys.executable, "-W", "error", "-m", "relay", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def test_the_module_is_the_command() -> None:
    result = run_relay("version")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"relay {relay.__version__}\n")
    result = run_relay("serve")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("relay serve: --upstream: no upstream")


@pytest.mark.parametrize(
    "module", [["relay", "version"], ["relay_bench", "doctor", "--json", "--model", "m", "http://127.0.0.1:1"]]
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_left_is_no_traceback(module: list[str], unbuffered: str) -> None:
    """Written at once or flushed at the end, as by ``relay version | head``."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        command = [sys.executable, "-m", *module]
        env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        result = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, timeout=LIMIT_S, env=env, check=False)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, b"")


def test_check_does_not_load_the_daemon() -> None:
    """It stands in a unit's ExecStartPre; trio and httpx alone would double its time."""
    loaded = (
        "import sys; from relay.cli import main; main(['check', '--config', 'systemd/relay.toml']); print(*sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", loaded], capture_output=True, text=True, timeout=LIMIT_S, check=True, cwd=ROOT
    )
    modules = result.stdout.splitlines()[-1].split()
    assert "relay.config" in modules
    assert not {"trio", "httpx", "h11", "relay.daemon", "relay.demo"} & set(modules)


def test_demo_once() -> None:
    result = run_relay("demo", "--once")
    assert (result.returncode, result.stderr) == (0, "")
    *_, line = result.stdout.splitlines()
    record = json.loads(line)
    assert record["id"].startswith("demo-")
    assert (record["status"], record["outcome"], record["usage"]) == (200, "--", "engine")
    shown = re.search(r"first token +after ([0-9.]+) ms, of which the relay took ([0-9.]+) ms", result.stdout)
    assert shown is not None
    assert shown.groups() == (f"{record['ttft_ms']:.1f}", f"{record['relay_ms']:.1f}")
    assert f"frames       {record['frames']} in " in result.stdout
    assert f"{record['prompt_tokens']} + {record['completion_tokens']} tokens" in result.stdout


@pytest.fixture
def busy_ports() -> Iterator[None]:
    """A demo's own ports are taken: two that began at once, of two tests, would both find them free."""
    with ExitStack() as stack:
        for port in (PREFERRED_PORT, ADMIN_PORT):
            holder = stack.enter_context(socket.socket())
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # the other test holds them, too
            with suppress(OSError):  # or somebody else
                holder.bind(("127.0.0.1", port))
        yield


@pytest.fixture
def demo(busy_ports: None) -> Iterator[subprocess.Popen[str]]:
    """A demo that was left running."""
    process = subprocess.Popen(
        [sys.executable, "-m", "relay", "demo"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        yield process
        process.terminate()  # after a failed test its children must not stay behind
        try:
            process.wait(LIMIT_S)
        finally:
            process.kill()


def children_of(process: subprocess.Popen[str]) -> list[int]:
    """The processes that a process has started and not yet ended."""
    threads = Path(f"/proc/{process.pid}/task").glob("*/children")  # each has what it has started
    return sorted(int(pid) for thread in threads for pid in thread.read_text().split())


def is_running(pid: int) -> bool:
    """Whether a process is there, and not only its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_demo_goes_on_until_it_is_interrupted(demo: subprocess.Popen[str]) -> None:
    """What it proposes works, each exchange has its record, and Ctrl-C leaves nobody behind."""
    assert demo.stdout is not None
    assert demo.stderr is not None
    proposal = next(line for line in demo.stdout if line.startswith("  curl -N "))
    found = re.fullmatch(r"  curl -N (\S+) -H 'Content-Type: (\S+)' -d '(.*)'\n", proposal)
    assert found is not None
    url, content_type, body = found.groups()
    request = urllib.request.Request(url, body.encode(), {"Content-Type": content_type, "X-Request-Id": "by-hand"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=LIMIT_S) as response:
        assert response.read().endswith(b"data: [DONE]\n\n")
    record = json.loads(next(line for line in demo.stdout if line.strip()))
    assert (record["id"], record["outcome"]) == ("by-hand", "--")

    children = children_of(demo)
    assert len(children) == 2
    demo.send_signal(signal.SIGINT)
    assert demo.wait(LIMIT_S) == 0
    assert demo.stderr.read() == ""
    assert not [pid for pid in children if is_running(pid)]


def test_demo_ends_when_nobody_reads(demo: subprocess.Popen[str]) -> None:
    """As in `relay demo | head -1`."""
    assert demo.stdout is not None
    assert demo.stderr is not None
    demo.stdout.readline()
    demo.stdout.close()
    assert demo.wait(LIMIT_S) == 1
    assert demo.stderr.read() == ""


def test_demo_says_when_a_child_has_ended(demo: subprocess.Popen[str]) -> None:
    assert demo.stdout is not None
    assert demo.stderr is not None
    next(line for line in demo.stdout if line.startswith("  curl -N "))
    children = children_of(demo)
    os.kill(children[0], signal.SIGKILL)  # the engine comes first, as the relay is told its URL
    assert demo.wait(LIMIT_S) == 1
    assert demo.stderr.read() == "relay demo: the engine ended with status -9\n"
    assert not [pid for pid in children if is_running(pid)]


def test_check_reads_the_keys(file: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice:not-a-digest\n")
    path = file(f'[[pool]]\nupstreams = ["http://a:1"]\n[auth]\nkeys_file = "{keys}"\n')
    assert main(["check", "--config", path]) == 2
    assert capsys.readouterr().err.startswith(f"{path}:auth.keys_file: {keys}:1: ")
    keys.unlink()
    assert main(["check", "--config", path]) == 2
    assert capsys.readouterr().err == f"{path}:auth.keys_file: {keys}: cannot be read: No such file or directory\n"


@pytest.mark.parametrize(
    ("key", "table"),
    [
        ("auth.keys_file", "[auth]\nkeys_file = '{none}'"),
        ("auth.upstream_key_file", "[auth]\nupstream_key_file = '{none}'"),
        ("listen.tls.cert", "[listen]\ntls = {{ cert = '{none}', key = '{path}' }}"),
    ],
)
def test_serve_tells_of_files_it_cannot_read_as_check_does(
    key: str, table: str, file: Callable[[str], str], tmp_path: Path, refused: Callable[..., str]
) -> None:
    """But with another status, for which systemd starts it again: a mount may be late."""
    none, path = tmp_path / "none", tmp_path / "relay.toml"
    file("[[pool]]\nupstreams = ['http://a:1']\n" + table.format(none=none, path=path))
    said = f"{path}:{key}: {none}: cannot be read: No such file or directory"
    assert refused("check", "--config", str(path)) == said
    result = run_relay("serve", "--config", str(path))
    assert (result.returncode, result.stdout, result.stderr) == (1, "", f"{said}\n")


def test_check_reads_all_other_files(
    file: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = tmp_path / "none"
    path = file(
        f"[listen]\ntls = {{ cert = '{none}', key = '{none}' }}\n"
        f"[[pool]]\nupstreams = ['http://a:1', {{ url = 'https://b:2', ca = '{none}' }}]\n[auth]\nkeys_file = '{none}'"
    )
    assert main(["check", "--config", path]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"{path}:auth.keys_file: {none}: cannot be read: No such file or directory",
        f"{path}:pool[0].upstreams[1].ca: {none}: cannot be read: No such file or directory",
        f"{path}:listen.tls.cert: {none}: cannot be read: No such file or directory",
        f"{path}:listen.tls.key: {none}: cannot be read: No such file or directory",
    ]


def test_check_warns_of_what_can_hardly_be_meant(
    file: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = file(
        "[listen]\naddresses = ['127.0.0.1:1', '0.0.0.0:2', 'unix:/s']\n"
        "[timeouts]\ntotal_s = 100\nfirst_token_s = 100\nqueue_s = 99\n"
        "[prices.m]\nprompt = 1\ncached_prompt = 2\n[auth]\nroutes = ['/v1/models']\n"
        "[[pool]]\nupstreams = ['http://a:1']\nconnector = 'mooncake'\nsession_header = 'X-Mine'\n"
        "[[pool]]\nname = 'split'\nmodels = ['s']\nprefill = ['http://b:1']\ndecode = ['http://c:1']\n"
        "callback_address = '127.0.0.1:9'\nbalance = 'session_affinity'\nsession_header = 'X-Mine'\n"
        "[[pool]]\nname = 'c'\nmodels = ['c']\nupstreams = ['http://d:1']\nbalance = 'session_affinity'\n"
        "session_header = 'Content-Length'\n"
        "[[pool]]\nname = 'all'\nmodels = ['x', '*']\nupstreams = ['http://e:1']\n"
    )
    assert main(["check", "--config", path]) == 0
    assert capsys.readouterr().err.splitlines() == [
        f'{path}:pool[0].session_header: warning: does nothing here; it is for balance = "session_affinity"',
        f"{path}:pool[0].connector: warning: does nothing here; it is for a split pool",
        f"{path}:pool[1].callback_address: warning: does nothing here; it is for ascend_layerwise",
        f"{path}:pool[2].session_header: warning: does nothing: Content-Length names no session",
        f"{path}:auth.routes: warning: does nothing without auth.keys_file",
        f"{path}:listen.addresses[1]: warning: 0.0.0.0:2 can be reached from other machines, and nobody is asked for a "
        "key (auth.keys_file)",
        f"{path}:timeouts.first_token_s: warning: 100 is never reached, as total_s is 100",
        f"{path}:pool[0]: warning: is never reached: it is for the models that no other pool names, and pool all names "
        'all of them ("*")',
        f'{path}:prices."m".cached_prompt: warning: is dearer than prompt',
    ]


def test_check_warns_of_limits_that_fit_no_key(
    file: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(keys_line("team-alice", b"secret"))
    limits = [f'[auth.limits."{name}"]\nmax_in_flight = 1' for name in ("team-alice", "team-*", "team-bob", "dev-*")]
    path = file("\n".join(['[[pool]]\nupstreams = ["http://a:1"]', f'[auth]\nkeys_file = "{keys}"', *limits]))
    assert main(["check", "--config", path]) == 0
    assert capsys.readouterr().err.splitlines() == [
        f'{path}:auth.limits."{name}": warning: fits no key of {keys}' for name in ("team-bob", "dev-*")
    ]


def test_check_warns_of_engines_that_share_kv_sockets(
    file: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = file("""
        [[pool]]
        connector = "p2p_nccl"
        prefill = ["http://a:1", { url = "http://b:1", kv_address = "b:7" }]
        decode = ["http://a:2", { url = "http://b:2", kv_address = "b:8" }, { url = "http://b:3", kv_address = "b:7" }]
    """)
    assert main(["check", "--config", path]) == 0
    shared = "warning: has the KV sockets of pool[0].prefill"
    assert capsys.readouterr().err.splitlines() == [
        f"{path}:pool[0].decode[0]: {shared}[0], a:14579; give each its kv_address",
        f"{path}:pool[0].decode[2]: {shared}[1], b:7; give each its kv_address",
    ]


@pytest.mark.parametrize("flag", [("--host", "::1"), ("--port", "9000")])
def test_one_way_to_say_where_to_listen(refused: Callable[..., str], flag: tuple[str, str]) -> None:
    said = refused("serve", *UPSTREAM, "--listen", "127.0.0.1:8000", *flag)
    assert said == f"relay serve: {flag[0]}: stands beside --listen; allowed: one or the other"
