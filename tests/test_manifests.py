"""The chart and what it gives: valid, of a piece with the code that runs in it, open for nothing that is not meant."""

import ast
import functools
import json
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject

from local.processes import program
from services.common import confined, rpc, settings
from services.compositor import service as compositor
from services.generator import engine

ROOT = Path(__file__).parents[1]
CHART, RENDERED = ROOT / "deploy" / "chart", ROOT / "deploy" / "k8s"
EXAMPLES = sorted(each.stem for each in (CHART / "examples").glob("*.yaml"))
HELM = Path(sys.prefix) / "helm" / "helm"
# Of Kubernetes' API.
VERSION = "1.37"

needs_helm = pytest.mark.skipif(not HELM.exists(), reason="no Helm here: `make helm`")

# What no example says.
VARIANTS = {
    "queue-elsewhere": {"queue": {"servers": 0, "egress": [{"cidr": "10.1.0.0/16", "port": 4222}]}},
    "weights-fetched": {
        "models": {
            "source": "a=/models/a",
            "claim": "weights",
            "fetch": [{"repository": "someone/a", "revision": "0" * 40, "folder": "a"}],
        },
    },
    "scaled-by-cpu": {
        part: {"scale": {"most": 5}} for part in ("gateway", "compositor", "inversion", "generator")
    },
    "everything-told": {
        "image": {"digests": {"gateway": f"sha256:{'0' * 64}"}, "pullSecrets": ["pull"]},
        "gateway": {
            "settings": {"max_queued": 10**6, "lease_s": 2.5, "job_replicas": 1},
            "nodeSelector": {"pool": "small"},
            "tolerations": [{"key": "a", "operator": "Exists"}],
        },
        "edge": {"hosts": ["a.example"], "origins": ["https://b.example"]},
        "drain": {"forgetSeconds": 20, "finishSeconds": 60},
    },
}


def helm(*arguments, values=None):
    return subprocess.run(
        [HELM, "template", "collage", CHART, "--namespace", "collage", *arguments],
        input=None if values is None else json.dumps(values),
        capture_output=True,
        text=True,
        timeout=60,
    )


def rendered(*arguments, values=None):
    done = helm(*arguments, values=values)
    assert done.returncode == 0, done.stderr
    return done.stdout


def objects_in(text):
    return [each for each in yaml.safe_load_all(text) if each]


@pytest.fixture(scope="module", params=[*EXAMPLES, *VARIANTS])
def objects(request):
    if request.param in EXAMPLES:
        return objects_in((RENDERED / f"{request.param}.yaml").read_text())
    if not HELM.exists():
        pytest.skip("no Helm here: `make helm`")
    return objects_in(rendered("--values", "-", values=VARIANTS[request.param]))


def of_kind(objects, *kinds):
    return [each for each in objects if each["kind"] in kinds]


def name(item):
    return item["metadata"]["name"]


def part(item):
    return item["metadata"]["labels"]["app.kubernetes.io/component"]


def workloads(objects):
    return of_kind(objects, "Deployment", "StatefulSet", "Job")


def pod(workload):
    return workload["spec"]["template"]["spec"]


def labels(workload):
    return workload["spec"]["template"]["metadata"]["labels"]


def containers(workload):
    return [*pod(workload).get("initContainers", []), *pod(workload)["containers"]]


def selected(objects, selector):
    """The workloads whose pods a selector of labels is about."""
    if isinstance(selector.get("matchLabels"), dict) or "matchExpressions" in selector:
        asked = selector.get("matchLabels", {})
        among = {each["key"]: each["values"] for each in selector.get("matchExpressions", [])}
    else:
        asked, among = selector, {}
    return [
        each
        for each in workloads(objects)
        if asked.items() <= labels(each).items()
        and all(labels(each).get(key) in values for key, values in among.items())
    ]


def environment(container):
    """Its variables as its process sees them, secrets being `s3cret`."""
    found = {}
    for each in container.get("env", []):
        value = each.get("value", "s3cret")
        if each["name"] in ("COLLAGE_JOBS", "COLLAGE_BLOBS") and "value" not in each:
            value = {"COLLAGE_JOBS": "nats://u:p@h:4222", "COLLAGE_BLOBS": "s3s://k:s@h/b"}[
                each["name"]
            ]
        found[each["name"]] = re.sub(r"\$\((\w+)\)", lambda match: found[match[1]], value)
    return found


def our_processes(objects):
    """What runs one of our processes: its part's name, container, environment."""
    for workload in workloads(objects):
        for container in pod(workload)["containers"]:
            command = container["command"]
            module = command[-1].rpartition(".")[2]
            if command[:2] == ["python", "-m"] and module in settings.PARTS:
                yield module, workload, container, environment(container)


