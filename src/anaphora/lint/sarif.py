"""A report as SARIF 2.1.0, which code hosts show beside the lines."""

from __future__ import annotations

from urllib.parse import quote

import anaphora
from anaphora.lint.findings import RULES, Finding
from anaphora.lint.linting import Report
from anaphora.lint.values import Json, Object

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif(report: Report) -> Object:
    """One run with every rule and one result for each finding."""
    codes = list(RULES)
    rules: list[Json] = [
        {
            "id": rule.code,
            "name": "".join(word.capitalize() for word in rule.code.split("-")),
            "shortDescription": {"text": rule.title},
            "help": {"text": rule.fix},
            "defaultConfiguration": {"level": rule.severity},
        }
        for rule in RULES.values()
    ]
    driver: Object = {"name": "anaphora lint", "semanticVersion": anaphora.__version__, "rules": rules}
    results: list[Json] = [_result(finding, codes.index(finding.code)) for finding in report.findings]
    run: Object = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _result(finding: Finding, index: int) -> Object:
    where = f"{finding.path}, character {finding.offset}" if finding.offset is not None else finding.path
    place: Object = {
        "physicalLocation": {"artifactLocation": {"uri": _uri(finding.file)}, "region": {"startLine": finding.line}},
        "logicalLocations": [{"fullyQualifiedName": where}],
    }
    result: Object = {
        "ruleId": finding.code,
        "ruleIndex": index,
        "level": finding.severity,
        "message": {"text": f"{finding.message} ({where}). {finding.fix}"},
        "locations": [place],
        "properties": {
            "session": finding.session,
            "before": finding.before,
            "after": finding.after,
            "lostTokens": finding.lost_tokens,
            "lostUsd": finding.lost_usd,
            "occurrences": finding.occurrences,
        },
    }
    if finding.against_line is not None:
        against: Object = {
            "artifactLocation": {"uri": _uri(finding.against_file)},
            "region": {"startLine": finding.against_line},
        }
        result["relatedLocations"] = [{"physicalLocation": against, "message": {"text": "compared with this request"}}]
    return result


def _uri(file: str) -> str:
    return quote(file.replace("\\", "/"), safe="/.-_~:")
