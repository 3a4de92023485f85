"""What a configuration file may say, and what is said about one that says something else."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Any

import pytest

from relay.address import Address, parse_address, parse_upstream
from relay.config import Config, ConfigError, load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

POOL = '[[pool]]\nupstreams = ["http://10.0.0.1:8000"]\n'


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str], Config]:
    """Reads a configuration from its text."""

    def read(text: str) -> Config:
        path = tmp_path / "relay.toml"
        path.write_text(text)
        return load(path)

    return read


@pytest.fixture
def problems(read: Callable[[str], Config], tmp_path: Path) -> Callable[[str], list[str]]:
    """The lines about a wrong configuration, less the file's name before each."""

    def problems(text: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            read(text)
        lines = str(caught.value).splitlines()
        name = f"{tmp_path / 'relay.toml'}:"
        assert all(line.startswith(name) for line in lines)
        return [line.removeprefix(name) for line in lines]

    return problems


def test_a_file_with_every_setting(read: Callable[[str], Config]) -> None:
    config = read("""
        [listen]
        addresses = ["0.0.0.0:80", "[::1]:0", "unix:/run/relay.sock"]
        [admin]
        address = "unix:/run/admin.sock"
        [daemon]
        workers = 1
        drain_s = 5
        ready_delay_s = 2.5
        [[pool]]
        name = "chat"
        models = ["qwen3-32b", "org/qwen*"]
        upstreams = ["http://10.0.0.1:8000", { url = "unix:/run/vllm.sock" }]
        balance = "round_robin"
        [stream]
        max_frame_bytes = 4096
        [failover]
        attempts = 1
        budget_s = 0.5
        statuses = []
        [timeouts]
        client_head_s = 1
        client_body_s = 2
        client_idle_s = 3
        client_stall_s = 4
        queue_s = 5
        connect_s = 6
        first_token_s = 7
        between_tokens_s = 8
        total_s = 9
        upstream_idle_s = 0
        [limits]
        max_head_bytes = 1
        max_body_bytes = 2
        max_connections = 3
        max_buffered_bytes = 4
        [log]
        format = "off"
    """)
    assert config.listen.addresses == (
        Address("0.0.0.0", 80),
        Address("::1", 0),
        Address(unix_path="/run/relay.sock"),
    )
    assert config.admin.address == Address(unix_path="/run/admin.sock")
    assert (config.daemon.workers, config.daemon.drain_s, config.daemon.ready_delay_s) == (1, 5.0, 2.5)
    (pool,) = config.pools
    assert (pool.name, pool.models, pool.balance) == ("chat", ("qwen3-32b", "org/qwen*"), "round_robin")
    assert [upstream.url for upstream in pool.upstreams] == ["http://10.0.0.1:8000", "unix:/run/vllm.sock"]
    assert config.stream.max_frame_bytes == 4096
    assert (config.failover.attempts, config.failover.budget_s, config.failover.statuses) == (1, 0.5, ())
    timeouts = config.timeouts
    assert [getattr(timeouts, name) for name in timeouts.__struct_fields__] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    limits = config.limits
    assert [getattr(limits, name) for name in limits.__struct_fields__] == [1, 2, 3, 4]
    assert config.log.format == "off"


def test_the_defaults_are_those_of_the_interface(read: Callable[[str], Config]) -> None:
    read(POOL)  # the smallest file
    written = tomllib.loads("""
        [listen]
        addresses = ["127.0.0.1:8080"]
        [admin]
        address = "127.0.0.1:8081"
        [daemon]
        workers = "auto"
        drain_s = 30.0
        ready_delay_s = 0.0
        [stream]
        max_frame_bytes = 1048576
        [failover]
        attempts = 3
        budget_s = 30.0
        statuses = [502, 503, 504]
        [timeouts]
        client_head_s = 10.0
        client_body_s = 60.0
        client_idle_s = 75.0
        client_stall_s = 30.0
        queue_s = 60.0
        connect_s = 3.0
        first_token_s = 600.0
        between_tokens_s = 120.0
        total_s = 0.0
        upstream_idle_s = 4.0
        [limits]
        max_head_bytes = 65536
        max_body_bytes = 67108864
        max_connections = 20000
        max_buffered_bytes = 1073741824
        [log]
        format = "json"
    """)

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Address) else value

    config = Config()
    assert written == {
        table: {name: plain(getattr(getattr(config, table), name)) for name in getattr(config, table).__struct_fields__}
        for table in Config.__struct_fields__
        if table != "pools"
    }


