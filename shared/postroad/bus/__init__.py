"""The road: JetStream streams, durable publishing, work consumers and replay."""

from postroad.bus.bus import AlreadyPublished, Bus, BusError, InvalidMessage, LoggedMessage
from postroad.bus.requests import NobodyListens, NoReply, ask, replies
from postroad.bus.streams import STREAMS, Subjects
from postroad.bus.work import Hop, Reject, RetryLater, work, work_and_drain

__all__ = [
    "STREAMS",
    "AlreadyPublished",
    "Bus",
    "BusError",
    "Hop",
    "InvalidMessage",
    "LoggedMessage",
    "NoReply",
    "NobodyListens",
    "Reject",
    "RetryLater",
    "Subjects",
    "ask",
    "replies",
    "work",
    "work_and_drain",
]