# --- the files


@needs_helm
@pytest.mark.parametrize("example", EXAMPLES)
def test_what_is_committed_is_what_the_chart_gives(example):
    given = rendered("--values", CHART / "examples" / f"{example}.yaml")
    assert given == (RENDERED / f"{example}.yaml").read_text(), "`make manifests` writes it anew"


@functools.cache
def check_kind(written):
    """Raises unless it is one of Kubernetes' own kinds to the last field; once for what many examples have."""
    kubernetes_validate.validate(json.loads(written), VERSION, strict=True)


def test_every_object_is_one_of_kubernetes_to_the_last_field(objects):
    for each in objects:
        if each["kind"] == "ScaledObject":
            seen = ScaledObject.model_validate(each).model_dump(
                mode="json", by_alias=True, exclude_unset=True
            )
            # The model takes what it does not know, and drops it.
            assert seen == each
        else:
            check_kind(json.dumps(each))
    told = [(each["kind"], name(each)) for each in objects]
    assert len(told) == len(set(told))
    assert {each["metadata"]["namespace"] for each in objects} == {"collage"}


@needs_helm
@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"gateway": {"slots": 4}}, "/gateway': additional properties 'slots' not allowed"),
        ({"generator": {"settings": {"step": 4}}}, "additional properties 'step' not allowed"),
        ({"generator": {"settings": {"max_rows": 0}}}, "/generator/settings/max_rows"),
        ({"gateway": {"settings": {"blobs": "folder:x"}}}, "'blobs' not allowed"),
        ({"image": {"tag": "latest"}}, "/image/tag"),
        ({"image": {"digests": {"door": "sha256:1"}}}, "/image/digests/door"),
        ({"edge": {"image": "envoy"}}, "/edge/image"),
        ({"queue": {"servers": 2}}, "/queue/servers"),
        ({"queue": {"servers": 0}}, "/queue/egress"),
        ({"storage": {"inside": False}}, "/storage/egress"),
        ({"models": {"claim": "a", "image": "b:1"}}, "/models"),
        (
            {"models": {"fetch": [{"repository": "a/b", "revision": "main", "folder": "c"}]}},
            "/models/fetch/0/revision",
        ),
        ({"drain": {"finishSeconds": 20}}, "/drain/finishSeconds"),
        ({"gateway": {"scale": {"cpuPercent": 50}}}, "/gateway/scale"),
        ({"gateway": {"resources": {"limits": {"cpu": "1"}}}}, "/gateway/resources/limits"),
        ({"compositer": {}}, "'compositer' not allowed"),
    ],
)
def test_values_that_the_chart_does_not_know_are_refused(wrong, told):
    if "resources" in wrong.get("gateway", {}):
        wrong["gateway"]["resources"]["limits"]["memory"] = None
    done = helm("--values", "-", values=wrong)
    assert done.returncode != 0
    assert told in done.stderr


def test_the_schema_knows_the_settings_of_each_process_and_what_they_take():
    properties = json.loads((CHART / "values.schema.json").read_text())["properties"]
    # What the chart knows itself.
    own = {
        *("address", "metrics_port", "compositor", "inversion", "generator", "gateway"),
        *("blobs", "public_blobs", "jobs", "models", "stages", "http_hosts", "http_origins"),
    }
    for section, kind in settings.PARTS.items():
        if section == "collage":
            continue
        expected = {}
        for each in fields(kind):
            limits = each.metadata
            if each.name in own:
                continue
            expected[each.name] = (
                {"enum": list(limits["among"])}
                if limits["among"]
                else {
                    "type": "integer" if each.type is int else "number",
                    "minimum": limits["least"],
                    "maximum": limits["most"],
                }
            )
        section = "edge" if section == "door" else section
        told = properties[section]["properties"]["settings"]
        assert told["properties"] == expected, section
        assert told["additionalProperties"] is False


# --- what belongs together


