"""What a configuration file may say, and what is said about one that says something else."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Any, get_args, get_origin

import msgspec
import pytest

from relay.address import Address, parse_address, parse_upstream
from relay.config import Config, ConfigError, UpstreamTable, load
from relay.core.balance import POLICIES

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
        allow_remote = true
        [daemon]
        workers = 1
        drain_s = 5
        ready_delay_s = 2.5
        [[pool]]
        name = "chat"
        models = ["qwen3-32b", "org/qwen*"]
        upstreams = [
            "http://10.0.0.1:8000",
            { url = "unix:/run/vllm.sock" },
            { url = "dns+http://engines:8000", weight = 3, max_in_flight = 7 },
        ]
        balance = "round_robin"
        max_in_flight = 100
        max_queue = 50
        session_header = "X-Chat"
        force_stream = false
        include_usage = "always"
        keepalive_comment_s = 0
        [[pool]]
        name = "long"
        prefill = [{ url = "http://10.0.1.1:8000", kv_address = "10.0.1.1:21001", bootstrap = "http://10.0.1.1:8998" }]
        decode = [{ url = "http://10.0.2.1:8000", bootstrap_port = 8998 }]
        connector = "sglang"
        on_missing_kv = "error"
        drain_kv = false
        callback_address = "10.0.0.9:9000"
        [stream]
        max_frame_bytes = 4096
        force_stream = true
        max_answer_bytes = 8192
        include_usage = "as-asked"
        keepalive_comment_s = 15
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
        prefill_s = 7
        first_token_s = 8
        between_tokens_s = 9
        total_s = 10
        upstream_idle_s = 0
        [limits]
        max_head_bytes = 1
        max_body_bytes = 2
        max_connections = 3
        max_buffered_bytes = 4
        [health]
        path = "/ping?deep=1"
        interval_s = 0
        failures = 1
        successes = 4
        [auth]
        keys_file = "/etc/relay/keys"
        routes = ["/v1/*", "/tokenize"]
        upstream_key_file = "/etc/relay/key"
        [prices."qwen3-32b"]
        prompt = 0.1
        cached_prompt = 0.02
        completion = 0.4
        [prices."*"]
        [cost]
        in_usage = true
        [log]
        format = "off"
    """)
    assert config.listen.addresses == (
        Address("0.0.0.0", 80),
        Address("::1", 0),
        Address(unix_path="/run/relay.sock"),
    )
    assert (config.admin.address, config.admin.allow_remote) == (Address(unix_path="/run/admin.sock"), True)
    assert (config.daemon.workers, config.daemon.drain_s, config.daemon.ready_delay_s) == (1, 5.0, 2.5)
    pool, split = config.pools
    assert (pool.name, pool.models, pool.balance) == ("chat", ("qwen3-32b", "org/qwen*"), "round_robin")
    assert (pool.max_in_flight, pool.max_queue, pool.session_header) == (100, 50, "X-Chat")
    assert [(each.url, each.weight, each.max_in_flight, each.is_dns) for each in pool.upstreams] == [
        ("http://10.0.0.1:8000", 1, 0, False),
        ("unix:/run/vllm.sock", 1, 0, False),
        ("dns+http://engines:8000", 3, 7, True),
    ]
    assert (pool.is_split, split.is_split) == (False, True)
    (prefill,), (decode,) = split.prefill, split.decode
    assert (prefill.url, prefill.kv_address, prefill.bootstrap) == (
        "http://10.0.1.1:8000",
        "10.0.1.1:21001",
        "http://10.0.1.1:8998",
    )
    assert (decode.url, decode.bootstrap_port) == ("http://10.0.2.1:8000", 8998)
    assert (split.connector, split.on_missing_kv, split.drain_kv) == ("sglang", "error", False)
    assert split.callback_address == "10.0.0.9:9000"
    stream = config.stream
    assert (stream.max_frame_bytes, stream.max_answer_bytes) == (4096, 8192)
    assert (stream.force_stream, stream.include_usage, stream.keepalive_comment_s) == (True, "as-asked", 15.0)
    own = msgspec.structs.replace(stream, force_stream=False, include_usage="always", keepalive_comment_s=0.0)
    assert config.stream_of(pool) == own
    assert config.stream_of(split) == stream
    auth = config.auth
    assert (auth.keys_file, auth.upstream_key_file) == ("/etc/relay/keys", "/etc/relay/key")
    assert auth.routes == ("/v1/*", "/tokenize")
    price, free = config.prices["qwen3-32b"], config.prices["*"]
    assert (price.prompt, price.cached_prompt, price.completion) == (0.1, 0.02, 0.4)
    assert (free.prompt, free.cached_prompt, free.completion) == (0.0, None, 0.0)
    assert config.cost.in_usage
    assert (config.failover.attempts, config.failover.budget_s, config.failover.statuses) == (1, 0.5, ())
    timeouts = config.timeouts
    assert [getattr(timeouts, name) for name in timeouts.__struct_fields__] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0]
    limits = config.limits
    assert [getattr(limits, name) for name in limits.__struct_fields__] == [1, 2, 3, 4]
    health = config.health
    assert (health.path, health.interval_s, health.failures, health.successes) == ("/ping?deep=1", 0.0, 1, 4)
    assert config.log.format == "off"


