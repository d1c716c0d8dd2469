from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import msgspec
import pytest
from redis.crc import key_slot

from anaphora.clock import ManualClock, SystemClock
from anaphora.errors import ConfigError, TierFailed
from anaphora.events import Damaged, Event, Failed
from anaphora.policies.lru import LRU
from anaphora.store import Store, StoreOptions
from anaphora.testing.tiers import make_entry, make_key
from anaphora.testing.valkey import ValkeyServer, valkey_cluster
from anaphora.tiers.base import ENTRY_OVERHEAD, EVERYTHING, Entry, Erasure
from anaphora.tiers.ram import RamOptions, RamTier
from anaphora.tiers.valkey import ValkeyOptions, ValkeyTier, scripts
from anaphora.types import Key, Scope, Tenant

MIB = 1 << 20
LARGE = Entry(bytes(range(256)) * 3000, 1.0)
PATIENT_S = 60.0


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(body)


def open_tier(url: str, capacity: int = 64 * MIB, **options: Any) -> ValkeyTier:
    # A machine that stands still for a second must not look like a server that does.
    patient = {"timeout_s": PATIENT_S, "connect_timeout_s": PATIENT_S, "poll_s": 0.02, "rest_s": 0.0, **options}
    return ValkeyTier(ValkeyOptions(url, capacity, **patient), clock=ManualClock())


def key_of(part: str) -> str:
    return "anaphora:{00}:" + part


def value_key(key: Key) -> bytes:
    return key_of("v:").encode() + key


def number(reply: bytes) -> int:
    return int(reply[1:].split(b"\r\n")[0])


def check_server(server: ValkeyServer, capacity: int) -> int:
    """Invariant 4, seen from outside: what is used is the sum of what lies there and fits. How many values lie there."""
    script = """
        local base, used, count = KEYS[1], 0, 0
        for _, key in ipairs(redis.call('KEYS', base .. 'v:*')) do
          used = used + redis.call('STRLEN', key) + tonumber(ARGV[1])
          count = count + 1
        end
        local index, order = redis.call('HLEN', base .. 'index'), redis.call('ZCARD', base .. 'order')
        local said = tonumber(redis.call('HGET', base .. 'state', 'used') or 0)
        if index ~= count or order ~= count or said ~= used then return {index, order, count, said, used} end
        return {count, used}
    """
    reply = server.command("EVAL", script, "1", key_of(""), str(ENTRY_OVERHEAD)).split(b"\r\n")
    assert reply[0] == b"*2", reply
    count, used = (int(word[1:]) for word in reply[1:3])
    assert used <= capacity
    return count


# -- what lies on the server -------------------------------------------------------------------------------------------


def test_hundreds_of_large_values_come_back_as_they_were(valkey: str) -> None:
    async def body() -> None:
        tier = open_tier(valkey, 512 * MIB)
        entries = {make_key(name): msgspec.structs.replace(LARGE, cost_s=float(name)) for name in range(100)}
        assert await tier.put_many(entries) == frozenset(entries)
        assert await tier.get_many(entries) == entries
        await tier.aclose()

    run(body())


def test_values_of_all_sizes_come_back_in_one_batch(valkey: str) -> None:
    """Large values are read another way than small ones, and either may begin in the other's last bytes."""

    async def body() -> None:
        tier = open_tier(valkey)
        sizes = [0, 1, 70_000, 3, 65_534, 65_535, 65_536, 65_537, 0, 2 * MIB, 10, 131_072, 1 * MIB, 65_536, 2, 3 * MIB]
        entries = {make_key(name): make_entry(size, fill=bytes([name])) for name, size in enumerate(sizes)}
        await tier.put_many(entries)
        assert await tier.get_many(entries) == entries
        many = [tier.get_many(list(entries)[name:]) for name in range(len(sizes))]
        for name, found in enumerate(await asyncio.gather(*many)):
            assert found == {make_key(later): entries[make_key(later)] for later in range(name, len(sizes))}
        await tier.aclose()

    run(body())


def test_used_bytes_are_what_lies_there_whoever_puts_deletes_and_forgets_at_once(
    valkey: str, valkey_server: ValkeyServer
) -> None:
    capacity = 20_000

    async def churn(seed: int) -> None:
        tier = open_tier(valkey, capacity)
        for step in range(40):
            names = [(seed * 31 + step * 7 + turn) % 23 for turn in range(4)]
            match (seed + step) % 8:
                case 0:
                    await tier.delete_many([make_key(name) for name in names])
                case 1:
                    await tier.forget(Scope(tenant=Tenant(str(step % 3))))
                case 2:
                    found = await tier.get_many([make_key(name) for name in names])
                    assert all(entry.value == b"%d" % name * 300 for name in names if (entry := found.get(make_key(name))))
                case _:
                    entries = {make_key(name): Entry(b"%d" % name * 300, 1.0, tenant=Tenant(str(name % 3))) for name in names}
                    await tier.put_many(entries)
        await tier.aclose()

    async def body() -> None:
        await asyncio.gather(*[churn(seed) for seed in range(4)])
        assert check_server(valkey_server, capacity) > 0

    run(body())


