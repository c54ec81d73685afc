"""Alerts and dashboard: each name in them is exported, each alert does what it says and has an entry in the runbook."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
import yaml

from collage.v1 import collage_service_pb2

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yaml"
BESIDE = Path(sys.prefix) / "promtool" / "promtool"
PROMTOOL = BESIDE if BESIDE.exists() else shutil.which("promtool")
# What Prometheus puts in, or the query itself.
OF_PROMETHEUS = {"instance", "le"}


def exported():
    """The series that our processes export, each with its labels."""
    found = {}
    for package in ("gateway", "services", "door"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                kind = getattr(getattr(node, "func", None), "id", "")
                if kind not in ("Counter", "Count", "Gauge", "Histogram") or not node.args:
                    continue
                if not isinstance(node.args[0], ast.Constant):
                    continue
                name = node.args[0].value
                labels = set(ast.literal_eval(node.args[2])) if len(node.args) > 2 else set()
                endings = ("_bucket", "_sum", "_count") if kind == "Histogram" else ("",)
                found |= {name + ending: labels for ending in endings}
    return found


def rules():
    return [
        rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    ]


def dashboard():
    return json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())


def queries():
    """Every query of ours: where it stands, and the query."""
    for rule in rules():
        yield rule.get("alert") or rule["record"], rule["expr"]
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for manifest in yaml.safe_load_all((DEPLOY / "k8s" / "fleet.yaml").read_text()):
        if manifest and manifest["kind"] == "ScaledObject":
            for trigger in manifest["spec"]["triggers"]:
                yield manifest["metadata"]["name"], trigger["metadata"]["query"]


def test_every_series_and_label_is_one_that_the_code_exports():
    known, recorded = exported(), {rule["record"] for rule in rules() if "record" in rule}
    assert {"collage_jobs", "collage_rpc_seconds_bucket"} <= known.keys()
    used = 0
    for place, query in queries():
        for name, selectors in re.findall(r"\b(collage[\w:]+)\b(?!\.)(?:\{([^}]*)\})?", query):
            used += 1
            if name in recorded:
                continue
            assert name in known, f"{place}: {name}"
            asked = set(re.findall(r'(\w+)(?:=~|!~|!=|=)"', selectors))
            assert asked <= known[name], f"{place}: {name}"
        kept = {
            each for names in re.findall(r"by \(([^)]*)\)", query) for each in names.split(", ")
        }
        every = set().union(
            *(known.get(name, set()) for name in re.findall(r"\bcollage_\w+", query))
        )
        assert kept <= every | OF_PROMETHEUS, f"{place}: {kept}"
    assert used > 40


def test_codes_and_methods_are_those_of_the_contract():
    (service,) = {
        each for _, query in queries() for each in re.findall(r'method=~"/([\w.]+)/\.\+"', query)
    }
    assert service == collage_service_pb2.DESCRIPTOR.services_by_name["CollageService"].full_name
    codes = {
        code
        for _, query in queries()
        for listed in re.findall(r'code=~"([^"]*)"', query)
        for code in listed.split("|")
    }
    assert codes and codes <= {each.name for each in grpc.StatusCode}


def test_every_alert_has_its_entry_in_the_runbook_and_no_entry_is_of_none():
    text = (ROOT / "docs" / "runbook.md").read_text()
    entries = re.findall(r"^## (\w+)\n\n(.+)", text, re.M)
    alerts = [rule["alert"] for rule in rules() if "alert" in rule]
    assert [name for name, _ in entries] == alerts
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("page", "ticket")
            assert rule["annotations"]["summary"]


def test_panels_lie_beside_one_another():
    taken = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(dashboard()["panels"])


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool here: `make promtool`")
def test_alerts_begin_and_end_as_their_tests_say(tmp_path):
    tried = yaml.safe_load((RULES.parent / "rules_test.yaml").read_text())
    told = {
        case["alertname"]
        for test in tried["tests"]
        for case in test["alert_rule_test"]
        if case.get("exp_alerts")
    }
    assert told == {rule["alert"] for rule in rules() if "alert" in rule}
    for arguments in (
        ("check", "rules", RULES),
        ("test", "rules", RULES.parent / "rules_test.yaml"),
    ):
        done = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
    # Each query of the dashboard, as rules that nobody keeps.
    kept = [
        {"record": f"a:{number}:b".replace(":", "_"), "expr": query}
        for number, (_, query) in enumerate(queries())
    ]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": kept}]}))
    done = subprocess.run([PROMTOOL, "check", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