def test_the_defaults_are_those_of_the_interface(read: Callable[[str], Config]) -> None:
    read(POOL)  # the smallest file
    written = tomllib.loads("""
        [listen]
        addresses = ["127.0.0.1:8080"]
        [admin]
        address = "127.0.0.1:8081"
        allow_remote = false
        [daemon]
        workers = "auto"
        drain_s = 30.0
        ready_delay_s = 0.0
        [stream]
        max_frame_bytes = 1048576
        force_stream = false
        max_answer_bytes = 67108864
        include_usage = "as-asked"
        keepalive_comment_s = 0.0
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
        prefill_s = 300.0
        first_token_s = 600.0
        between_tokens_s = 120.0
        total_s = 0.0
        upstream_idle_s = 4.0
        [limits]
        max_head_bytes = 65536
        max_body_bytes = 67108864
        max_connections = 20000
        max_buffered_bytes = 1073741824
        [health]
        path = "/health"
        interval_s = 5.0
        failures = 3
        successes = 2
        [auth]
        keys_file = ""
        routes = ["/v1/*"]
        limits = {}
        upstream_key_file = ""
        [cost]
        in_usage = false
        [log]
        format = "json"
    """)

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Address) else value

    config = Config()
    assert written == {
        table: {
            name: plain(value)
            for name in getattr(config, table).__struct_fields__
            if (value := getattr(getattr(config, table), name)) is not None  # TOML has no word for it
        }
        for table in Config.__struct_fields__
        if table not in {"pools", "prices"}
    }
    assert (config.pools, config.prices) == ((), {})


def test_the_defaults_of_a_pool_and_its_engines_are_those_of_the_interface(read: Callable[[str], Config]) -> None:
    (pool,) = read(POOL).pools
    values = {name: getattr(pool, name) for name in pool.__struct_fields__ if name != "upstreams"}
    assert values == {
        "name": "default", "models": (), "balance": "least_outstanding", "max_in_flight": 0, "max_queue": 0,
        "session_header": "X-Session-Id", "prefill": (), "decode": (), "connector": "nixl", "on_missing_kv": "decode",
        "drain_kv": True, "cached_tokens_from": "prefill", "callback_address": "", "force_stream": None,
        "include_usage": None, "keepalive_comment_s": None,
    }  # fmt: skip
    (upstream,) = pool.upstreams
    assert (upstream.weight, upstream.max_in_flight) == (1, 0)


@pytest.mark.parametrize(
    "name",
    ["least_outstanding", "round_robin", "random", "power_of_two", "session_affinity", "prefix_affinity"],
)
def test_every_policy_has_its_name(name: str, read: Callable[[str], Config]) -> None:
    (pool,) = read(f"{POOL}balance = '{name}'").pools
    assert pool.balance == name
    assert name in POLICIES