def test_an_entry_that_expires_leaves_the_server_and_the_index(valkey: str, valkey_server: ValkeyServer) -> None:
    async def body() -> None:
        tier = open_tier(valkey)
        clock = tier._clock
        assert isinstance(clock, ManualClock)
        await tier.put_many({make_key(1): make_entry(expires_at_s=clock.now_s() + 60), make_key(2): make_entry()})
        assert 0 < number(valkey_server.command("PTTL", value_key(make_key(1)))) <= 60_000
        assert number(valkey_server.command("PTTL", value_key(make_key(2)))) == -1
        clock.advance(60)
        assert (await tier.stats()).num_entries == check_server(valkey_server, 64 * MIB) == 1
        await tier.aclose()

    run(body())


def test_a_value_that_the_server_let_expire_is_a_plain_miss(valkey: str, valkey_server: ValkeyServer) -> None:
    async def body() -> None:
        tier = open_tier(valkey)
        await tier.put_many({make_key(1): make_entry(expires_at_s=tier._clock.now_s() + 60)})
        valkey_server.command("DEL", value_key(make_key(1)))
        assert await tier.get_many([make_key(1)]) == {}
        assert (await tier.stats()).num_damaged == 0
        await tier.aclose()

    run(body())


# -- damage ------------------------------------------------------------------------------------------------------------


def damage_one_bit(server: ValkeyServer) -> None:
    server.command("SETRANGE", value_key(make_key(1)), "50", "y")


def damage_truncate(server: ValkeyServer) -> None:
    server.command("SET", value_key(make_key(1)), "x" * 99)


def damage_lose(server: ValkeyServer) -> None:
    server.command("DEL", value_key(make_key(1)))


def damage_swap(server: ValkeyServer) -> None:
    server.command("COPY", value_key(make_key(2)), value_key(make_key(1)), "REPLACE")


def damage_swap_with_metadata(server: ValkeyServer) -> None:
    damage_swap(server)
    script = "redis.call('HSET', KEYS[1], ARGV[1], redis.call('HGET', KEYS[1], ARGV[2]))"
    server.command("EVAL", script, "1", key_of("index"), make_key(1), make_key(2))


def damage_foreign_type(server: ValkeyServer) -> None:
    server.command("DEL", value_key(make_key(1)))
    server.command("RPUSH", value_key(make_key(1)), "x")


def damage_metadata(server: ValkeyServer) -> None:
    server.command("HSET", key_of("index"), make_key(1), "\x01nonsense")


@pytest.mark.parametrize(
    "damage",
    [
        damage_one_bit,
        damage_truncate,
        damage_lose,
        damage_swap,
        damage_swap_with_metadata,
        damage_foreign_type,
        damage_metadata,
    ],
)
def test_a_damaged_entry_is_a_counted_miss_and_leaves(valkey: str, valkey_server: ValkeyServer, damage: Any) -> None:
    async def body() -> None:
        events: list[Event] = []
        tier = ValkeyTier(ValkeyOptions(valkey, MIB), clock=ManualClock(), emit=events.append)
        await tier.put_many({make_key(1): make_entry(), make_key(2): make_entry(fill=b"z")})
        damage(valkey_server)
        assert await tier.get_many([make_key(1), make_key(2)]) == {make_key(2): make_entry(fill=b"z")}
        assert events == [Damaged("valkey", 1)]
        stats = await tier.stats()
        assert (stats.num_entries, stats.num_damaged, stats.used_bytes) == (1, 1, 100 + ENTRY_OVERHEAD)
        assert check_server(valkey_server, MIB) == 1
        await tier.put_many({make_key(1): make_entry()})
        assert len(await tier.get_many([make_key(1), make_key(2)])) == 2
        await tier.aclose()

    run(body())


