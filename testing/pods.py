"""The pods of a manifest as processes on this machine, each at a loopback address of its own: `Pods`.

What the manifest says is what runs: commands, variables, settings files, probes. What a cluster adds is put in: a
Service's name becomes the addresses of its pods, `0.0.0.0` the pod's own, a volume a folder, a secret what the test
says. Not there: images, limits and policies.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from local.processes import Process, program
from services.common.rpc import connect

ROOT = Path(__file__).parents[1]
# What is slower than its manifest allows is slow enough to fail.
PROBE_S = 5.0


@dataclass(slots=True, kw_only=True)
class Container:
    """One process of a pod, and how it is asked."""

    spec: Mapping[str, Any]
    address: str
    process: Process

    async def ask(self, kind: str) -> None:
        """Returns when the probe of this kind (`readinessProbe`, say) passes now; raises where it does not."""
        probe = self.spec[kind]
        if "grpc" in probe:
            await self._ask_grpc(**probe["grpc"])
        elif "httpGet" in probe:
            await asyncio.to_thread(self._ask_http, **probe["httpGet"])
        else:
            port = probe["tcpSocket"]["port"]
            _, writer = await asyncio.open_connection(self.address, port)
            writer.close()

    async def ready(self) -> None:
        """Returns when it may be sent work."""
        await self.ask("startupProbe")
        await self.ask("readinessProbe")

    async def _ask_grpc(self, port: int, service: str = "") -> None:
        async with connect(f"{self.address}:{port}", is_probe=True) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=PROBE_S
            )
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            raise ConnectionError(f"{self.spec['name']} does not serve {service!r}")

    def _ask_http(self, path: str, port: int, httpHeaders: Any = ()) -> None:
        connection = http.client.HTTPConnection(self.address, port, timeout=PROBE_S)
        try:
            connection.request(
                "GET", path, headers={each["name"]: each["value"] for each in httpHeaders}
            )
            status = connection.getresponse().status
        finally:
            connection.close()
        if not 200 <= status < 400:
            raise ConnectionError(f"{self.spec['name']} answers {status} to {path}")


@dataclass(slots=True, kw_only=True)
class Pod:
    """Its containers by name, the seconds it has to end in, and whether it keeps something for the others."""

    name: str
    address: str
    grace_s: float
    keeps: bool
    containers: dict[str, Container] = field(default_factory=dict)


class Pods:
    """The pods of a manifest, made and not yet started.

    Args:
        manifest: rendered YAML.
        folder: for what they write.
        secrets: by key.
        network: `127.A.B`; the pods are at `.1`, `.2` and so on.
    """

    def __init__(
        self, manifest: str, folder: Path, secrets: Mapping[str, str], *, network: str
    ) -> None:
        objects = [each for each in yaml.safe_load_all(manifest) if each]
        self._folder = folder
        self._secrets = secrets
        self._files = {
            each["metadata"]["name"]: each["data"]
            for each in objects
            if each["kind"] == "ConfigMap"
        }
        workloads = [each for each in objects if each["kind"] in ("Deployment", "StatefulSet")]
        names = [name for each in workloads for name in _pod_names(each)]
        places = {name: f"{network}.{number + 1}" for number, name in enumerate(names)}
        self._places: dict[str, list[str]] = {}
        for each in objects:
            if each["kind"] == "Service":
                service = each["metadata"]["name"]
                for workload in workloads:
                    labels = workload["spec"]["template"]["metadata"]["labels"]
                    if each["spec"]["selector"].items() <= labels.items():
                        pods = {each: places[each] for each in _pod_names(workload)}
                        # Whoever stores something is one, or says itself who the others are.
                        several = workload["kind"] == "Deployment"
                        self._places[service] = [*pods.values()][: None if several else 1]
                        self._places |= {f"{pod}.{service}": [at] for pod, at in pods.items()}
        self.pods = {
            name: self._pod(name, places[name], each)
            for each in workloads
            for name in _pod_names(each)
        }

    async def start(self, *, timeout_s: float = 180.0) -> None:
        """Starts all at once, as a cluster does; returns when every one is ready."""
        await asyncio.gather(
            *(
                each.process.start(each.ready, timeout_s=timeout_s)
                for pod in self.pods.values()
                for each in pod.containers.values()
            )
        )

    async def stop(self) -> None:
        """Ends all, each in the time it has: what has no volume of its own first."""
        for keeps in (False, True):
            await asyncio.gather(
                *(
                    each.process.terminate(grace_s=pod.grace_s)
                    for pod in self.pods.values()
                    for each in pod.containers.values()
                    if pod.keeps == keeps
                )
            )

    def kill(self) -> None:
        """Ends all at once."""
        for pod in self.pods.values():
            for each in pod.containers.values():
                each.process.kill()

    def _pod(self, name: str, address: str, workload: Any) -> Pod:
        spec = workload["spec"]["template"]["spec"]
        pod = Pod(
            name=name,
            address=address,
            grace_s=spec["terminationGracePeriodSeconds"],
            keeps=workload["kind"] == "StatefulSet",
        )
        claimed = {each["name"] for each in spec["containers"][0]["volumeMounts"]}
        volumes = {each["name"]: each for each in spec.get("volumes", [])}
        folders = {each: self._folder / name / each for each in sorted({*volumes, *claimed})}
        for folder in folders.values():
            folder.mkdir(parents=True)
        for container in (*spec.get("initContainers", []), *spec["containers"]):
            mounts = {
                each["mountPath"]: str(folders[each["name"]]) for each in container["volumeMounts"]
            }
            put = _Put(self._places, address, mounts)
            for each in container["volumeMounts"]:
                source = volumes.get(each["name"], {}).get("configMap", {})
                for file, text in self._files.get(source.get("name"), {}).items():
                    (folders[each["name"]] / file).write_text(put(text))
            environment = self._environment(name, container, put)
            program_, *arguments = map(put, container["command"])
            command = (
                sys.executable if program_ == "python" else program(program_),
                *arguments,
            )
            if container in spec.get("initContainers", []):
                subprocess.run(command, env=environment, check=True, timeout=60)
                continue
            process = Process(
                f"{name}/{container['name']}",
                command,
                log=self._folder / name / f"{container['name']}.log",
                environment=environment,
            )
            pod.containers[container["name"]] = Container(
                spec=container, address=address, process=process
            )
        return pod

    def _environment(self, name: str, container: Any, put: _Put) -> dict[str, str]:
        # Where images have what they run: the tree, and this Python's libraries.
        told = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'protos'}"}
        for each in container.get("env", []):
            source = each.get("valueFrom", {})
            if "secretKeyRef" in source:
                value = self._secrets[source["secretKeyRef"]["key"]]
            else:
                value = name if "fieldRef" in source else put(each["value"])
            told[each["name"]] = re.sub(r"\$\((\w+)\)", lambda match: told[match[1]], value)
        return told


class _Put:
    """A text with a pod's own addresses and folders put in."""

    def __init__(
        self, places: Mapping[str, Sequence[str]], address: str, mounts: Mapping[str, str]
    ) -> None:
        longest = "|".join(map(re.escape, sorted(places, key=len, reverse=True)))
        self._names = re.compile(rf"(?<![\w.-])({longest})(:\d+)")
        self._places = places
        self._address = address
        paths = "|".join(map(re.escape, mounts)) or "(?!)"
        self._paths = re.compile(rf"(?<![\w/])(?:{paths})(?![\w-])")
        self._mounts = mounts

    def __call__(self, text: str) -> str:
        # Every pod has a 127.0.0.1 of its own, too.
        text = re.sub(r"\b(?:0\.0\.0\.0|127\.0\.0\.1)\b", self._address, text)
        text = self._names.sub(
            lambda match: ",".join(at + match[2] for at in self._places[match[1]]), text
        )
        return self._paths.sub(lambda match: self._mounts[match[0]], text)


def _pod_names(workload: Mapping[str, Any]) -> list[str]:
    # What something scales has no number.
    count = workload["spec"].get("replicas", 1)
    return [f"{workload['metadata']['name']}-{number}" for number in range(count)]