def test_selectors_ports_and_names_meet(objects):
    every = {part(each): each for each in workloads(objects)}
    accounts = {name(each) for each in of_kind(objects, "ServiceAccount")}
    for workload in workloads(objects):
        assert pod(workload)["serviceAccountName"] in accounts
        if workload["kind"] != "Job":
            assert selected(objects, workload["spec"]["selector"]) == [workload]
        for spread in pod(workload)["topologySpreadConstraints"]:
            assert selected(objects, spread["labelSelector"]) == [workload]
        volumes = {each["name"] for each in pod(workload).get("volumes", [])}
        volumes |= {name(each) for each in workload["spec"].get("volumeClaimTemplates", [])}
        mounted = {
            each["name"] for container in containers(workload) for each in container["volumeMounts"]
        }
        assert mounted == volumes
    for service in of_kind(objects, "Service"):
        (workload,) = selected(objects, service["spec"]["selector"])
        open_ports = {
            port["name"]: port["containerPort"]
            for container in pod(workload)["containers"]
            for port in container["ports"]
        }
        for port in service["spec"]["ports"]:
            number = open_ports[port["targetPort"]]
            # Who looks up a headless service calls the pod's own port.
            assert service["spec"].get("clusterIP") != "None" or number == port["port"]
    for workload in of_kind(objects, "StatefulSet"):
        assert workload["spec"]["serviceName"] in {
            name(each) for each in of_kind(objects, "Service")
        }
    budgets = of_kind(objects, "PodDisruptionBudget")
    kept = [selected(objects, each["spec"]["selector"]) for each in budgets]
    # What is one pod has nobody to wait for.
    assert sorted(part(workload) for (workload,) in kept) == sorted(
        {*every} - {"storage", "weights"}
    )


def test_what_something_scales_has_no_number_of_its_own(objects):
    scaled = {}
    for each in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject"):
        scaled[each["spec"]["scaleTargetRef"]["name"]] = each["spec"]
    for deployment in of_kind(objects, "Deployment"):
        assert ("replicas" in deployment["spec"]) == (name(deployment) not in scaled)
        scaled.pop(name(deployment), None)
    assert not scaled


def test_every_process_reads_its_settings_and_finds_the_others(objects):
    found = set()
    headless = {
        f"{name(each)}:{port['port']}"
        for each in of_kind(objects, "Service")
        for port in each["spec"]["ports"]
    }
    for which, _, container, told in our_processes(objects):
        found.add(which)
        read = settings.read(settings.PARTS[which], told)
        assert told.keys() >= {"COLLAGE_ADDRESS", "HOME"}
        own = {settings.variable(each.name) for each in fields(settings.PARTS[which])}
        # What is told to somebody who does not read it is told in vain.
        assert {each for each in told if each.startswith("COLLAGE_")} <= own
        open_ports = {each["containerPort"] for each in container["ports"]}
        assert int(read.address.rpartition(":")[2]) in open_ports
        if which == "gateway":
            assert {read.compositor, read.inversion, read.generator} <= headless
            assert urlsplit(read.jobs).hostname in {"h", *(each.split(":")[0] for each in headless)}
        if which == "door":
            assert read.gateway in headless
            continue
        assert read.metrics_port in open_ports
        store = urlsplit(read.blobs)
        assert store.scheme in ("s3", "s3s") and store.password and store.path
        assert store.netloc.rpartition("@")[2] in {"h", *headless}
        if getattr(read, "stages", "torch") != "torch":
            assert read.stages.removeprefix("triton:") in headless
        # Else it is as many as the node has cores, whatever the pod may use.
        assert getattr(read, "threads", 1)
    assert found == {"gateway", "compositor", "inversion", "generator", "door"}


