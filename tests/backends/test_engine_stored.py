"""`anaphora kv` over what a real engine wrote: it finds all of it, finds what is damaged, removes, and carries it elsewhere."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.backends.prompts import BLOCK, raw, reused, some_tokens

from anaphora.cli import main
from anaphora.clock import SystemClock
from anaphora.codecs.int8 import Int8
from anaphora.kv.inventory import Block, Inventory, take
from anaphora.kv.stored import pack, unpack
from anaphora.store import Store
from anaphora.tiers.base import Entry
from anaphora.tiers.disk import DiskOptions, DiskTier
from anaphora.types import Keep, Key, Tenant

if TYPE_CHECKING:
    from anaphora.testing.engines import Driver

MakeDriver = Callable[..., "Driver"]
MIB = 1 << 20


COMMON = some_tokens(160)
PROMPTS = [[*COMMON, *some_tokens(90, seed=1)], [*COMMON, *some_tokens(40, seed=2)]]
"""Ten blocks that both stand on; 15 and 12 blocks in all."""
ACME = Tenant("acme")


@contextmanager
def engine(make_driver: MakeDriver, cache_dir: Path, **options: Any) -> Iterator[Driver]:
    """An engine over the KV of `cache_dir`, which loads whatever there is."""
    clock = SystemClock()
    tier = DiskTier(DiskOptions(str(cache_dir / "kv"), inline_bytes=1024), clock=clock)
    driver = make_driver(store=Store([tier], clock=clock), **options)
    assert driver.core._offload is not None
    driver.core._offload.estimates.worth = lambda start, blocks, now_s: len(blocks)  # type: ignore[method-assign]
    try:
        yield driver
    finally:
        driver.core.flush(30.0)
        driver.drain()
        driver.core.close()


@pytest.fixture
def folder(make_driver: MakeDriver, tmp_path: Path) -> Path:
    """Both prompts, the second one also of another tenant."""
    with engine(make_driver, tmp_path / "cache") as driver:
        for prompt in PROMPTS:
            driver.ask(raw(prompt))
        driver.ask(raw(PROMPTS[1], tenant=ACME))
    return tmp_path / "cache"


@pytest.fixture
def kv(capsys: pytest.CaptureFixture[str], folder: Path) -> Callable[..., tuple[int, Any]]:
    """`kv("ls", ...)`: the exit status and the JSON of `anaphora kv ls ... --json` over `folder`."""

    def run(*words: str, where: Path = folder, as_json: bool = True) -> tuple[int, Any]:
        capsys.readouterr()
        status = main(["kv", *words, "--cache-dir", str(where), *(["--json"] if as_json else [])])
        out = capsys.readouterr().out
        return status, json.loads(out) if as_json else out

    return run


Kv = Callable[..., tuple[int, Any]]


def files(folder: Path) -> list[Path]:
    return sorted((folder / "kv" / "values").iterdir())


def inventory(folder: Path) -> Inventory:
    async def look() -> Inventory:
        tier = DiskTier(DiskOptions(str(folder / "kv")), clock=SystemClock())
        found = await take(tier)
        await tier.aclose()
        return found

    return asyncio.run(look())


def test_what_lies_on_disk_is_told_by_model_tenant_and_codec(kv: Kv, folder: Path) -> None:
    status, shown = kv("ls")
    assert status == 0
    acme, local = shown["groups"]
    assert (acme["tenant"], acme["num_blocks"], acme["num_prefixes"], acme["longest_tokens"]) == ("acme", 12, 1, 12 * BLOCK)
    assert (local["tenant"], local["num_blocks"], local["num_prefixes"], local["longest_tokens"]) == (
        "local",
        17,
        2,
        15 * BLOCK,
    )
    assert local["num_tokens"] == 17 * BLOCK
    assert local["codec"] == "raw"
    assert local["num_bytes"] + acme["num_bytes"] >= sum(file.stat().st_size for file in files(folder))
    assert shown["orphans"] == 0
    _, text = kv("ls", as_json=False)
    assert "acme" in text


def test_prefixes_are_the_chains_from_the_beginning_to_a_leaf(kv: Kv) -> None:
    _, shown = kv("ls", "--prefixes")
    assert [(prefix["tenant"], prefix["num_tokens"], prefix["complete"]) for prefix in shown["prefixes"]] in (
        [("local", 240, True), ("acme", 192, True), ("local", 192, True)],
        [("local", 240, True), ("local", 192, True), ("acme", 192, True)],
    )
    _, text = kv("ls", "--prefixes", as_json=False)
    assert all(prefix["id"] in text for prefix in shown["prefixes"])


def test_looking_does_not_change_what_leaves_first(kv: Kv, folder: Path) -> None:
    def order() -> list[bytes]:
        import sqlite3

        with closing(sqlite3.connect(folder / "kv" / "index.db")) as db:
            return [key for (key,) in db.execute("SELECT key FROM entries ORDER BY accessed")]

    before = order()
    assert kv("ls")[0] == kv("verify")[0] == 0
    assert order() == before


def test_sound_blocks_pass(kv: Kv) -> None:
    status, checked = kv("verify")
    assert status == 0
    assert (checked["num_blocks"], checked["num_orphans"], checked["damaged"]) == (29, 0, [])


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "swapped"])
def test_planted_damage_is_found_and_repaired(kv: Kv, folder: Path, make_driver: MakeDriver, damage: str) -> None:
    damaged, other = files(folder)[7], files(folder)[8]
    content = bytearray(damaged.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 4
    elif damage == "cut":
        del content[-3:]
    elif damage == "emptied":
        content.clear()
    else:
        content[:] = other.read_bytes()
    damaged.write_bytes(content)

    for _ in range(2):  # looking removes nothing
        status, checked = kv("verify")
        assert status == 1
        assert [one["key"] for one in checked["damaged"]] == [damaged.name.partition("-")[0]]
        assert checked["num_blocks"] == 28
    status, text = kv("verify", as_json=False)
    assert status == 1
    assert "--repair" in text
    status, checked = kv("verify", "--repair")
    assert (status, checked["removed"]) == (1, 1)
    status, checked = kv("verify")
    assert (status, checked["num_blocks"]) == (0, 28)
    with engine(make_driver, folder) as driver:
        for request in (raw(PROMPTS[0]), raw(PROMPTS[1]), raw(PROMPTS[1], tenant=ACME)):
            driver.ask(request)
    assert kv("verify")[1]["num_blocks"] == 29, "what was removed was computed again"


def test_forged_blocks_are_found_though_the_bytes_are_those_that_were_put(kv: Kv, folder: Path) -> None:
    blocks = [block for block in inventory(folder).blocks.values() if block.tenant == ACME]
    one, other, last = (next(block for block in blocks if block.start == start * BLOCK) for start in (2, 5, 11))

    async def forge() -> None:
        tier = DiskTier(DiskOptions(str(folder / "kv")), clock=SystemClock())
        entries = await tier.get_many([one.key, other.key, last.key])

        def forged(block: Block, **fields: Any) -> dict[Key, Entry]:
            header, framed = unpack(entries[block.key].value)
            value = pack(msgspec.structs.replace(header, **fields), bytes(framed))
            return {block.key: msgspec.structs.replace(entries[block.key], value=value)}

        await tier.put_many(forged(one, tokens=tuple(range(BLOCK))))
        await tier.put_many({other.key: entries[one.key]})
        await tier.put_many(forged(last, start=160))
        await tier.aclose()

    asyncio.run(forge())
    status, checked = kv("verify")
    assert status == 1
    assert {damage["key"]: damage["reason"] for damage in checked["damaged"]} == {
        one.key.hex(): "its key does not follow from its tokens",
        other.key.hex(): "its checksum does not match",
        last.key.hex(): "it says it begins at token 160, and the block before it ends at 176",
    }


def test_a_block_without_the_one_before_it_is_no_damage(kv: Kv, folder: Path) -> None:
    found = inventory(folder)
    second = next(block for block in found.blocks.values() if block.start == BLOCK and block.tenant == ACME)

    async def remove() -> None:
        tier = DiskTier(DiskOptions(str(folder / "kv")), clock=SystemClock())
        await tier.delete_many([second.key])
        await tier.aclose()

    asyncio.run(remove())
    status, checked = kv("verify")
    assert (status, checked["num_orphans"], checked["damaged"]) == (0, 1, [])
    _, shown = kv("ls", "--prefixes")
    broken = [prefix for prefix in shown["prefixes"] if not prefix["complete"]]
    assert [(prefix["tenant"], prefix["num_tokens"], prefix["num_blocks"]) for prefix in broken] == [("acme", 192, 10)]


def test_dropping_a_tenant_leaves_the_others(kv: Kv, folder: Path, make_driver: MakeDriver) -> None:
    status, receipt = kv("drop", "--tenant", "acme", "--yes")
    assert (status, receipt) == (0, {"removed": {"disk": 12}, "remaining": {"disk": 0}, "failed": []})
    with engine(make_driver, folder) as driver:
        assert reused(driver.ask(raw(PROMPTS[1], tenant=ACME))) == 0
        assert reused(driver.ask(raw(PROMPTS[1]))) == 12 * BLOCK


def test_dropping_a_prefix_leaves_what_another_one_stands_on(kv: Kv, folder: Path) -> None:
    _, shown = kv("ls", "--prefixes")
    longest = shown["prefixes"][0]
    status, receipt = kv("drop", "--prefix", longest["id"], "--yes")
    assert (status, receipt["removed"], receipt["remaining"]) == (0, {"disk": 5}, {"disk": 0})
    _, shown = kv("ls", "--prefixes")
    assert [prefix["num_tokens"] for prefix in shown["prefixes"]] == [192, 192]
    assert all(prefix["complete"] for prefix in shown["prefixes"])


def test_dropping_everything_leaves_no_file(kv: Kv, folder: Path) -> None:
    assert kv("drop", "--all", "--yes")[1]["removed"] == {"disk": 29}
    assert files(folder) == []


def test_nothing_is_dropped_unasked(kv: Kv, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["kv", "drop", "--all", "--cache-dir", str(folder)]) == 2, "nobody is there to say yes"
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert main(["kv", "drop", "--all", "--cache-dir", str(folder)]) == 1
    assert kv("verify")[1]["num_blocks"] == 29


def test_a_strange_id_and_an_empty_folder_are_told(kv: Kv, folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["kv", "export", "zz", str(tmp_path / "out"), "--cache-dir", str(folder)]) == 2
    assert "anaphora kv ls --prefixes" in capsys.readouterr().err
    assert main(["kv", "ls", "--cache-dir", str(tmp_path / "none")]) == 2
    assert "--cache-dir" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert main(["kv", "ls", "--tier", "shared", "--cache-dir", str(folder)]) == 2
    assert "cache.shared" in capsys.readouterr().err


def test_a_shared_server_is_looked_into_checked_and_emptied_too(
    kv: Kv, folder: Path, valkey: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from anaphora.tiers.valkey import ValkeyOptions, ValkeyTier

    async def fill() -> None:
        disk = DiskTier(DiskOptions(str(folder / "kv")), clock=SystemClock())
        shared = ValkeyTier(ValkeyOptions(valkey, prefix="anaphora:kv:"), clock=SystemClock())
        entries = await disk.get_many(await disk.keys())
        one, other = sorted(entries)[:2]
        await shared.put_many({**entries, one: entries[other]})
        await disk.aclose()
        await shared.aclose()

    asyncio.run(fill())
    monkeypatch.setenv("ANAPHORA_SHARED", valkey)
    _, shown = kv("ls", "--tier", "shared")
    assert (sum(group["num_blocks"] for group in shown["groups"]), len(shown["unreadable"])) == (28, 1)
    status, checked = kv("verify", "--tier", "shared")
    assert (status, checked["num_blocks"], len(checked["damaged"])) == (1, 28, 1)
    longest = kv("ls", "--prefixes")[1]["prefixes"][0]
    assert kv("drop", "--prefix", longest["id"], "--yes")[1]["remaining"] == {"disk": 0, "valkey": 0}
    status, receipt = kv("drop", "--all", "--yes")
    assert (status, receipt["remaining"]) == (0, {"disk": 0, "valkey": 0})
    assert receipt["removed"]["valkey"] >= 23
    assert kv("ls", "--tier", "shared")[1]["groups"] == []


# -- from one machine to another ---------------------------------------------------------------------------------------


@pytest.fixture
def exported(kv: Kv, tmp_path: Path) -> Path:
    """The longest prefix."""
    file = tmp_path / "prefix.kv"
    _, shown = kv("ls", "--prefixes")
    status, _ = kv("export", shown["prefixes"][0]["id"][:8], str(file), as_json=False)
    assert status == 0
    return file


def test_a_prefix_carried_to_another_machine_is_used_there(
    kv: Kv, folder: Path, exported: Path, tmp_path: Path, make_driver: MakeDriver
) -> None:
    elsewhere = tmp_path / "elsewhere"
    status, text = kv("import", str(exported), where=elsewhere, as_json=False)
    assert (status, "15 new blocks" in text) == (0, True)
    with engine(make_driver, elsewhere) as driver:
        asked = driver.ask(raw(PROMPTS[0], max_tokens=8))
        assert reused(asked) == 15 * BLOCK
        assert reused(driver.ask(raw(PROMPTS[0], tenant=ACME))) == 0
    assert asked.tokens == make_driver(prefix_caching=False).ask(raw(PROMPTS[0], max_tokens=8)).tokens
    status, text = kv("import", str(exported), where=elsewhere, as_json=False)
    assert (status, "0 new blocks, 15 were there already" in text) == (0, True)
    assert kv("verify", where=elsewhere)[0] == 0


@pytest.mark.parametrize("damage", ["flipped", "cut", "longer", "foreign", "empty", "version"])
def test_a_damaged_file_is_refused_whole(kv: Kv, exported: Path, tmp_path: Path, damage: str, capsys: Any) -> None:
    elsewhere = tmp_path / "elsewhere"
    content = bytearray(exported.read_bytes())
    if damage == "flipped":
        content[-len(content) // 3] ^= 1
    elif damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "longer":
        content += b"x"
    elif damage == "foreign":
        content[:4] = b"PK\x03\x04"
    elif damage == "empty":
        content.clear()
    else:
        content[4] = 9
    exported.write_bytes(content)
    assert main(["kv", "import", str(exported), "--cache-dir", str(elsewhere)]) == 1
    assert "is not used" in capsys.readouterr().err
    assert not elsewhere.exists()


def test_a_prefix_for_which_there_is_no_room_leaves_nothing(
    kv: Kv, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("ANAPHORA_ENGINE_KV_DISK", "40KiB")
    elsewhere = tmp_path / "elsewhere"
    assert main(["kv", "import", str(exported), "--cache-dir", str(elsewhere)]) == 1
    assert "no room" in capsys.readouterr().err
    assert files(elsewhere) == []


def test_a_prefix_that_is_not_all_there_is_not_exported(
    kv: Kv, folder: Path, exported: Path, tmp_path: Path, capsys: Any
) -> None:
    _, shown = kv("ls", "--prefixes")
    name = shown["prefixes"][0]["id"]
    assert main(["kv", "export", name, str(exported), "--cache-dir", str(folder)]) == 2
    assert "--force" in capsys.readouterr().err
    chain = inventory(folder)
    leaf = chain.find(name)
    damaged = next(file for file in files(folder) if file.name.startswith(chain.chain(leaf)[3].key.hex()))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    out = tmp_path / "again.kv"
    assert main(["kv", "export", name, str(out), "--cache-dir", str(folder)]) == 1
    assert list(tmp_path.glob("*again*")) == []


# -- requests that demand exact KV, and pins ---------------------------------------------------------------------------


def test_a_request_that_demands_exact_kv_never_meets_lossy_blocks(make_driver: MakeDriver, tmp_path: Path) -> None:
    plain = make_driver(prefix_caching=False)
    with engine(make_driver, tmp_path, codec=Int8()) as driver:
        driver.ask(raw(PROMPTS[0]))
    with engine(make_driver, tmp_path, codec=Int8()) as driver:
        assert reused(driver.ask(raw(PROMPTS[0]))) == 15 * BLOCK, "through the codec"
        num_saved = driver.core.stats()["kv_offload_blocks_saved"]
        first = driver.ask(raw(PROMPTS[0], exact_kv=True))
        again = driver.ask(raw(PROMPTS[0], exact_kv=True))
        driver.core.flush(30.0)
        assert (reused(first), reused(again)) == (0, len(PROMPTS[0])), "its own blocks, and those in memory only"
        assert first.tokens == again.tokens == plain.ask(raw(PROMPTS[0])).tokens
        assert driver.core.stats()["kv_offload_blocks_saved"] == num_saved
    stored = inventory(tmp_path)
    assert all(block.lossy for block in stored.blocks.values())
    assert [(prefix.num_tokens, prefix.codec, prefix.complete) for prefix in stored.prefixes()] == [(240, "int8", True)]


def test_where_no_codec_has_a_loss_demanding_exact_kv_changes_nothing(make_driver: MakeDriver, folder: Path) -> None:
    with engine(make_driver, folder) as driver:
        assert reused(driver.ask(raw(PROMPTS[0], exact_kv=True))) == 15 * BLOCK


def test_a_whole_prompt_can_be_pinned_without_knowing_its_length(make_driver: MakeDriver) -> None:
    driver = make_driver()
    driver.ask(raw(PROMPTS[0], max_tokens=0, keep=(Keep(1 << 40, 60.0),)))
    assert driver.core.stats()["kv_blocks_pinned"] == 15
