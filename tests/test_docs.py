"""Documentation that can be checked against the code, is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from anaphora.cli.serve import FLAGS
from anaphora.config import OTHER_VARIABLES
from anaphora.errors import ServiceError
from anaphora.events import MissReason

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
API = (ROOT / "docs" / "http-api.md").read_text(encoding="utf-8")
SERVER = ROOT / "src" / "anaphora" / "server"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        if not place.exists() or (anchor and anchor not in anchors(place)):
            broken.append(target)
    assert broken == []


def test_every_route_is_documented() -> None:
    routes = set(re.findall(r'"(/[a-z][\w/{}:]*)"', (SERVER / "app.py").read_text(encoding="utf-8")))
    assert routes
    assert {route for route in routes if f"{route.replace(':path', '')}`" not in API} == set()


def test_every_metric_is_documented() -> None:
    text = (SERVER / "metrics.py").read_text(encoding="utf-8")
    metrics = set(re.findall(r'(?:_Counter|_Histogram)\(\s*sums,\s*"((?:vllm|anaphora):\w+)"', text))
    assert len(metrics) > 10
    assert {metric for metric in metrics if metric not in API} == set()


@pytest.mark.parametrize("reason", [reason for reason in MissReason if reason is not MissReason.ABSENT])
def test_every_reason_of_a_miss_is_documented(reason: MissReason) -> None:
    assert f"`{reason.value}`" in API


def test_every_status_is_documented() -> None:
    def statuses(error: type[ServiceError]) -> set[int]:
        return {error.status}.union(*(statuses(kind) for kind in error.__subclasses__()))

    missing = {status for status in statuses(ServiceError) if not re.search(rf"^\| {status}\b", API, re.MULTILINE)}
    assert missing == set()


def test_every_flag_of_serve_is_documented_beside_its_setting() -> None:
    lines = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8").splitlines()
    for setting, flag, *_ in FLAGS:
        row = next(line for line in lines if line.startswith(f"| `{setting}` "))
        assert f"| `{flag}` |" in row


def test_every_other_variable_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert [name for name in OTHER_VARIABLES if f"| `{name}` |" not in text] == []