def test_secrets_are_references_to_one(objects):
    keys = set()
    for workload in workloads(objects):
        for container in containers(workload):
            for each in container.get("env", []):
                if "secretKeyRef" in each.get("valueFrom", {}):
                    reference = each["valueFrom"]["secretKeyRef"]
                    assert reference["name"] == "collage"
                    keys.add(reference["key"])
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    table = {each for row in re.findall(r"^\| (`.*?) \|", page, re.M) for each in row.split(", ")}
    assert {f"`{key}`" for key in keys} <= table
    (shown,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    assert {f"`{each['secretKey']}`" for each in yaml.safe_load(shown)["spec"]["data"]} <= table
    assert not of_kind(objects, "Secret")


def test_the_images_run_what_the_chart_starts_and_hold_no_torch_where_none_is_used(objects):
    text = (ROOT / "deploy" / "images" / "Dockerfile").read_text()
    targets = {}
    for stage in re.split(r"^FROM ", text, flags=re.M)[1:]:
        head, _, rest = stage.partition("\n")
        base, target = head.split(" AS ")
        targets[target] = (base, rest)
    # Nothing stands on what is not told by its digest.
    assert {base for base, _ in targets.values()} <= {"${BASE}", *targets}
    assert "\nARG BASE\n" in text
    base, settled = targets["bare"]
    assert base == "${BASE}" and "\nUSER 10001:10001\n" in settled
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for which, workload, container, _ in our_processes(objects):
        base, rest = targets[which]
        assert base == "bare"
        assert json.loads(re.search(r"^CMD (.*)$", rest, re.M)[1]) == container["command"]
        assert re.fullmatch(rf"(?:\S+/)?collage-{which}:\S+", container["image"])
        assert pod(workload)["securityContext"]["runAsUser"] == 10_001
        _, installing = targets[f"installed-{which}"]
        named = re.search(r"^RUN sh /install.sh /app ?(.*)$", installing, re.M)[1]
        needed = list(extras["dependencies"])
        seen = set()
        for extra in filter(None, named.split(",")):
            needed += needs(extras["optional-dependencies"], extra, seen)
        assert any(each.startswith("torch") for each in needed) == (
            which in ("inversion", "generator")
        )


def needs(extras, extra, seen):
    """What an extra installs, and those that it names."""
    found = []
    for each in extras[extra]:
        if inner := re.fullmatch(r"collage-diffusion\[(.*)\]", each):
            for name in set(inner[1].split(",")) - seen:
                seen.add(name)
                found += needs(extras, name, seen)
        else:
            found.append(each)
    return found


# --- starting and ending


def announced(module):
    """The names of services that a process' server announces."""
    source = ROOT.joinpath(*module.split("."), "__main__.py").read_text()
    constants = {}
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            constants |= {each.id: node.value.value for each in node.targets}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add":
            (argument,) = node.args
            names.add(
                argument.value if isinstance(argument, ast.Constant) else constants[argument.id]
            )
    return names


def test_probes_ask_what_the_servers_announce(objects):
    # Longest that a process may take before it serves, as its code has it.
    longest_s = {
        "generator": engine.WARM_UP_LIMIT_S,
        "compositor": confined.START_S,
        "gateway": 75,
        "inversion": 75,
    }
    for which, _, container, _ in our_processes(objects):
        ports = [each["containerPort"] for each in container["ports"]]
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container[kind]
            if which == "door":
                where = probe.get("httpGet") or probe["tcpSocket"]
                assert where["port"] in ports
                continue
            asked = probe["grpc"].get("service", "")
            assert probe["grpc"]["port"] == ports[0]
            assert asked in {"", *announced(container["command"][-1])}
            if kind != "readinessProbe":
                # The server's own: whoever cannot do its work now is not started anew.
                assert asked == ""
        if which != "door":
            start = container["startupProbe"]
            assert start["periodSeconds"] * start["failureThreshold"] > longest_s[which]
            ready = container["readinessProbe"]["grpc"].get("service")
            # A gateway that cannot write is asked for what it can read.
            assert (ready is None) == (which == "gateway")
    for workload in workloads(objects):
        if workload["kind"] != "Job":
            for container in pod(workload)["containers"]:
                assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()


def test_a_pod_that_ends_is_first_forgotten_and_then_has_time(objects):
    for workload in of_kind(objects, "Deployment"):
        grace_s = pod(workload)["terminationGracePeriodSeconds"]
        for container in pod(workload)["containers"]:
            sleep_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
            # Nodes hear of an endpoint's end within a second or two; balancers outside take longer.
            assert sleep_s >= 5, container["name"]
            # What the server drains for, and what closing takes.
            assert grace_s >= sleep_s + rpc.DRAIN_S + 5, container["name"]
    schema = json.loads((CHART / "values.schema.json").read_text())
    least = schema["properties"]["drain"]["properties"]["finishSeconds"]["minimum"]
    assert least >= rpc.DRAIN_S + 5


def test_a_device_is_given_up_before_the_next_pod_wants_it(objects):
    for workload in of_kind(objects, "Deployment"):
        limits = [each["resources"]["limits"] for each in containers(workload)]
        has_device = any("/" in key for each in limits for key in each)
        surge = workload["spec"]["strategy"]["rollingUpdate"]["maxSurge"]
        assert surge == (0 if has_device else 1)


# --- who may do what


def test_pods_are_restricted_and_nobody_to_the_cluster(objects):
    for account in of_kind(objects, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    for workload in workloads(objects):
        spec = pod(workload)
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 10_000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        kinds = {"configMap", "emptyDir", "image", "persistentVolumeClaim"}
        assert all({*each} - {"name"} <= kinds for each in spec.get("volumes", []))
        for container in containers(workload):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert re.search(r"(:[^/:@]+|@sha256:[0-9a-f]{64})$", container["image"])
            assert not container["image"].endswith(":latest")
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert "memory" in container["resources"]["limits"]
            assert not any("hostPort" in each for each in container.get("ports", []))


def test_the_compositor_has_the_memory_that_its_processes_may_take():
    values = yaml.safe_load((CHART / "values.yaml").read_text())["compositor"]["resources"]
    most = (compositor.KEPT + compositor.MAX_RUNNING) * compositor.MEMORY_BYTES / 2**30
    assert float(values["limits"]["memory"].removesuffix("Gi")) > most


OUTSIDE = "outside"


def arrows(objects, *, incoming):
    """Whom who may talk to on which port, by the policies of one direction; `from`, `to`, port."""
    rules, peers = ("ingress", "from") if incoming else ("egress", "to")
    found = set()
    for policy in of_kind(objects, "NetworkPolicy"):
        if policy["spec"]["policyTypes"] != [rules.capitalize()]:
            continue
        own = [part(each) for each in selected(objects, policy["spec"]["podSelector"])]
        assert own, name(policy)
        for rule in policy["spec"][rules]:
            others = set()
            for peer in rule.get(peers, [{}]):
                if "podSelector" in peer and "namespaceSelector" not in peer:
                    met = [part(each) for each in selected(objects, peer["podSelector"])]
                    assert met, name(policy)
                    others |= {*met}
                else:
                    others.add(OUTSIDE)
            for port in rule["ports"]:
                for one in own:
                    for other in others:
                        ends = (other, one) if incoming else (one, other)
                        found.add((*ends, port["port"]))
    return found


def test_the_network_is_closed_but_for_the_arrows_of_the_design(objects):
    here = {part(each) for each in workloads(objects)}
    inner = {
        ("edge", "gateway", 50051),
        ("gateway", "compositor", 50052),
        ("gateway", "inversion", 50053),
        ("gateway", "generator", 50054),
    }
    outward = {(each, OUTSIDE, 53) for each in here}
    inward = {(OUTSIDE, "edge", 8080)}
    inward |= {(OUTSIDE, each, 9464) for each in settings.PARTS if each not in ("door", "collage")}
    if "queue" in here:
        inner.add(("gateway", "queue", 4222))
        (queue,) = [each for each in workloads(objects) if part(each) == "queue"]
        inner |= {("queue", "queue", 6222)} if queue["spec"]["replicas"] > 1 else set()
    else:
        outward.add(("gateway", OUTSIDE, 4222))
    readers = ("gateway", "compositor", "inversion", "generator")
    if "storage" in here:
        inner |= {(each, "storage", 8333) for each in readers}
    else:
        outward |= {(each, OUTSIDE, 9000) for each in readers}
    if "triton" in here:
        inner.add(("generator", "triton", 8001))
        inward.add((OUTSIDE, "triton", 8002))
    if "weights" in here:
        outward.add(("weights", OUTSIDE, 443))
    # An arrow is open where both of its ends are.
    assert arrows(objects, incoming=True) == inner | inward
    assert arrows(objects, incoming=False) == inner | outward
    closed = [
        each
        for each in of_kind(objects, "NetworkPolicy")
        if each["spec"]["policyTypes"] == ["Ingress", "Egress"]
    ]
    assert len(closed) == 1 and not {"ingress", "egress"} & closed[0]["spec"].keys()
    assert len(selected(objects, closed[0]["spec"]["podSelector"])) == len(workloads(objects))
    # A port that a policy opens is one that is listened on.
    listened = {
        (part(workload), port["containerPort"])
        for workload in workloads(objects)
        for container in pod(workload)["containers"]
        for port in container.get("ports", [])
    }
    assert {(to, port) for _, to, port in inner | inward} <= listened


# --- what is not ours takes what it is given


def test_envoy_takes_what_a_starting_pod_is_given(objects, tmp_path):
    (edge,) = [each for each in workloads(objects) if part(each) == "edge"]
    (configure,) = pod(edge)["initContainers"]
    envoy = pod(edge)["containers"][0]
    assert envoy["command"][2] == configure["command"][3]
    command = [
        str(tmp_path / "envoy.json") if each == "/envoy/envoy.json" else each
        for each in configure["command"]
    ]
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], cwd=ROOT, check=True, timeout=60)
    tried = subprocess.run(
        [program("envoy"), "--mode", "validate", "-c", tmp_path / "envoy.json"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert tried.returncode == 0, tried.stderr
    written = json.loads((tmp_path / "envoy.json").read_text())["static_resources"]
    (listener,) = written["listeners"]
    port = listener["address"]["socket_address"]["port_value"]
    assert port in [each["containerPort"] for each in envoy["ports"]]
