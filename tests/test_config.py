"""Every source of a setting, their precedence, and what a mistake in each of them says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.config import (
    SHORT_VARIABLES,
    Buckets,
    Config,
    Setting,
    Size,
    api_keys,
    format_size,
    is_loopback,
    load,
    parse_size,
    settings,
    shown,
    upstream_key,
)
from anaphora.errors import ConfigError
from anaphora.types import Owner, Tenant

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _an_empty_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(text: str) -> Path:
    path = Path("anaphora.toml").absolute()
    path.write_text(text)
    return path


def complaint(text: str, environ: dict[str, str] | None = None) -> str:
    """What `load` says about a file with this text."""
    with pytest.raises(ConfigError) as caught:
        load(written(text), environ=environ or {})
    return str(caught.value)


# -- precedence --------------------------------------------------------------------------------------------------------


def test_without_any_source_the_defaults_hold() -> None:
    loaded = load(environ={})
    assert loaded.config == Config()
    assert set(loaded.sources.values()) == {"default"}


def test_a_flag_beats_the_environment_which_beats_the_file() -> None:
    file = written('[server]\nhost = "127.0.0.2"\nport = 1\nworkers = 2')
    environ = {"ANAPHORA_PORT": "3", "ANAPHORA_WORKERS": "4"}
    loaded = load(file, {"server.workers": "5"}, environ)
    assert (loaded.config.server.host, loaded.config.server.port, loaded.config.server.workers) == ("127.0.0.2", 3, 5)
    assert loaded.sources["server.host"] == f"file {file}"
    assert loaded.sources["server.port"] == "environment ANAPHORA_PORT"
    assert loaded.sources["server.workers"] == "flag --workers"
    assert loaded.sources["engine.model"] == "default"


@pytest.mark.parametrize(("path", "short"), SHORT_VARIABLES.items())
def test_a_short_variable_means_the_same_as_the_long_one(path: str, short: str) -> None:
    value = {
        "server.port": "9",
        "server.workers": "9",
        "engine.kv_memory": "9KiB",
        "engine.kv_disk": "9KiB",
        "engine.dtype": "float32",
        "engine.quantization": "int8",
        "cache.shared": "redis://localhost",
        "gateway.upstreams": "openai=http://localhost",
        "gateway.optimiser": "advise",
        "semantic.mode": "shadow",
    }.get(path, "localhost")
    long = "ANAPHORA_" + path.replace(".", "_").upper()
    assert load(environ={short: value}).config == load(environ={long: value}).config != Config()


def test_the_two_names_of_one_variable_must_not_disagree() -> None:
    load(environ={"ANAPHORA_PORT": "9", "ANAPHORA_SERVER_PORT": "9"})
    with pytest.raises(ConfigError, match="ANAPHORA_PORT and ANAPHORA_SERVER_PORT"):
        load(environ={"ANAPHORA_PORT": "9", "ANAPHORA_SERVER_PORT": "8"})


def test_a_file_in_the_working_directory_is_found() -> None:
    written("[server]\nport = 9")
    assert load(environ={}).config.server.port == 9


def test_a_named_file_is_read_instead_of_the_one_in_the_working_directory(tmp_path: Path) -> None:
    written("[server]\nport = 9")
    other = tmp_path / "other.toml"
    other.write_text("[server]\nport = 10")
    assert load(environ={"ANAPHORA_CONFIG": str(other)}).config.server.port == 10
    assert load("anaphora.toml", environ={"ANAPHORA_CONFIG": str(other)}).config.server.port == 9


def test_a_named_file_that_is_missing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml cannot be read"):
        load("nowhere.toml", environ={})


# -- values ------------------------------------------------------------------------------------------------------------


def test_text_from_the_environment_becomes_the_type_of_the_setting() -> None:
    environ = {
        "ANAPHORA_CACHE_ENABLED": "false",
        "ANAPHORA_CACHE_TTL_S": "1.5",
        "ANAPHORA_CACHE_RAM": "1MB",
        "ANAPHORA_CACHE_DIR": "~/here",
        "ANAPHORA_CACHE_SAMPLED": "buckets=4",
        "ANAPHORA_ENGINE_ALIASES": "gpt-4o, claude-sonnet-5",
        "ANAPHORA_PROFILE": "claude-opus-5-5, gpt-5.6-sol",
        "ANAPHORA_SERVER_KEYS": "acme=sk-1,other=sk-2",
    }
    config = load(environ=environ).config
    assert config.cache.enabled is False
    assert config.cache.ttl_s == 1.5
    assert config.cache.ram == 1_000_000
    assert config.cache.dir == str(Path("~/here").expanduser())
    assert config.cache.sampled == Buckets(4)
    assert config.engine.aliases == ("gpt-4o", "claude-sonnet-5")
    assert config.engine.profile == ("claude-opus-5-5", "gpt-5.6-sol")
    assert api_keys(config, {}) == {"sk-1": Owner(Tenant("acme")), "sk-2": Owner(Tenant("other"))}


def test_the_file_says_the_same_in_toml() -> None:
    file = written("""
        [server]
        max_body = "1MiB"
        [[server.keys]]
        tenant = "acme"
        workspace = "research"
        key = "sk-1"
        [[server.keys]]
        tenant = "other"
        key_env = "OTHER_KEY"
        [engine]
        aliases = ["gpt-4o"]
        profile = "claude-opus-5-5"
        [cache]
        sampled = { buckets = 4 }
        disk = 0
    """)
    config = load(file, environ={"OTHER_KEY": "sk-2"}).config
    assert config.server.max_body == 1 << 20
    assert config.cache.sampled == Buckets(4)
    assert config.cache.disk == 0
    owners = {"sk-1": Owner(Tenant("acme"), "research"), "sk-2": Owner(Tenant("other"))}
    assert api_keys(config, {"OTHER_KEY": "sk-2"}) == owners
    assert config.engine.profile == "claude-opus-5-5"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1024", 1024),
        ("2GiB", 2 << 30),
        ("500MB", 500_000_000),
        ("1.5 GiB", 3 << 29),
        ("4k", 4096),
        ("7 B", 7),
        ("1tib", 1 << 40),
    ],
)
def test_a_size_is_read_with_its_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 pound", "1e3", "1GiBB", "0x10"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size"):
        parse_size(text)


@given(st.integers(min_value=0, max_value=1 << 50))
def test_a_size_that_is_shown_reads_back_as_itself(size: int) -> None:
    assert parse_size(format_size(size)) == size


def test_a_configuration_survives_a_round_trip_through_json() -> None:
    config = load(environ={"ANAPHORA_CACHE_SAMPLED": "buckets=4", "ANAPHORA_SERVER_KEYS": "a=b"}).config
    assert msgspec.json.decode(msgspec.json.encode(config), type=Config) == config


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[server]\nprot = 1", "unknown key server.prot; did you mean server.port?"),
        ("[server]\nkv_memory = 1", "unknown key server.kv_memory; did you mean engine.kv_memory?"),
        ("[enigne]\nmodel = 'x'", "unknown key enigne; did you mean engine?"),
        ("port = 1", "unknown key port; did you mean server.port?"),
        ("prot = 1", "unknown key prot; did you mean server.port?"),
        ("[server]\nzzzzzzzz = 1", "unknown key server.zzzzzzzz"),
        ("[[server.keys]]\ntenat = 'a'", "unknown key server.keys[0].tenat (from file {file}); did you mean tenant?"),
        ("[cache]\nsampled = { bucket = 4 }", "unknown key cache.sampled.bucket (from file {file}); did you mean buckets?"),
    ],
)
def test_an_unknown_key_is_named_with_its_nearest_right_spelling(text: str, expected: str) -> None:
    said = complaint(text)
    assert said.endswith(expected.format(file=Path("anaphora.toml").absolute()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[server]\nport = '8080'", "server.port: expected int, got str"),
        ("[server]\nport = 65536", "server.port: expected int <= 65535"),
        ("[server]\nworkers = 0", "server.workers: expected int >= 1"),
        ("[cache]\nenabled = 1", "cache.enabled: expected bool, got int"),
        ("[cache]\nsampled = 'often'", "cache.sampled: expected one of reuse, never, got 'often'"),
        ("[engine]\ndtype = 'float16'", "engine.dtype: expected one of auto, bfloat16, float32, got 'float16'"),
        ("[engine]\nkv_memory = '2 pounds'", "engine.kv_memory: expected a size such as 512MiB or 2GiB, got '2 pounds'"),
        ("[engine]\nkv_memory = -1", "engine.kv_memory: expected int >= 0"),
        ("[engine]\naliases = ['a', '']", "engine.aliases[1]: expected str of length >= 1"),
        ("[[server.keys]]\nkey = 'a'", "server.keys[0]: object missing required field tenant"),
        ("server = 1", "server must be a table"),
        ("[server", "is not valid TOML"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(text: str, expected: str) -> None:
    assert expected in complaint(text)


def test_a_wrong_value_says_where_it_came_from() -> None:
    with pytest.raises(ConfigError, match=r"server\.port: expected int, got str \(from flag --port\)"):
        load(flags={"server.port": "http"}, environ={})
    with pytest.raises(ConfigError, match=r"\(from environment ANAPHORA_PORT\)"):
        load(environ={"ANAPHORA_PORT": "http"})


def test_an_unknown_variable_is_a_warning_with_the_nearest_right_spelling() -> None:
    loaded = load(environ={"ANAPHORA_PROT": "1", "ANAPHORA_DATA": "/x", "ANAPHORA_ZZZZZZZZZZZ": "1", "OTHER": "1"})
    assert loaded.warnings == (
        "unknown environment variable ANAPHORA_PROT; did you mean ANAPHORA_PORT?",
        "unknown environment variable ANAPHORA_ZZZZZZZZZZZ",
    )


# -- API keys ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org"])
def test_without_api_keys_only_loopback_may_be_listened_on(host: str) -> None:
    with pytest.raises(ConfigError, match="only a loopback address"):
        load(flags={"server.host": host}, environ={})
    assert load(flags={"server.host": host}, environ={"ANAPHORA_SERVER_KEYS": "a=b"}).config.server.host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_loopback_is_known_in_all_its_forms(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("tenant = 'a'", "exactly one of key and key_env"),
        ("tenant = 'a'\nkey = 'x'\nkey_env = 'X'", "exactly one of key and key_env"),
        ("tenant = 'a'\nkey_env = 'X'", "the environment variable X is not set"),
        (
            "tenant = 'a'\nkey = 'x'\n[[server.keys]]\ntenant = 'b'\nkey = 'x'",
            "server.keys[1]: the same key is configured twice",
        ),
    ],
)
def test_a_key_that_cannot_be_used_is_an_error(entry: str, expected: str) -> None:
    assert expected in complaint(f"[[server.keys]]\n{entry}")


def test_secrets_are_not_shown() -> None:
    loaded = load(environ={"ANAPHORA_SERVER_KEYS": "acme=sk-secret"})
    assert "sk-secret" not in str(shown(loaded))
    assert "acme" in str(shown(loaded))


def test_a_variable_that_holds_a_key_is_not_taken_for_a_misspelling() -> None:
    file = written("[[server.keys]]\ntenant = 'a'\nkey_env = 'ANAPHORA_ACME_KEY'")
    assert load(file, environ={"ANAPHORA_ACME_KEY": "x"}).warnings == ()


# -- documentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", settings(), ids=lambda setting: setting.path)
def test_every_setting_is_documented_with_its_default_and_its_variables(setting: Setting) -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    row = next((line for line in text.splitlines() if line.startswith(f"| `{setting.path}` ")), "")
    assert row, f"docs/configuration.md has no row for {setting.path}"
    for variable in setting.variables:
        assert f"`{variable}`" in row
    if setting.path != "cache.dir":
        assert f"`{_as_documented(setting)}`" in row


def _as_documented(setting: Setting) -> str:
    if setting.type == Size:
        return f'"{format_size(setting.default)}"'
    return msgspec.json.encode(setting.default).decode()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("rediss://user:pa@ss/word@host", "rediss://user:(hidden)@host"),
        ("redis+cluster://:word@host:7000", "redis+cluster://:(hidden)@host:7000"),
        ("unix:///run/socket?db=1&password=word", "unix:///run/socket?db=1&password=(hidden)"),
    ],
)
def test_the_password_of_the_shared_server_is_hidden(url: str, told: str) -> None:
    loaded = load(environ={"ANAPHORA_SHARED": url})
    assert loaded.config.cache.shared == url
    assert shown(loaded)["cache.shared"]["value"] == told


def test_an_address_of_the_shared_server_must_look_like_one() -> None:
    with pytest.raises(ConfigError, match=r"^cache\.shared: ") as failure:
        load(environ={"ANAPHORA_SHARED": "http://user:word@host"})
    assert "word" not in str(failure.value)


# -- upstreams and routes ------------------------------------------------------------------------------------------------

UPSTREAM = '[[gateway.upstreams]]\nname = "one"\nbase_url = "https://api.example.com"\n'


def test_upstreams_and_routes_are_read_with_all_they_say() -> None:
    text = UPSTREAM + 'dialect = "anthropic"\nmodels = ["claude-*"]\nrename = {a = "b"}\nretries = 0\nfirst_s = 1.5\n'
    text += '[[gateway.routes]]\nmodels = ["claude-opus-*"]\nupstreams = ["one"]\nfallbacks = ["one:claude-haiku"]\n'
    gateway = load(written(text), environ={}).config.gateway
    [upstream], [route] = gateway.upstreams, gateway.routes
    assert (upstream.name, upstream.dialect, upstream.models, upstream.rename) == (
        "one",
        "anthropic",
        ("claude-*",),
        {"a": "b"},
    )
    assert (upstream.retries, upstream.first_s) == (0, 1.5)
    assert (route.models, route.upstreams, route.fallbacks) == (("claude-opus-*",), ("one",), ("one:claude-haiku",))


def test_with_upstreams_there_is_no_engine_unless_one_is_asked_for() -> None:
    loaded = load(written(UPSTREAM), environ={})
    assert (loaded.config.engine.kind, loaded.sources["engine.kind"]) == ("none", "default with upstreams")
    for asked in ('model = "smollm2"', 'kind = "echo"'):
        assert load(written(f"{UPSTREAM}[engine]\n{asked}\n"), environ={}).config.engine.kind != "none"
    with pytest.raises(ConfigError, match="without an engine there must be upstreams"):
        load(written('[engine]\nkind = "none"'), environ={})


def test_a_well_known_upstream_in_the_environment_needs_no_more_than_its_address() -> None:
    environ = {"ANAPHORA_UPSTREAMS": "anthropic=https://api.anthropic.com, local=http://localhost:8000/v1"}
    one, other = load(environ=environ).config.gateway.upstreams
    assert (one.name, one.dialect, one.models) == ("anthropic", "anthropic", ("claude-*",))
    assert (other.name, other.dialect, other.models) == ("local", "openai", ("*",))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('base_ulr = "x"', "gateway.upstreams[0].base_ulr (from file"),
        ('dialect = "gemini"', "gateway.upstreams[0].dialect"),
        ("first_s = 0", "gateway.upstreams[0].first_s"),
        ("retries = -1", "gateway.upstreams[0].retries"),
        ('apis = ["messages"]', "gateway.upstreams[0].apis: messages is not one of the dialect openai"),
        ('dialect = "anthropic"\napis = ["chat"]', "gateway.upstreams[0].apis: chat is not one of the dialect anthropic"),
        ('key_env = "NOT_THERE"', "gateway.upstreams: one: the environment variable NOT_THERE is not set"),
        ('key_file = "nowhere"', "gateway.upstreams: one: key_file cannot be read"),
        ('key_env = "A"\nkey_file = "B"', "gateway.upstreams: one: set at most one of key_env and key_file"),
    ],
)
def test_a_wrong_upstream_is_named_with_what_is_wrong(lines: str, words: str) -> None:
    assert words in complaint(f"{UPSTREAM}{lines}\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[[gateway.upstreams]]\nname = "one"\n', "base_url"),
        ('[[gateway.upstreams]]\nname = "one"\nbase_url = "api.example.com"\n', "gateway.upstreams[0].base_url: an address"),
        ('[[gateway.upstreams]]\nname = "o ne"\nbase_url = "http://x"\n', "gateway.upstreams[0].name: letters"),
        (UPSTREAM + UPSTREAM, "gateway.upstreams[1].name: one is there twice"),
        (UPSTREAM + "[gateway]\nbreaker_failures = 0\n", "gateway.breaker_failures: expected"),
    ],
)
def test_upstreams_have_a_name_of_their_own_and_an_address(text: str, words: str) -> None:
    assert words in complaint(text)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('upstreams = ["onne"]', "gateway.routes[0]: there is no upstream onne; did you mean one?"),
        ('upstreams = ["one"]\nfallbacks = ["two:m"]', "gateway.routes[0]: there is no upstream two"),
        ("upstreams = []", "gateway.routes[0].upstreams: name at least one"),
        ('upstreams = ["one"]\nfallback = ["one"]', "did you mean fallbacks?"),
    ],
)
def test_a_wrong_route_is_named_with_what_is_wrong(lines: str, words: str) -> None:
    assert words in complaint(f'{UPSTREAM}[[gateway.routes]]\nmodels = ["m"]\n{lines}\n')


def test_a_key_comes_from_the_environment_or_a_file_and_is_never_shown() -> None:
    Path("key").write_text("from the file\n")
    text = f'{UPSTREAM}key_file = "key"\n[[gateway.upstreams]]\nname = "two"\nbase_url = "http://x"\nkey_env = "SECRET"\n'
    environ = {"SECRET": "from the environment"}
    loaded = load(written(text), environ=environ)
    one, two = loaded.config.gateway.upstreams
    assert (upstream_key(one, environ), upstream_key(two, environ)) == ("from the file", "from the environment")
    assert "from the" not in str(shown(loaded)["gateway.upstreams"])
    Path("key").write_text(" \n")
    with pytest.raises(ConfigError, match="key is empty"):
        upstream_key(one, environ)


def test_headers_of_upstreams_are_hidden() -> None:
    file = written('[[gateway.upstreams]]\nname = "a"\nbase_url = "http://a"\nheaders = { x-key = "secret" }\n')
    loaded = load(file, environ={})
    assert "secret" not in str(shown(loaded))
    assert loaded.config.gateway.upstreams[0].headers == {"x-key": "secret"}