def test_every_setting_says_what_is_allowed() -> None:
    """Where a value is wrong, its type's description is what the line about it ends with."""

    def check(setting: Any, key: str) -> None:
        if isinstance(setting, type) and issubclass(setting, msgspec.Struct):
            for field in msgspec.structs.fields(setting):
                check(field.type, f"{key}.{field.encode_name}")
        elif get_origin(setting) is tuple:
            check(get_args(setting)[0], key)
        else:
            meta = getattr(setting, "__metadata__", ())
            assert meta, key
            assert meta[0].description, key

    check(Config, "")
    check(UpstreamTable, "upstream")


def test_admin_can_be_off(read: Callable[[str], Config]) -> None:
    assert read(POOL + '[admin]\naddress = "off"').admin.address is None


def test_all_problems_are_reported_each_on_its_line(problems: Callable[[str], list[str]]) -> None:
    assert problems("""
        bogus = 1
        [listen]
        addresses = ["8080", "127.0.0.1:8080", 3]
        [daemon]
        workers = 0
        drain_s = "3"
        "a b\\n" = 1
        [[pool]]
        upstreams = ["ftp://10.0.0.1:8000", { url = "http://10.0.0.2:8000/v1", weight = 2, wait = 1 }, {}]
        balance = "fastest"
        [[pool]]
        upstreams = [{ url = "http://a:1", weight = 0 }, { url = "dns+unix:/a" }]
        max_queue = -1
        max_in_flight = "10"
        session_header = "X Session"
        [[pool]]
        [health]
        path = "health"
        interval_s = -1
        failures = 0
        [timeouts]
        conect_s = 3
        [failover]
        statuses = [200, 503]
        [limits]
        max_buffered_bytes = 1
    """) == [
        "bogus: is not a known name; allowed: listen, admin, daemon, pool, stream, failover, timeouts, limits, "
        "health, auth, prices, cost, log",
        'listen.addresses[0]: "8080" has no host; write 127.0.0.1:8080, or 0.0.0.0:8080 for every interface',
        "listen.addresses[2]: 3 is not valid; allowed: HOST:PORT, [::1]:PORT or unix:/path",
        'daemon.workers: 0 is not valid; allowed: "auto" or a whole number, 1 to 1024',
        'daemon.drain_s: "3" is not valid; allowed: seconds, 0 or more (0: none at all)',
        'daemon."a b\\n": is not a known name; allowed: workers, drain_s, ready_delay_s',
        'pool[0].upstreams[0]: "ftp://10.0.0.1:8000" is not an engine\'s URL; '
        "allowed: http(s)://HOST:PORT, dns+http(s)://NAME:PORT or unix:/path",
        'pool[0].upstreams[1].url: "http://10.0.0.2:8000/v1" has a path, and requests keep their own; '
        "write http://10.0.0.2:8000 without /v1",
        "pool[0].upstreams[1].wait: is not a known name; perhaps weight is meant; allowed: url, weight, max_in_flight, "
        "ca, server_name, kv_address, bootstrap, bootstrap_port",
        'pool[0].upstreams[2]: has no url; allowed: { url = "http://HOST:PORT" }',
        'pool[0].balance: "fastest" is not valid; allowed: "least_outstanding", "round_robin", "random", '
        '"power_of_two", "session_affinity" or "prefix_affinity"',
        "pool[1].upstreams[0].weight: 0 is not valid; allowed: a whole number, 1 to 1000",
        'pool[1].upstreams[1].url: "dns+unix:/a" has no name to resolve; allowed: dns+http(s)://NAME:PORT',
        "pool[1].max_queue: -1 is not valid; allowed: a whole number, 0 or more (0: none)",
        'pool[1].max_in_flight: "10" is not valid; allowed: a whole number, 0 or more (0: no limit)',
        'pool[1].session_header: "X Session" is not valid; allowed: the name of a header field',
        'health.path: "health" is not valid; allowed: a path, beginning with /',
        "health.interval_s: -1 is not valid; allowed: seconds, 0 or more (0: none at all)",
        "health.failures: 0 is not valid; allowed: a whole number, at least 1",
        "timeouts.conect_s: is not a known name; perhaps connect_s is meant; allowed: client_head_s, client_body_s, "
        "client_idle_s, client_stall_s, queue_s, connect_s, prefill_s, first_token_s, between_tokens_s, total_s, "
        "upstream_idle_s",
        "failover.statuses[0]: 200 is not valid; allowed: an HTTP error status, 400 to 599",
        "limits.max_buffered_bytes: has no room for max_body_bytes; allowed: 67108864 or more",
    ]