@pytest.mark.parametrize("part", ["index", "order", "expiry", "state", "index order", "index order expiry state log"])
@pytest.mark.parametrize("how", ["evicted", "overwritten"])
def test_a_lost_part_of_the_index_costs_entries_and_nothing_else(
    valkey: str, valkey_server: ValkeyServer, part: str, how: str
) -> None:
    """A server that is short of memory may evict any key, and anybody may write to one."""
    capacity = 10_000

    async def body() -> None:
        tier = open_tier(valkey, capacity)
        clock = tier._clock
        entries = {make_key(name): make_entry(1000, expires_at_s=clock.now_s() + 1000 + name) for name in range(6)}
        await tier.put_many(entries)
        for name in part.split():
            valkey_server.command("DEL", key_of(name))
            if how == "overwritten":
                valkey_server.command("SET", key_of(name), "mine")
        for _ in range(6):  # each part that holds something else is found once
            try:
                await tier.put_many({make_key(9): make_entry(10)})
                await tier.forget(Scope(tenant=Tenant("nobody")))
            except TierFailed:
                continue
        assert await tier.put_many({make_key(9): make_entry(10)}) == {make_key(9)}
        found = await tier.get_many([*entries, make_key(9)])
        assert make_key(9) in found
        assert all(found[key] == entries[key] for key in found if key in entries)
        assert check_server(valkey_server, capacity) == len(found) == (await tier.stats()).num_entries
        await tier.aclose()

    run(body())


def test_where_the_servers_memory_is_full_nothing_is_stored_and_nothing_left_behind(
    valkey: str, valkey_server: ValkeyServer
) -> None:
    async def body() -> None:
        tier = open_tier(valkey)
        await tier.put_many({make_key(1): make_entry()})
        used = int(valkey_server.command("INFO", "memory").split(b"used_memory:")[1].split(b"\r\n")[0])
        valkey_server.command("CONFIG", "SET", "maxmemory", str(used + 300_000))
        try:
            with pytest.raises(TierFailed, match="memory"):
                await asyncio.gather(*[tier.put_many({make_key(name): LARGE}) for name in range(8)])
        finally:
            valkey_server.command("CONFIG", "SET", "maxmemory", "0")
        check_server(valkey_server, 64 * MIB)
        assert await tier.put_many({make_key(2): LARGE}) == {make_key(2)}
        await tier.aclose()

    run(body())


# -- erasures ----------------------------------------------------------------------------------------------------------


async def until(condition: Any) -> None:
    async with asyncio.timeout(PATIENT_S):
        while not condition():  # noqa: ASYNC110  # what is waited for happens in another process
            await asyncio.sleep(0.005)


def test_a_process_hears_of_an_erasure_without_asking_for_anything(valkey: str) -> None:
    async def body() -> None:
        here, there = open_tier(valkey), open_tier(valkey)
        await here.put_many({make_key(1): make_entry()})
        assert make_key(1) in await there.get_many([make_key(1)])
        before = there.epoch()
        await here.forget(Scope(tenant=Tenant("a")))
        await until(lambda: there.epoch() != before)
        for tier in (here, there):
            await tier.aclose()

    run(body())


def test_the_first_answer_of_a_server_changes_no_epoch_unless_something_was_erased_since_we_began(valkey: str) -> None:
    async def body() -> None:
        clock = SystemClock()
        other = open_tier(valkey)
        await other.forget(EVERYTHING)
        # Its clock stands still: the time that a reply takes does not make it look older than the erasure.
        later = ValkeyTier(ValkeyOptions(valkey), clock=ManualClock())
        before = later.epoch()
        assert await later.put_many({make_key(1): make_entry()}, epoch=before) == {make_key(1)}
        assert later.epoch() == before

        early = ValkeyTier(ValkeyOptions(valkey), clock=clock)
        before = early.epoch()
        await other.forget(EVERYTHING)
        assert await early.put_many({make_key(1): make_entry()}, epoch=before) == frozenset()
        assert early.epoch() != before
        for tier in (other, early, later):
            await tier.aclose()

    run(body())


def test_erasures_are_told_to_whoever_was_away_and_everything_once_it_is_too_long_ago(
    valkey: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts, "ERASE", scripts.ERASE.replace(str(scripts.LOG_LENGTH), "4"))

    async def body() -> None:
        tier = open_tier(valkey)
        assert await tier.erasures(0) == (0, ())
        await tier.forget(Scope(tenant=Tenant("a")))
        first, told = await tier.erasures(0)
        assert set(told) == {Erasure(Scope(tenant=Tenant("a")))}
        await tier.delete_many([make_key(1)])
        second, told = await tier.erasures(first)
        assert set(told) == {Erasure(keys=(make_key(1),))}
        assert await tier.erasures(second) == (second, ())
        await tier.forget(Scope(tag="x"))
        assert set((await tier.erasures(second))[1]) == {Erasure(Scope(tag="x"))}
        assert set((await tier.erasures(0))[1]) == {Erasure(EVERYTHING)}
        await tier.aclose()

    run(body())


