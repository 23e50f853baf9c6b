"""A hop of the road: take a message, work on it with heartbeats, and acknowledge it only after its effect is durable."""

from __future__ import annotations

import asyncio
import logging
import random
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from postroad.bus.bus import Bus, BusError
from postroad.bus.claims import ClaimLost
from postroad.bus.pull import Puller, Room
from postroad.messages import DeadLetter, DeadReason, Message, SchemaError
from postroad.telemetry.tracing import span_from_headers

logger = logging.getLogger(__name__)

ACK_DEADLINE_S = 5.0
RESUBSCRIBE_S = 0.2
BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0)


class RetryLater(Exception):
    """The work failed for a reason that is not the message's: deliver it again. `reason` is counted."""

    def __init__(self, reason: DeadReason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class Reject(Exception):
    """The message can't ever be worked on: to DEAD with `reason`, at once."""

    def __init__(self, reason: DeadReason, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason


@dataclass
class Hop:
    """One kind of work. `handler` returns when its output is acknowledged, or raises RetryLater or Reject."""

    stream: str
    name: str
    stage: Literal["task", "trajectory", "sample"]
    handler: Callable[[Message], Awaitable[None]]
    concurrency: int
    ack_wait_s: float = 10.0
    deliveries: int = 20
    counts: dict[str, int] = field(default_factory=dict)

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


async def work(bus: Bus, hop: Hop, stop: asyncio.Event) -> None:
    """Run `hop` until `stop` is set; then finish what is in hand. At most `hop.concurrency` messages are in hand."""
    in_hand: dict[str, Msg] = {}  # by the reply subject, which is the delivery's own
    beating = asyncio.create_task(_heartbeats(in_hand, hop.ack_wait_s / 3))
    try:
        async with asyncio.TaskGroup() as group:
            while not stop.is_set():
                puller = await _puller(bus, hop, in_hand, group)
                try:
                    await puller.run(stop)
                except (NatsError, BusError) as error:
                    logger.info("%s: consumer lost (%r); subscribing again", hop.name, error)
                    await asyncio.sleep(RESUBSCRIBE_S)
    finally:
        beating.cancel()


async def work_and_drain(
    bus: Bus, hop: Hop, stop: asyncio.Event, *, drain_s: float, on_drain: Callable[[], None]
) -> None:
    """Run `hop` until `stop` is set; then finish what is in hand within `drain_s`: the rest is delivered again."""
    working = asyncio.create_task(work(bus, hop, stop))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            on_drain()
            await asyncio.wait({working}, timeout=drain_s)
        if working.done():
            working.result()
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


async def _puller(bus: Bus, hop: Hop, in_hand: dict[str, Msg], group: asyncio.TaskGroup) -> Puller:
    """A puller on the hop's durable consumer, which is created or brought up to date."""
    config = ConsumerConfig(
        durable_name=f"{hop.name}-{bus.subjects.run}", ack_policy=AckPolicy.EXPLICIT, ack_wait=hop.ack_wait_s,
        deliver_policy=DeliverPolicy.ALL, max_deliver=hop.deliveries + 5, max_ack_pending=10_000,
        filter_subject=bus.subjects.all(hop.stream),
    )  # fmt: skip
    await bus.with_retries(lambda: bus.jetstream.add_consumer(hop.stream, config), f"subscribe {config.durable_name}")

    def take(raw: Msg) -> None:
        in_hand[raw.reply] = raw
        group.create_task(_handle_and_release(bus, hop, raw, in_hand, puller))

    puller = Puller(bus.client, hop.stream, str(config.durable_name), take, Room(hop.concurrency, in_hand))
    return puller


async def _handle_and_release(bus: Bus, hop: Hop, raw: Msg, in_hand: dict[str, Msg], puller: Puller) -> None:
    try:
        await handle(bus, hop, raw)
    except (TimeoutError, NatsError, BusError) as error:
        hop.count("redelivered")
        logger.info("%s: %s goes back to the stream: %r", hop.name, raw.subject, error)
    finally:
        del in_hand[raw.reply]
    await puller.ask()


async def handle(bus: Bus, hop: Hop, raw: Msg) -> None:
    """One delivery, from decoding to acknowledgement."""
    with span_from_headers(hop.name, raw.headers):
        try:
            if raw.metadata.num_delivered > hop.deliveries:
                raise Reject("deliveries_exhausted", f"{raw.metadata.num_delivered - 1} deliveries failed")
            message = await bus.read_payload(raw.data)
            if message.run != bus.subjects.run:
                raise Reject("invalid_message", f"a message of run {message.run!r} on {raw.subject}")
            await hop.handler(message)
        except (SchemaError, ClaimLost) as error:
            await _bury(bus, hop, raw, _rejection("invalid_message", error))
        except Reject as rejection:
            await _bury(bus, hop, raw, rejection)
        except RetryLater as retry:
            await _retry(bus, hop, raw, retry)
        else:
            hop.count("done")
            await raw.ack_sync(timeout=ACK_DEADLINE_S)


async def _retry(bus: Bus, hop: Hop, raw: Msg, retry: RetryLater) -> None:
    deliveries = raw.metadata.num_delivered
    if deliveries >= hop.deliveries:
        await _bury(bus, hop, raw, _rejection(retry.reason, retry))
        return
    hop.count(f"retry_{retry.reason}")
    logger.warning("%s: %s again after %r", hop.name, raw.subject, retry)
    await raw.nak(delay=BACKOFF_S[min(deliveries - 1, len(BACKOFF_S) - 1)] * random.uniform(0.5, 1.5))


def _rejection(reason: DeadReason, cause: Exception) -> Reject:
    """A Reject whose traceback shows `cause` and what caused that."""
    rejection = Reject(reason, str(cause))
    rejection.__cause__ = cause
    return rejection


async def _bury(bus: Bus, hop: Hop, raw: Msg, rejection: Reject) -> None:
    """To DEAD first, and only then off the stream."""
    hop.count(f"dead_{rejection.reason}")
    tokens = raw.subject.split(".")
    letter = DeadLetter(
        run=bus.subjects.run, id=f"{hop.stream}.{raw.metadata.sequence.stream}", stage=hop.stage,
        reason=rejection.reason, error=str(rejection), group=tokens[2] if len(tokens) > 2 else "",
        traceback="".join(traceback.format_exception(rejection)),
        member=int(tokens[3]) if len(tokens) > 3 and tokens[3].isdigit() else None, source=raw.subject,
        sequence=raw.metadata.sequence.stream, payload=raw.data, created=time.time(),
    )  # fmt: skip
    logger.error("%s: %s is dead (%s): %s", hop.name, raw.subject, rejection.reason, rejection)
    await bus.publish(bus.subjects.dead(hop.stage), letter)
    await raw.term()


async def _heartbeats(in_hand: dict[str, Msg], interval_s: float) -> None:
    """Tell the server, again and again, that what is in hand is being worked on."""
    while True:
        await asyncio.sleep(interval_s)
        for raw in list(in_hand.values()):
            try:
                await raw.in_progress()
            except NatsError as error:
                logger.info("heartbeat of %s failed: %r", raw.subject, error)