@pytest.mark.parametrize("name", ["ca", "server_name"])
def test_what_only_https_can_use(name: str, problems: Callable[[str], list[str]]) -> None:
    text = f"[[pool]]\nupstreams = [{{ url = 'http://a:1', {name} = 'x' }}]"
    assert problems(text) == [f"pool[0].upstreams[0].{name}: is of no use to http://a:1; allowed: with https://"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "{} is not valid; allowed: { cert = …, key = … }, both files in PEM"),
        ("{ cert = 'c' }", '{"cert": "c"} is not valid; allowed: { cert = …, key = … }, both files in PEM'),
        ("true", "true is not valid; allowed: { cert = …, key = … }, both files in PEM"),
        ("{ cert = 'c', key = 'k', chain = 'x' }", None),
    ],
)
def test_half_a_certificate_is_refused(text: str, said: str | None, problems: Callable[[str], list[str]]) -> None:
    """Whoever writes ``listen.tls`` must not get plain text."""
    found = problems(f"{POOL}\n[listen]\ntls = {text}")
    assert found == [f"listen.tls: {said}" if said else "listen.tls.chain: is not a known name; allowed: cert, key"]


def test_engines_behind_tls(read: Callable[[str], Config]) -> None:
    config = read("""
        [[pool]]
        upstreams = ["HTTPS://A", { url = "dns+https://engines.local:8443", ca = "/ca.pem" },
                     { url = "https://10.0.0.1:8443", server_name = "a.example" }]
    """)
    first, second, third = config.pools[0].upstreams
    assert (first.url, first.authority, first.verified_name) == ("https://a:443", "a", "a")
    found = second.at("10.0.0.7")
    assert (found.url, found.is_tls, found.ca) == ("https://10.0.0.7:8443", True, "/ca.pem")
    assert (found.verified_name, found.authority) == ("engines.local", "engines.local:8443")
    assert third.verified_name == "a.example"


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
        ("admin", "allow_remote = 1"),
        ("health", 'path = ""'),
        ("health", 'path = "/a b"'),
        ("health", 'path = "/é"'),
        ("health", "interval_s = inf"),
        ("health", "failures = 1.5"),
        ("health", "successes = 0"),
        ("timeouts", "prefill_s = -1"),
        ("stream", "force_stream = 1"),
        ("stream", "max_answer_bytes = 0"),
        ("stream", 'include_usage = "never"'),
        ("auth", "keys_file = 1"),
        ("auth", 'routes = "/v1/*"'),
        ("cost", "in_usage = 1"),
    ],
)
def test_a_value_out_of_range(table: str, setting: str, problems: Callable[[str], list[str]]) -> None:
    name = setting.partition(" = ")[0]
    (line,) = problems(f"{POOL}[{table}]\n{setting}")
    assert line.startswith(f"{table}.{name}: ")
    assert "is not valid; allowed: " in line


