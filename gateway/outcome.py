"""What a job has come to, collected from its events: plan, pictures, error.

Main type: `Outcome`. The worker keeps one as it writes the log, and stores it with the job's end, so that whoever asks
for a job that is done need not read how it went.
"""

from collage.v1 import collage_service_pb2

# Kinds of events that tell something of it.
_TELLING = ("planned", "warning", "image", "failed", "cancelled")


class Outcome:
    """The fields of a `Job` that its log tells."""

    def __init__(self, told: bytes = b"") -> None:
        self.job = collage_service_pb2.Job.FromString(told)
        # Numbers of the events that are in.
        self._added: set[int] = set()

    def add(self, event: collage_service_pb2.JobEvent, sequence: int) -> None:
        """The log's event of this number; one that is in already changes nothing."""
        if event.WhichOneof("kind") in _TELLING and sequence not in self._added:
            self._added.add(sequence)
            self.end(event)

    def end(self, event: collage_service_pb2.JobEvent) -> None:
        """The last event, which has no number before it is stored."""
        kind = event.WhichOneof("kind")
        plan = self.job.plan
        if kind == "planned":
            # A word that failed may be told before the plan is.
            earlier = list(plan.warnings)
            plan.CopyFrom(event.planned.plan)
            plan.warnings.extend(each for each in earlier if each not in plan.warnings)
        elif kind == "warning" and event.warning not in plan.warnings:
            plan.warnings.append(event.warning)
        elif kind == "image":
            self.job.images.append(event.image)
            self.job.images.sort(key=lambda image: image.index)
        elif kind in ("failed", "cancelled"):
            self.job.error.CopyFrom(getattr(event, kind))

    def dump(self) -> bytes:
        """For `Jobs.finish`."""
        return self.job.SerializeToString(deterministic=True)
