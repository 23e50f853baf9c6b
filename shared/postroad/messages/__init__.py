"""Everything that travels between services: one file per direction, so that the protocol is read in a minute."""

from postroad.messages.arrays import Array
from postroad.messages.base import Message, SchemaError, decode, encode
from postroad.messages.dead import DeadLetter, DeadReason
from postroad.messages.event import Event
from postroad.messages.sample import Sample
from postroad.messages.step import Dropped, Step
from postroad.messages.task import EngineFeatures, RewardSpec, Sampling, Task
from postroad.messages.tool import ToolCall, ToolList, ToolResult, ToolStatus
from postroad.messages.trajectory import Trajectory, VersionSpan

__all__ = [
    "Array",
    "DeadLetter",
    "DeadReason",
    "Dropped",
    "EngineFeatures",
    "Event",
    "Message",
    "RewardSpec",
    "Sample",
    "Sampling",
    "SchemaError",
    "Step",
    "Task",
    "ToolCall",
    "ToolList",
    "ToolResult",
    "ToolStatus",
    "Trajectory",
    "VersionSpan",
    "decode",
    "encode",
]