@pytest.mark.parametrize(
    "setting",
    [
        "name = ''", "name = 'a b'", "models = 'm'", "models = ['a b']", "balance = 'round-robin'", "balance = 1",
        "max_in_flight = -1", "max_in_flight = 1.5", "max_in_flight = true", "max_queue = '1'", "session_header = ''",
        "session_header = 'a:'", "connector = 'vllm'", "on_missing_kv = 'wait'", "drain_kv = 1",
        "callback_address = 'here'", "prefill = 'http://a:1'", "force_stream = 'yes'", "include_usage = true",
    ],
)  # fmt: skip
def test_a_pools_value_out_of_range(setting: str, problems: Callable[[str], list[str]]) -> None:
    name = setting.partition(" = ")[0]
    (line,) = problems(f"{POOL}{setting}")
    assert line.startswith(f"pool[0].{name}")
    assert "is not valid; allowed: " in line


@pytest.mark.parametrize(
    "setting",
    ["weight = 0", "weight = 1001", "weight = 1.5", "weight = true", "max_in_flight = -1", "bootstrap_port = 70000"],
)
def test_an_engines_value_out_of_range(setting: str, problems: Callable[[str], list[str]]) -> None:
    name = setting.partition(" = ")[0]
    (line,) = problems(f"[[pool]]\nupstreams = [{{ url = 'http://a:1', {setting} }}]")
    assert line.startswith(f"pool[0].upstreams[0].{name}: ")
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
        ("[[pool]]\nupstreams = ['dns+http://localhost:8080']", "pool[0].upstreams[0]", "is this relay itself"),
        (POOL + "[[pool]]\nname = 'x'\nmodels = ['m']", "pool[1].upstreams", "no upstream"),
        (
            POOL + "[[pool]]\nname = 'x'\nmodels = ['m']\nupstreams = ['http://127.0.0.1:8081']",
            "pool[1].upstreams[0]",
            "is this relay itself (admin.address)",
        ),
        (
            POOL + "[[pool]]\nmodels = ['m']\nupstreams = ['http://a:1']",
            "pool[1].name",
            '"default" is pool[0]\'s too; allowed: another name',
        ),
        (
            POOL + "[[pool]]\nname = 'x'\nupstreams = ['http://a:1']",
            "pool[1].models",
            "is empty, and pool[0]'s is; allowed: one pool for every model not claimed by another",
        ),
        (
            POOL + "models = ['a', 'b*']\n[[pool]]\nname = 'x'\nmodels = ['c', 'b*']\nupstreams = ['http://a:1']",
            "pool[1].models",
            '"b*" is pool[0]\'s too; allowed: one of both',
        ),
        (
            POOL + "max_queue = 1",
            "pool[0].max_queue",
            "nothing ever waits without a max_in_flight, of the pool or of all its upstreams",
        ),
        (
            "[[pool]]\nupstreams = [{ url = 'http://a:1', max_in_flight = 1 }, 'http://b:1']\nmax_queue = 1",
            "pool[0].max_queue",
            "nothing ever waits",
        ),
        *[
            (POOL + f"[admin]\naddress = '{address}'", "admin.address", f"{address} can be reached from other machines")
            for address in ("0.0.0.0:8081", "10.0.0.1:8081", "[::]:8081", "example.org:8081")
        ],
        ("[[pool]]\nprefill = ['http://a:1']", "pool[0].decode", "is empty; a split pool has"),
        ("[[pool]]\ndecode = ['http://a:1']", "pool[0].prefill", "is empty; a split pool has"),
        ("[[pool]]\nprefill = ['http://a:1', 'http://a:1']\ndecode = ['http://a:1']", "pool[0].prefill[1]", "twice"),
        (POOL + "prefill = ['http://a:1']\ndecode = ['http://b:1']", "pool[0].upstreams", "beside prefill and decode"),
        (
            "[[pool]]\nprefill = ['http://a:1']\ndecode = ['http://127.0.0.1:8080']",
            "pool[0].decode[0]",
            "is this relay itself",
        ),
        (
            POOL + '[auth.limits."*"]\nmax_in_flight = 8',
            "auth.limits",
            "there are no keys to limit; allowed: with auth.",
        ),
        (
            POOL + '[auth]\nkeys_file = "k"\n[auth.limits."a*"]\nrequests_per_minute = 60000',
            'auth.limits."a*".requests_per_minute',
            "60000 is not valid; allowed: a whole number, 0 to 50000 (0: no limit)",
        ),
        (POOL + '[auth]\nkeys_file = "k"\n[auth.limits.a]\nrpm = 1', "auth.limits.a.rpm", "is not a known name"),
        (POOL + "[cost]\nin_usage = true", "cost.in_usage", 'allowed: false, or a table [prices."MODEL"]'),
        (POOL + "[limits]\nmax_buffered_bytes = 1000", "limits.max_buffered_bytes", "allowed: 67108864 or more"),
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
    read(POOL + "models = ['a', 'b*']\n[[pool]]\nname = 'x'\nmodels = ['b']\nupstreams = ['http://10.0.0.1:8000']")
    read(POOL + "max_queue = 1\nmax_in_flight = 1")
    read("[[pool]]\nupstreams = [{ url = 'http://a:1', max_in_flight = 1 }]\nmax_queue = 1")
    read(POOL + "[admin]\naddress = '0.0.0.0:8081'\nallow_remote = true")
    for address in ("127.0.0.2:8081", "[::1]:8081", "localhost:8081", "unix:/run/admin"):
        read(f"{POOL}[admin]\naddress = '{address}'")


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