def test_a_restart_of_the_server_does_not_bring_an_old_epoch_back() -> None:
    async def body() -> None:
        with ValkeyServer() as server:
            tier = open_tier(server.url)
            await tier.forget(EVERYTHING)
            epoch = tier.epoch()
            server.kill()
            server.start()
            await tier.put_many({make_key(1): make_entry()})
            assert tier.epoch() == epoch
            await tier.forget(EVERYTHING)
            assert tier.epoch() > epoch
            await tier.aclose()

    run(body())


# -- a server in trouble -----------------------------------------------------------------------------------------------


class Wire:
    """A connection to the server that a test can cut: bytes then stop on the way, and nobody is told."""

    def __init__(self, server: ValkeyServer, context: ssl.SSLContext | None = None) -> None:
        self._server = server
        self._context = context
        self._open = asyncio.Event()
        self._open.set()
        self.port = 0

    @asynccontextmanager
    async def laid(self) -> AsyncIterator[Wire]:
        self._tasks: set[asyncio.Task[None]] = set()
        listener = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        self.port = listener.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            listener.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        self._open.clear()

    def mend(self) -> None:
        self._open.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry(reader, far_writer))
                group.create_task(self._carry(far_reader, writer))
        except* OSError:
            pass
        finally:
            writer.close()
            far_writer.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            await self._open.wait()
            writer.write(data)
            await writer.drain()
        writer.close()


@pytest.mark.parametrize("trouble", ["killed", "frozen", "cut off"])
def test_a_store_goes_on_without_a_server_in_trouble_and_uses_it_again_afterwards(trouble: str) -> None:
    async def body() -> None:
        with ValkeyServer() as server:
            async with Wire(server).laid() as wire:
                events: list[Event] = []
                clock = ManualClock()
                options = ValkeyOptions(f"redis://127.0.0.1:{wire.port}", timeout_s=0.3, connect_timeout_s=0.3, poll_s=0.02)
                tier = ValkeyTier(options, clock=clock)
                store = Store([RamTier(RamOptions(2000), policy=LRU(), clock=clock), tier], clock=clock, emit=events.append)
                assert store.put(make_key(1), b"first", tenant=Tenant("a"))
                await store.flush()
                assert make_key(1) in await tier.get_many([make_key(1)])
                begin = {"killed": server.kill, "frozen": server.stop, "cut off": wire.cut}[trouble]
                end = {"killed": server.start, "frozen": server.go_on, "cut off": wire.mend}[trouble]

                begin()
                assert await store.get(make_key(2)) is None
                assert any(isinstance(event, Failed) and event.operation == "get" for event in events)
                assert store.put(make_key(3), b"meanwhile", tenant=Tenant("a"))
                assert (await store.get(make_key(3))) is not None
                await store.flush()
                receipt = await store.forget(Scope(tenant=Tenant("b")))
                assert receipt.failed == ("valkey",)
                assert not receipt.complete

                end()
                clock.advance(60)  # the store has left it alone for long enough
                assert store.put(make_key(4), b"again", tenant=Tenant("a"))
                await store.flush()

                async def stored() -> bool:
                    try:
                        return make_key(4) in await tier.get_many([make_key(4)])
                    except TierFailed:
                        return False

                async with asyncio.timeout(PATIENT_S):
                    while not await stored():
                        clock.advance(60)
                        store.put(make_key(4), b"again", tenant=Tenant("a"))
                        await store.flush()
                assert (await store.forget(Scope(tenant=Tenant("b")))).complete
                first = await store.get(make_key(1))
                assert first is None or first.value == b"first"
                await store.aclose()

    run(body())


def test_a_slow_server_costs_a_request_no_more_than_the_store_waits() -> None:
    async def body() -> None:
        with ValkeyServer() as server:
            clock = ManualClock()
            tier = open_tier(server.url)
            store = Store([tier], clock=clock, options=StoreOptions(lookup_timeout_s=0.05))
            await tier.put_many({make_key(1): make_entry()})
            server.command("CLIENT", "PAUSE", "600000", "ALL")
            began = asyncio.get_running_loop().time()
            assert await store.get(make_key(1)) is None
            assert asyncio.get_running_loop().time() - began < PATIENT_S / 2
            assert await store.get(make_key(1)) is None  # at rest
            server.kill()
            await store.aclose()

    run(body())