def test_admin_can_be_off(read: Callable[[str], Config]) -> None:
    assert read(POOL + '[admin]\naddress = "off"').admin.address is None


def test_all_problems_are_reported_each_on_its_line(problems: Callable[[str], list[str]]) -> None:
    assert problems("""
        bogus = 1
        [listen]
        addresses = ["8080", "127.0.0.1:8080", 3]
        [daemon]
        workers = 8
        drain_s = "3"
        "a b\\n" = 1
        [[pool]]
        upstreams = ["https://10.0.0.1:8000", { url = "http://10.0.0.2:8000/v1", weight = 2 }, {}]
        balance = "random"
        [[pool]]
        [timeouts]
        conect_s = 3
        [failover]
        statuses = [200, 503]
        [limits]
        max_buffered_bytes = 1
    """) == [
        "bogus: is not a known name; allowed: listen, admin, daemon, pool, stream, failover, timeouts, limits, log",
        'listen.addresses[0]: "8080" has no host; write 127.0.0.1:8080, or 0.0.0.0:8080 for every interface',
        "listen.addresses[2]: 3 is not valid; allowed: HOST:PORT, [::1]:PORT or unix:/path",
        'daemon.workers: 8 is not valid; allowed: "auto" or 1 (this version runs one worker)',
        'daemon.drain_s: "3" is not valid; allowed: seconds, 0 or more (0: none at all)',
        'daemon."a b\\n": is not a known name; allowed: workers, drain_s, ready_delay_s',
        'pool[0].upstreams[0]: "https://10.0.0.1:8000" is https, which this version does not speak; '
        "allowed: http://HOST:PORT or unix:/path",
        "pool[0].upstreams[1].weight: is not supported by this version; take it out",
        'pool[0].upstreams[1].url: "http://10.0.0.2:8000/v1" has a path, and requests keep their own; '
        "write http://10.0.0.2:8000 without /v1",
        'pool[0].upstreams[2]: has no url; allowed: { url = "http://HOST:PORT" }',
        'pool[0].balance: "random" is not valid; allowed: "least_outstanding" or "round_robin" (in this version)',
        "timeouts.conect_s: is not a known name; perhaps connect_s is meant; allowed: client_head_s, client_body_s, "
        "client_idle_s, client_stall_s, queue_s, connect_s, first_token_s, between_tokens_s, total_s, upstream_idle_s",
        "failover.statuses[0]: 200 is not valid; allowed: an HTTP error status, 400 to 599",
        "pool[1]: is a second pool; allowed: one [[pool]] (in this version)",
        "limits.max_buffered_bytes: has no room for max_body_bytes; allowed: 67108864 or more",
    ]


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("auth", '[auth]\nkeys_file = "keys"'),
        ("prices", '[prices."qwen3-32b"]\nprompt = 0.1'),
        ("cost", "[cost]\nin_usage = true"),
        ("health", "[health]\ninterval_s = 1"),
        ("listen.tls", '[listen]\ntls = { cert = "c", key = "k" }'),
        ("stream.force_stream", "[stream]\nforce_stream = true"),
        ("stream.include_usage", '[stream]\ninclude_usage = "always"'),
        ("stream.keepalive_comment_s", "[stream]\nkeepalive_comment_s = 5"),
        ("timeouts.prefill_s", "[timeouts]\nprefill_s = 5"),
        *[
            (f"pool[0].{name}", f"[[pool]]\nupstreams = ['http://a:1']\n{name} = {value}")
            for name, value in {
                "max_in_flight": 1, "max_queue": 1, "session_header": "'x'", "force_stream": "true",
                "include_usage": "'always'", "keepalive_comment_s": 1, "prefill": [], "decode": [],
                "on_missing_kv": "'error'", "drain_kv": "true", "callback_address": "''", "connector": "'nixl'",
            }.items()
        ],
        *[
            (f"pool[0].upstreams[0].{name}", f"[[pool]]\nupstreams = [{{ url = 'http://a:1', {name} = {value} }}]")
            for name, value in {"weight": 1, "max_in_flight": 1, "ca": "'x'", "server_name": "'x'"}.items()
        ],
    ],
)  # fmt: skip
def test_what_comes_later_is_refused_now(table: str, text: str, problems: Callable[[str], list[str]]) -> None:
    pool = "" if table.startswith("pool") else POOL
    assert problems(f"{pool}\n{text}") == [f"{table}: is not supported by this version; take it out"]