def test_an_engine_at_each_address_of_a_name() -> None:
    named = parse_upstream("DNS+http://Engines.Local:8000")
    assert (named.url, named.is_dns, named.host) == ("dns+http://engines.local:8000", True, "engines.local")
    assert parse_upstream(named.url) == named
    for ip, url in (("10.0.0.1", "http://10.0.0.1:8000"), ("fd00::1", "http://[fd00::1]:8000")):
        engine = named.at(ip)
        assert (engine.url, engine.host, engine.port, engine.is_dns) == (url, ip, 8000, False)
        assert engine.authority == "engines.local:8000"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("drain_s = 3\n", "drain_s: is not a known name; drain_s stands in [daemon]; allowed: listen, "),
        ("[listen]\naddress = '127.0.0.1:1'\n", "listen.address: is not a known name; perhaps addresses is meant; "),
        ("upstreams = ['http://a:1']\n", "upstreams: is not a known name; upstreams stands in [[pool]]; allowed: "),
        ("[timeouts]\nforce_stream = true\n", "timeouts.force_stream: is not a known name; force_stream stands in "
         "[[pool]] and [stream]; allowed: client_head_s, "),
    ],
)  # fmt: skip
def test_a_key_in_the_wrong_table_is_told_where_it_stands(
    text: str, said: str, problems: Callable[[str], list[str]]
) -> None:
    lines = problems(text)
    assert lines[0].startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dns+unix:/a", "has no name to resolve"),
        ("dns+dns+http://a:1", "has no name to resolve"),
        ("dns+a:1", "is not an engine's URL"),
        ("dns+http://a:0", "has port 0"),
        ("https://a:0", "has port 0"),
        ("https:/a:1", "is not an engine's URL"),
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
        *[
            (text, "is more than one engine; repeat the flag, once for each engine, or in the file give each a string")
            for text in (
                "http://a:8000,http://b:8001",
                "http://a/, HTTPS://b",
                "unix:/a,unix:/b",
                "dns+http://a:1,dns+http://b:1",
                "http://a:1,b:1",
                "http://[::1]:1/,[::2]:1",
            )
        ],
        ("http://a,b:1", "has no valid host"),
    ],
)
def test_what_is_no_upstream(text: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_upstream(text)
    assert said in str(caught.value)


def test_a_sockets_path_may_have_commas() -> None:
    assert parse_upstream("unix:/run/a:80,b").unix_path == "/run/a:80,b"


@pytest.mark.parametrize("url", ["http://me:secret@a:1", "http://a:1,http://me:secret@b:1"])
def test_a_password_is_not_repeated(url: str, problems: Callable[[str], list[str]]) -> None:
    (line,) = problems(f"[[pool]]\nupstreams = ['{url}']")
    assert "secret" not in line
