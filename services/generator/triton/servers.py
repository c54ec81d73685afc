"""The model servers: which is asked, what is done about one that fails, and when to give up.

Main type: `Servers`. Every call is stateless, so one that was lost is asked again of another server with the same
bytes. Of a server whose process for a model has died Triton keeps saying that it is ready (2.51): the remedy is to have
it unload the model and load it again, which is done here. This module knows no tensors' meaning.
"""

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import tritonclient.grpc as triton
from numpy.typing import NDArray
from prometheus_client import Counter as Count
from prometheus_client import Histogram
from tritonclient.utils import InferenceServerException

from services.common.errors import Internal, ModelUnusable, Unavailable
from services.common.telemetry import log
from services.generator.call import NotWanted
from services.generator.triton import wire

CALL_SECONDS = Histogram(
    "collage_generator_server_seconds", "One call of a model server", ["model", "server"]
)
CROSSED_BYTES = Count(
    "collage_generator_crossed_bytes_total", "Sent to model servers and got", ["model", "way"]
)
LOST_CALLS = Count(
    "collage_generator_lost_calls_total",
    "Calls that another try had to answer",
    ["model", "server"],
)

# Longer than a server takes to start and load.
PATIENCE_S = 180.0
# A server that failed is left alone for so long, twice as long each time, and at most this long.
FIRST_REST_S, LONGEST_REST_S = 0.1, 5.0
# A model that a server could not load, or has another of, is not asked of it for so long; its other models are.
REFUSED_S = 10.0
# Of a server's words about itself, what is passed on.
_TOLD = 500
# How often somebody who waits is asked whether the answer is wanted still.
LOOK_EVERY_S = 0.05
# Loading waits for weights from slow storage.
LOAD_LIMIT_S = 900.0
# A name of many addresses (a headless service) is looked up again after so long.
LOOK_UP_EVERY_S = 10.0
_MOST_BYTES = 2**31 - 1
_OPTIONS = [
    ("grpc.max_send_message_length", _MOST_BYTES),
    ("grpc.max_receive_message_length", _MOST_BYTES),
    # Within a cluster no proxy stands between.
    ("grpc.enable_http_proxy", 0),
    # A machine that is gone says nothing; nothing else is waited for without an end.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_SENT = "sent"
_GOT = "got"
# What Triton says of a model whose process died, and of one that is not loaded, or not yet.
_DEAD = ("is not healthy", "Stub process", "failed to launch")
_ABSENT = ("is not found", "is not ready", "unknown model", "has no available versions")
# What may be otherwise at another server, or later.
_PASSING = ("UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNKNOWN")

Tensors = Mapping[str, torch.Tensor]


class NotHeld(Exception):
    """The server that was asked does not hold what the call names."""

    def __init__(self, missing: Sequence[bytes]) -> None:
        super().__init__(f"{len(missing)} things are not held")
        self.missing = frozenset(missing)


class OtherModel(Exception):
    """The server that was asked has another model of that name: it is being changed."""


@dataclass(slots=True, kw_only=True, eq=False)
class Server:
    """One server.

    held: what is known to be held there, by model and digest. dead: how often a model was found dead since it answered
    last. resting_until_s: it failed lately. refused: why it cannot answer for a model, and until when that is believed.
    """

    address: str
    client: Any
    calls: int = 0
    rest_s: float = FIRST_REST_S
    resting_until_s: float = 0.0
    held: dict[str, set[bytes]] = field(default_factory=dict)
    dead: Counter[str] = field(default_factory=Counter)
    refused: dict[str, tuple[str, float]] = field(default_factory=dict)
    healing: threading.Lock = field(default_factory=threading.Lock)

    def refusal(self, model: str, now_s: float) -> str | None:
        """Why it cannot answer for a model; None where it can, as far as is known."""
        why, until_s = self.refused.get(model, ("", 0.0))
        return why if now_s < until_s else None


class Servers:
    """Asks servers by turns, the least busy first. May be used from several threads.

    Args:
        names: HOST:PORT of each; a host's name stands for all its addresses.
        patience_s: how long a call is asked again of whoever may answer.
    """

    def __init__(self, names: Sequence[str], *, patience_s: float = PATIENCE_S) -> None:
        assert names, "at least one server is asked"
        self._names = tuple(names)
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._servers: dict[str, Server] = {}
        self._looked_up_s = -float("inf")
        self._turn = 0

    def ask(
        self,
        model: str,
        inputs: Callable[[Server], Tensors],
        *,
        outputs: Sequence[str],
        is_wanted: Callable[[], bool],
        parameters: Mapping[str, Any] | None = None,
        request_id: str = "",
    ) -> dict[str, torch.Tensor]:
        """What a model answers.

        Args:
            model: as Triton calls it.
            inputs: made for the server that is asked, which may lack more or less.
            outputs: which there are.
            is_wanted: asked now and then while the answer is waited for.
            parameters: of the request.
            request_id: stands in the server's traces.

        Raises:
            NotWanted: it is not wanted any more; the server was told.
            Unavailable: nobody answered for so long as its patience lasts.
            ModelUnusable: every server has another model of that name, or cannot load it.
            Internal: the model failed.
        """
        until_s = time.monotonic() + self._patience_s
        last = ""
        while True:
            server = self._next(until_s, model, is_wanted, last)
            with self._lock:
                server.calls += 1
            try:
                answer = self._once(
                    server, model, inputs(server), outputs, is_wanted, parameters, request_id
                )
            except NotHeld as error:
                server.held.setdefault(model, set()).difference_update(error.missing)
            except InferenceServerException as error:
                LOST_CALLS.labels(model, server.address).inc()
                last = self._failed(server, model, error)
            except OtherModel as error:
                last = self._refuses(server, model, f"is another model: {error}")
            else:
                server.rest_s = FIRST_REST_S
                server.dead.pop(model, None)
                return answer
            finally:
                with self._lock:
                    server.calls -= 1

    def parameter(self, model: str, name: str) -> str:
        """A parameter of a model's configuration, of whichever server answers; "" for none. Raises as `ask`."""
        until_s = time.monotonic() + self._patience_s
        last = ""
        while True:
            server = self._next(until_s, model, lambda: True, last)
            try:
                found = server.client.get_model_config(model, client_timeout=LOAD_LIMIT_S)
            except InferenceServerException as error:
                last = self._failed(server, model, error)
            else:
                return str(found.config.parameters[name].string_value)

    def close(self) -> None:
        """Closes every connection."""
        with self._lock:
            for server in self._servers.values():
                server.client.close()

    def _once(
        self,
        server: Server,
        model: str,
        tensors: Tensors,
        outputs: Sequence[str],
        is_wanted: Callable[[], bool],
        parameters: Mapping[str, Any] | None,
        request_id: str,
    ) -> dict[str, torch.Tensor]:
        done = threading.Event()
        found: list[Any] = []

        def told(result: Any, error: InferenceServerException | None) -> None:
            found.append(error or result)
            done.set()

        start_s = time.monotonic()
        call = server.client.async_infer(
            model,
            [_input(name, tensor.numpy()) for name, tensor in tensors.items()],
            told,
            outputs=[triton.InferRequestedOutput(name) for name in outputs],
            parameters=dict(parameters or {}),
            request_id=request_id,
        )
        while not done.wait(LOOK_EVERY_S):
            if not is_wanted():
                call.cancel()
                raise NotWanted("nobody waits for the answer")
        result = found[0]
        if isinstance(result, InferenceServerException):
            if (said := wire.failure_of(result.message())) is not None:
                raise _of_model(said) from result
            raise result
        answer = {}
        for name in outputs:
            array = result.as_numpy(name)
            if array is None or array.size == 0:
                raise Internal(
                    f"{model} at {server.address} answered no {name}", reason="NO_ANSWER"
                )
            answer[name] = torch.from_numpy(array.copy())
        CALL_SECONDS.labels(model, server.address).observe(time.monotonic() - start_s)
        CROSSED_BYTES.labels(model, _SENT).inc(sum(each.nbytes for each in tensors.values()))
        CROSSED_BYTES.labels(model, _GOT).inc(sum(each.nbytes for each in answer.values()))
        return answer

    def _next(self, until_s: float, model: str, is_wanted: Callable[[], bool], last: str) -> Server:
        """The least busy of those that did not fail lately, as soon as there is one; `last` is how one failed."""
        while True:
            if not is_wanted():
                raise NotWanted("nobody waits for the answer")
            now_s = time.monotonic()
            self._look_up(now_s)
            with self._lock:
                servers = list(self._servers.values())
                able = [each for each in servers if each.refusal(model, now_s) is None]
                if servers and not able:
                    whys = "; ".join(
                        f"{each.address}: {each.refusal(model, now_s)}" for each in servers
                    )
                    raise ModelUnusable(f"no model server can run {model}: {whys}")
                awake = [each for each in able if each.resting_until_s <= now_s]
                if awake:
                    least = min(each.calls for each in awake)
                    free = [each for each in awake if each.calls == least]
                    self._turn += 1
                    return free[self._turn % len(free)]
            if now_s > until_s:
                names = ", ".join(self._names)
                told = f"no model server answered for {self._patience_s:.0f} s: {names}"
                raise Unavailable(f"{told}; {last}" if last else told, reason="MODEL_SERVERS")
            time.sleep(LOOK_EVERY_S)

    def _failed(self, server: Server, model: str, error: InferenceServerException) -> str:
        """What is done about a server that failed, and how it did; raises where no other would answer otherwise."""
        message, status = error.message() or "", str(error.status())
        log.warning(
            "model server failed", server=server.address, model=model, error=message[:_TOLD]
        )
        is_dead = any(sign in message for sign in _DEAD)
        is_absent = any(sign in message for sign in _ABSENT)
        if not (is_dead or is_absent or status.endswith(_PASSING)):
            # Another server would say the same: the model is another than this one's caller.
            raise Internal(f"the model server: {model}: {message}", reason="MODEL_SERVER")
        server.dead[model] += is_dead
        # At the second time: another generator may have seen it too, and be at it.
        if server.dead[model] > 1 or is_absent:
            why = self._load(server, model, is_dead=is_dead)
            if why:
                return self._refuses(server, model, why)
        if status.endswith("UNAVAILABLE") and not is_absent:
            # It starts anew, and holds nothing.
            server.held.clear()
        self._rest(server)
        return f"{model} at {server.address}: {message[:_TOLD]}"

    def _refuses(self, server: Server, model: str, why: str) -> str:
        """Remembers for a while that a server cannot answer for a model, and says so."""
        # Of the server's own words the first: behind them stands where in its code it was.
        why = why.partition("\n")[0]
        with self._lock:
            server.refused[model] = (why[:_TOLD], time.monotonic() + REFUSED_S)
        log.warning(
            "model server refuses a model", server=server.address, model=model, error=why[:_TOLD]
        )
        return f"{model} at {server.address}: {why[:_TOLD]}"

    def _rest(self, server: Server) -> None:
        with self._lock:
            server.resting_until_s = time.monotonic() + server.rest_s
            server.rest_s = min(2 * server.rest_s, LONGEST_REST_S)

    def _load(self, server: Server, model: str, *, is_dead: bool) -> str:
        """Has a server load a model, one that is dead anew; nothing where another thread does already.

        Answers why the model cannot be loaded there; "" where it was, or where the server is at fault.
        """
        if not server.healing.acquire(blocking=False):
            return ""
        try:
            server.held.pop(model, None)
            if is_dead:
                with suppress(InferenceServerException):
                    server.client.unload_model(model, client_timeout=LOAD_LIMIT_S)
            server.client.load_model(model, client_timeout=LOAD_LIMIT_S)
        except InferenceServerException as error:
            why = error.message() or ""
            if not str(error.status()).endswith(_PASSING):
                return why
            log.warning("model not loaded", server=server.address, model=model, error=why[:_TOLD])
            return ""
        finally:
            server.healing.release()
        server.dead.pop(model, None)
        server.rest_s = FIRST_REST_S
        log.info("model loaded", server=server.address, model=model)
        return ""

    def _look_up(self, now_s: float) -> None:
        """Looks up who there is; who is known stays where a name cannot be looked up."""
        with self._lock:
            if now_s - self._looked_up_s < LOOK_UP_EVERY_S and self._servers:
                return
            self._looked_up_s = now_s
        addresses = []
        for name in self._names:
            host, _, port = name.rpartition(":")
            try:
                found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
            except OSError as error:
                log.warning("model server not found", name=name, error=str(error))
                addresses += [each for each in self._servers if each.endswith(f":{port}")]
                continue
            for *_, place in found:
                ip = f"[{place[0]}]" if ":" in str(place[0]) else place[0]
                addresses.append(f"{ip}:{port}")
        with self._lock:
            for address in dict.fromkeys(addresses):
                if address not in self._servers:
                    client = triton.InferenceServerClient(address, channel_args=_OPTIONS)
                    self._servers[address] = Server(address=address, client=client)
            for address in self._servers.keys() - addresses:
                # Its calls under way end as calls of a server that is lost do.
                self._servers.pop(address).client.close()


def _of_model(said: Mapping[str, Any]) -> Exception:
    if said.get("reason") == wire.NOT_HELD:
        return NotHeld([bytes.fromhex(each) for each in said.get("missing", ())])
    if said.get("reason") == wire.OTHER_MODEL:
        return OtherModel(said.get("message"))
    if said.get("reason") == "OUT_OF_MEMORY":
        return MemoryError(str(said.get("message")))
    return Internal(f"the model server: {said.get('message')}", reason=str(said.get("reason")))


def _input(name: str, array: NDArray[Any]) -> Any:
    kind = {np.dtype(np.float32): "FP32", np.dtype(np.uint8): "UINT8"}[array.dtype]
    given = triton.InferInput(name, list(array.shape), kind)
    given.set_data_from_numpy(np.ascontiguousarray(array))
    return given