@pytest.mark.parametrize(
    ("table", "setting"),
    [
        ("daemon", "workers = 0"),
        ("daemon", "workers = true"),
        ("daemon", 'workers = "all"'),
        ("daemon", "drain_s = -1"),
        ("daemon", "drain_s = nan"),
        ("daemon", "ready_delay_s = inf"),
        ("stream", "max_frame_bytes = 0"),
        ("stream", "max_frame_bytes = 1.5"),
        ("failover", "attempts = 0"),
        ("failover", "attempts = true"),
        ("failover", "budget_s = 0"),
        ("failover", "statuses = 503"),
        ("timeouts", "connect_s = -0.5"),
        ("timeouts", 'connect_s = "3s"'),
        ("timeouts", "total_s = 1e12"),
        ("limits", "max_connections = 0"),
        ("limits", "max_head_bytes = 1979-05-27"),
        ("listen", "addresses = []"),
        ("listen", 'addresses = "127.0.0.1:8080"'),
        ("admin", "address = 8081"),
        ("admin", "address = []"),
        ("log", 'format = "xml"'),
    ],
)
def test_a_value_out_of_range(table: str, setting: str, problems: Callable[[str], list[str]]) -> None:
    name = setting.partition(" = ")[0]
    (line,) = problems(f"{POOL}[{table}]\n{setting}")
    assert line.startswith(f"{table}.{name}: ")
    assert "is not valid; allowed: " in line


@pytest.mark.parametrize("text", ["pool = 1", "[pool]\nname = 'chat'", "listen = 1\n" + POOL, "pool = [1]"])
def test_a_table_of_the_wrong_kind(text: str, problems: Callable[[str], list[str]]) -> None:
    (line,) = problems(text)
    assert "is not valid; allowed: " in line


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ("", "pool[0].upstreams", "no upstream"),
        ("[[pool]]", "pool[0].upstreams", "no upstream"),
        ("[[pool]]\nupstreams = ['http://a', 'http://A:80/']", "pool[0].upstreams[1]", "is there twice"),
        ("[[pool]]\nupstreams = ['http://a:1']\nmodels = ['x', 'x']", "pool[0].models[1]", "is there twice"),
        (POOL + "[listen]\naddresses = ['a:1', 'a:1']", "listen.addresses[1]", "collides with a:1"),
        (POOL + "[listen]\naddresses = ['0.0.0.0:1', '10.0.0.1:1']", "listen.addresses[1]", "collides with 0.0.0.0:1"),
        (POOL + "[listen]\naddresses = ['127.0.0.1:8081']", "admin.address", "collides with 127.0.0.1:8081"),
        (POOL + "[listen]\naddresses = ['unix:/a']\n[admin]\naddress = 'unix:/a'", "admin.address", "collides"),
        ("[[pool]]\nupstreams = ['http://localhost:8080']", "pool[0].upstreams[0]", "is this relay itself"),
        ("[[pool]]\nupstreams = ['http://127.0.0.1:8081']", "pool[0].upstreams[0]", "is this relay itself"),
        ("[[pool]]\nupstreams = ['unix:/a']\n[listen]\naddresses = ['unix:/a']", "pool[0].upstreams[0]", "itself"),
    ],
)
def test_settings_wrong_together(text: str, key: str, message: str, problems: Callable[[str], list[str]]) -> None:
    (line,) = problems(text)
    assert line.startswith(f"{key}: ")
    assert message in line


def test_settings_right_together(read: Callable[[str], Config]) -> None:
    """Other ports, other families, kernel-picked ports, and another machine's port 8080."""
    read(
        "[[pool]]\nupstreams = ['http://10.0.0.1:8080', 'http://127.0.0.2:8080', 'unix:/b']\n"
        "[listen]\naddresses = ['127.0.0.1:0', '127.0.0.1:0', '127.0.0.1:8080', '[::]:8080', 'unix:/a']"
    )