def test_giving_up_on_a_read_leaves_no_reply_behind_for_the_next_one(valkey: str, valkey_server: ValkeyServer) -> None:
    async def body() -> None:
        tier = open_tier(valkey, max_connections=1)
        entries = {make_key(name): make_entry(100 + name) for name in range(20)}
        await tier.put_many(entries)
        for name in range(20):
            reading = asyncio.ensure_future(tier.get_many([make_key(name)]))
            for _ in range(name % 7):
                await asyncio.sleep(0)
            reading.cancel()
            other = (name + 1) % 20
            assert await tier.get_many([make_key(other)]) == {make_key(other): entries[make_key(other)]}
        await tier.aclose()

    run(body())


# -- ways to reach it --------------------------------------------------------------------------------------------------


async def works(url: str, **options: Any) -> None:
    tier = open_tier(url, **options)
    await tier.put_many({make_key(1): LARGE})
    assert await tier.get_many([make_key(1)]) == {make_key(1): LARGE}
    await tier.aclose()


def test_it_is_reached_over_a_unix_socket_and_in_a_numbered_database(valkey: str, valkey_server: ValkeyServer) -> None:
    run(works(valkey_server.unix_url))
    run(works(valkey.replace("/0", "/3")))
    assert number(valkey_server.command("DBSIZE")) > 0


def test_in_a_cluster_a_bucket_is_found_again_where_it_has_moved_and_missed_where_its_node_is_gone() -> None:
    async def body() -> None:
        with valkey_cluster() as nodes:
            tier = open_tier(nodes[0].url.replace("redis://", "redis+cluster://"))
            entries = {make_key(name): make_entry() for name in range(64)}
            assert await tier.put_many(entries) == frozenset(entries)
            assert await tier.get_many(entries) == entries
            moved = key_slot(b"05")
            [home] = [node for node in nodes if node.command("CLUSTER", "COUNTKEYSINSLOT", str(moved)) != b":0\r\n"]
            away = nodes[(nodes.index(home) + 1) % 3]
            for node in nodes:
                node.command("FLUSHALL")
            name = away.command("CLUSTER", "MYID").split(b"\r\n")[1]
            for node in (away, home, nodes[(nodes.index(home) + 2) % 3]):
                node.command("CLUSTER", "SETSLOT", str(moved), "NODE", name)
            assert await tier.put_many(entries) == frozenset(entries)
            assert away.command("CLUSTER", "COUNTKEYSINSLOT", str(moved)) != b":0\r\n"
            assert await tier.get_many(entries) == entries
            home.kill()
            with pytest.raises(TierFailed):
                await tier.get_many(entries)
            await tier.aclose()

    run(body())


def test_prefixes_keep_apart_what_shares_a_server(valkey: str) -> None:
    async def body() -> None:
        one, other = open_tier(valkey, prefix="one:"), open_tier(valkey, prefix="other:")
        await one.put_many({make_key(1): make_entry()})
        assert await other.get_many([make_key(1)]) == {}
        assert await other.forget(EVERYTHING) == 0
        assert await one.forget(EVERYTHING) == 1
        await one.aclose()
        await other.aclose()

    run(body())


def test_a_password_is_needed_where_there_is_one_and_no_message_tells_it() -> None:
    async def body() -> None:
        with ValkeyServer(password="s3cret-word") as server:
            await works(server.url)
            tier = open_tier(server.url.replace("s3cret-word", "wr0ng-word"))
            with pytest.raises(TierFailed) as failure:
                await tier.get_many([make_key(1)])
            assert "word" not in str(failure.value).replace("password", "")
            await tier.aclose()

    run(body())


@pytest.mark.parametrize(
    "url", ["http://u:hidden@host", "host:6379", "redis://u:hidden@host:port", "redis+cluster://u:hidden@host/1"]
)
def test_an_address_that_cannot_be_used_is_said_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError) as failure:
        ValkeyTier(ValkeyOptions(url), clock=ManualClock())
    assert "hidden" not in str(failure.value)


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, secret = folder / "certificate.pem", folder / "key.pem"
    pem.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return pem, secret


def test_it_is_reached_over_tls_and_only_with_a_certificate_that_is_trusted(
    valkey: str, valkey_server: ValkeyServer, tmp_path: Path
) -> None:
    pem, secret = certificate(tmp_path)

    async def body() -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(pem, secret)
        async with Wire(valkey_server, context).laid() as wire:
            url = f"rediss://127.0.0.1:{wire.port}"
            await works(url, ca_file=str(pem))
            stranger = open_tier(url)
            with pytest.raises(TierFailed, match=r"(?i)certificate"):
                await stranger.get_many([make_key(1)])
            await stranger.aclose()

    run(body())
