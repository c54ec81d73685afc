"""A stage as a model of Triton's Python backend: Triton's tensors in and out of a `Host`, and nothing else.

Tensors cross as DLPack both ways: a numpy array given to Triton 2.51 under numpy 2 becomes an empty output.
"""

import json
from typing import Any

import torch
import triton_python_backend_utils as pb_utils  # the backend puts it on the path
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from services.common.telemetry import start_logging
from services.generator.triton import wire
from services.generator.triton.host import Asked, Failure, Host, Spec, told


class TritonPythonModel:
    """What the backend makes of this file."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the networks; what is raised here is why the model is not ready."""
        config = json.loads(args["model_config"])
        start_logging(config["name"], level="INFO")
        self._host = Host(Spec.from_json(config["parameters"]["collage"]["string_value"]))
        # Held here: without its family a metric is none.
        self._family = pb_utils.MetricFamily(
            name="collage_kept_bytes",
            description="What a stage holds of jobs",
            kind=pb_utils.MetricFamily.GAUGE,
        )
        self._kept_bytes = self._family.Metric(labels={"model": config["name"]})

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers requests, those of `predict` together where they may be."""
        if self._host.spec.stage != "predict":
            return [self._alone(request) for request in requests]
        asked = {
            index: _asked(request)
            for index, request in enumerate(requests)
            if not request.is_cancelled()
        }
        answers = dict(zip(asked, self._host.predict(list(asked.values())), strict=True))
        self._kept_bytes.set(self._host.kept_bytes)
        nobody = Failure(wire.failure("CANCELLED", "nobody waits for it"))
        return [
            _refused(answer) if isinstance(answer, Exception) else _told({"noise": answer})
            for index in range(len(requests))
            for answer in [answers.get(index, nobody)]
        ]

    def _alone(self, request: Any) -> Any:
        try:
            return _told(self._answer(request))
        except Exception as error:
            return _refused(error)

    def _answer(self, request: Any) -> dict[str, torch.Tensor]:
        host = self._host
        host.check(_parameters(request).get("digest", ""))
        if host.spec.stage == "encode_text":
            states = host.encode_text(_tensor(request, "texts").numpy().tobytes())
            answer = {"hidden": states.hidden_BTD}
            return answer if states.pooled_BP is None else {**answer, "pooled": states.pooled_BP}
        if host.spec.stage == "encode_image":
            return {"z": host.encode_image(_tensor(request, "rgb"))}
        return {"rgb": host.decode_image(_tensor(request, "z"))}


def _asked(request: Any) -> Asked:
    parameters = _parameters(request)
    has_items = pb_utils.get_input_tensor_by_name(request, "items") is not None
    return Asked(
        digest=parameters.get("digest", ""),
        x_BChw=_tensor(request, "x"),
        timestep_B=_tensor(request, "timestep")[:, 0],
        gain_B=_tensor(request, "gain")[:, 0],
        key_BK=_tensor(request, "key"),
        items=_tensor(request, "items") if has_items else None,
        may_share=bool(parameters.get("may_share")),
    )


def _parameters(request: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(request.parameters() or "{}")
    return found


def _tensor(request: Any, name: str) -> torch.Tensor:
    # A copy: the memory is Triton's.
    given: torch.Tensor = from_dlpack(pb_utils.get_input_tensor_by_name(request, name).to_dlpack())  # type: ignore[no-untyped-call]
    return given.clone()


def _told(tensors: dict[str, torch.Tensor]) -> Any:
    return pb_utils.InferenceResponse(
        output_tensors=[
            pb_utils.Tensor.from_dlpack(name, to_dlpack(tensor.detach().cpu().contiguous()))
            for name, tensor in tensors.items()
        ]
    )


def _refused(error: Exception) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(told(error)))