def test_text_that_is_not_toml(problems: Callable[[str], list[str]]) -> None:
    (line,) = problems("[listen]\naddresses == []")
    assert line.startswith("2: is not TOML: ")
    (line,) = problems("[listen]\naddresses = [\n[")
    assert "is not TOML: " in line
    assert "end of document" in line


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "absent.toml")
    assert str(caught.value) == f"{tmp_path / 'absent.toml'}: cannot be read: No such file or directory"
    (tmp_path / "latin.toml").write_bytes(b"# \xe9")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "latin.toml")
    assert str(caught.value).startswith(f"{tmp_path / 'latin.toml'}: is not UTF-8")


@pytest.mark.parametrize(
    ("text", "address", "url"),
    [
        ("127.0.0.1:8080", Address("127.0.0.1", 8080), "http://127.0.0.1:8080"),
        ("localhost:0", Address("localhost", 0), "http://localhost:0"),
        ("[::1]:65535", Address("::1", 65535), "http://[::1]:65535"),
        ("[fe80::1%eth0]:80", Address("fe80::1%eth0", 80), "http://[fe80::1%eth0]:80"),
        ("unix:/run/a:b.sock", Address(unix_path="/run/a:b.sock"), "unix:/run/a:b.sock"),
    ],
)
def test_addresses(text: str, address: Address, url: str) -> None:
    assert parse_address(text) == address
    assert str(address) == text
    assert address.url == url


@pytest.mark.parametrize(
    "text",
    [
        "", ":", ":8080", "*:8080", "8080", "localhost", "a:b:1", "::1", "::1:80", "[::1]", "[::1]80", "[::1:80",
        "[127.0.0.1]:80", "[]:80", "a:", "a:65536", "a:-1", "a:٣", "a: 80", "a b:80", "-a:80", "1.2.3:80",
        "http://127.0.0.1:80", "unix:", "unix:relative", "unix://run/a", "unix:/dir/", "unix:/" + "a" * 107, "unix:/\0",
        "256.0.0.1:80", "[::1%]:80", "[::1%a b]:80", "[fe80::1%a%b]:80", "unix:/a\nb",
    ],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError):
        parse_address(text)


@pytest.mark.parametrize(
    ("text", "url", "host", "port", "authority"),
    [
        ("http://10.0.0.1:8000", "http://10.0.0.1:8000", "10.0.0.1", 8000, "10.0.0.1:8000"),
        ("HTTP://Engine-1.Local:8000/", "http://engine-1.local:8000", "engine-1.local", 8000, "engine-1.local:8000"),
        ("http://engine", "http://engine:80", "engine", 80, "engine"),
        ("http://[2001:DB8::1]:1", "http://[2001:db8::1]:1", "2001:db8::1", 1, "[2001:db8::1]:1"),
        ("http://[fe80::1%eth0]:1", "http://[fe80::1%eth0]:1", "fe80::1%eth0", 1, "[fe80::1]:1"),
    ],
)
def test_upstreams(text: str, url: str, host: str, port: int, authority: str) -> None:
    upstream = parse_upstream(text)
    assert (upstream.url, upstream.host, upstream.port) == (url, host, port)
    assert (upstream.unix_path, upstream.authority) == (None, authority)
    assert parse_upstream(upstream.url) == upstream


def test_an_upstream_on_a_unix_socket() -> None:
    upstream = parse_upstream("unix:/run/vllm.sock")
    assert (upstream.url, upstream.unix_path, upstream.authority) == (
        "unix:/run/vllm.sock",
        "/run/vllm.sock",
        "localhost",
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("https://a:1", "is https"),
        ("HTTPS://a:1", "is https"),
        ("a:8000", "is not an engine's URL"),
        ("ftp://a:8000", "is not an engine's URL"),
        ("", "is not an engine's URL"),
        ("http://", "has no valid host"),
        ("http://:8000", "has no host"),
        ("http://a:0", "has port 0"),
        ("http://a:x", "has no valid port"),
        ("http://a:1/v1", "write http://a:1 without /v1"),
        ("http://a:1?x=1", "has a path"),
        ("http://a:1//", "has a path"),
        ("http://a:1#f", "has a path"),
        ("http://me:secret@a:1", "user name or password"),
        ("http://a:1\r\nX", "has no valid port"),
        ("unix:a", "is not a unix socket's absolute path"),
    ],
)
def test_what_is_no_upstream(text: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_upstream(text)
    assert said in str(caught.value)


def test_a_password_is_not_repeated(problems: Callable[[str], list[str]]) -> None:
    (line,) = problems("[[pool]]\nupstreams = ['http://me:secret@a:1']")
    assert "secret" not in line
