"""A connection to the road: durable publishing, reading back, and replay. Consumers of work are in work.py."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import ConnectionClosedError, NoRespondersError, NoServersError
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, RawStreamMsg, StreamConfig
from nats.js.errors import APIError, BadRequestError, NoStreamResponseError, NotFoundError, ServiceUnavailableError

from postroad.bus.claims import ClaimLost, check_in, check_out
from postroad.bus.streams import CLAIM_CHECK_BYTES, STREAMS, Subjects
from postroad.cancellation import in_own_task
from postroad.messages import Message, SchemaError, decode, encode
from postroad.telemetry.tracing import inject_context

logger = logging.getLogger(__name__)

PUBLISH_DEADLINE_S = 60.0
ATTEMPT_S = 5.0
FETCH_S = 5.0
READ_BATCH = 256
_WRONG_LAST_SEQUENCE = 10071
_TRANSIENT = (asyncio.TimeoutError, NoRespondersError, NoStreamResponseError, ServiceUnavailableError, OSError)
_Result = TypeVar("_Result")


class BusError(RuntimeError):
    """The road refused something, in a sentence that names the remedy."""


class AlreadyPublished(BusError):
    """A message that may stand only once on its subject stands there already."""


@dataclass(frozen=True)
class LoggedMessage:
    """A message and its place in its stream."""

    sequence: int
    subject: str
    message: Message


@dataclass(frozen=True)
class InvalidMessage:
    """Bytes in a stream that are no message, and why."""

    sequence: int
    subject: str
    payload: bytes
    error: str


async def fetch(subscription: JetStreamContext.PullSubscription, count: int) -> list[Msg]:
    """Up to `count` messages; none after FETCH_S seconds."""
    try:
        return await in_own_task(subscription.fetch(count, timeout=FETCH_S))
    except TimeoutError:
        return []


class Bus:
    """One NATS connection of one run. `connect` waits for the server up to its deadline."""

    def __init__(self, client: Client, run: str) -> None:
        self.client = client
        self.jetstream: JetStreamContext = client.jetstream(timeout=ATTEMPT_S)
        self.subjects = Subjects(run)
        self.retries = 0

    @classmethod
    async def connect(cls, url: str, run: str, *, deadline_s: float = 30.0) -> Bus:
        async def on_error(error: Exception) -> None:
            logger.warning("nats: %s", error)

        started = time.monotonic()
        while True:  # the client's own first connection retries for ever where reconnection is allowed: knock first
            try:
                probe = await nats.connect(
                    url, allow_reconnect=False, connect_timeout=2, reconnect_time_wait=0.05, error_cb=on_error
                )
                await probe.close()
                break
            except (TimeoutError, NoServersError, OSError, NatsError) as error:
                if "authorization" in str(error).lower():
                    raise BusError("NATS refuses these credentials: is this the NATS of another run?") from error
                if time.monotonic() - started > deadline_s:
                    raise BusError(f"no NATS server answered within {deadline_s:.0f} s: {error}") from error
                await asyncio.sleep(0.1)
        opening = nats.connect(
            url, max_reconnect_attempts=-1, reconnect_time_wait=0.1, connect_timeout=2, allow_reconnect=True,
            error_cb=on_error, ping_interval=10, max_outstanding_pings=3, pending_size=64 * 1024 * 1024,
        )  # fmt: skip
        return cls(await asyncio.wait_for(opening, deadline_s), run)

    async def close(self) -> None:
        try:
            await asyncio.wait_for(self.client.drain(), 2)
        except (TimeoutError, NatsError, ConnectionClosedError):
            await self.client.close()

    async def create_streams(self) -> None:
        """Create what is missing. An existing stream keeps its messages; its limits are brought up to date."""
        for config in STREAMS.values():
            await self.with_retries(partial(self._create, config), f"create stream {config.name}")

    async def _create(self, config: StreamConfig) -> None:
        try:
            await self.jetstream.add_stream(config)
        except BadRequestError:
            await self.jetstream.update_stream(config)

    async def publish(
        self, subject: str, message: Message, *, once: bool = False, deadline_s: float = PUBLISH_DEADLINE_S
    ) -> int:
        """Publish and wait until the message is on disk; its sequence in the stream. Retried with the same message id
        until `deadline_s`. With `once`, a subject holds one message for ever: AlreadyPublished where it has another.
        """
        if message.run != self.subjects.run:
            raise BusError(f"a message of run {message.run!r} can't be published by run {self.subjects.run!r}")
        payload = encode(message)
        if len(payload) > CLAIM_CHECK_BYTES:
            blob = self.subjects.blob(message.kind)
            data = payload
            payload = await self.with_retries(
                lambda: check_in(self.jetstream, blob, data, ATTEMPT_S), f"store a payload for {subject}", deadline_s
            )
        headers = inject_context({"Nats-Msg-Id": f"{subject}.{message.id}"})
        if once:
            headers["Nats-Expected-Last-Subject-Sequence"] = "0"

        async def attempt() -> int:
            try:
                ack = await self.jetstream.publish(subject, payload, timeout=ATTEMPT_S, headers=headers)
            except APIError as error:
                if error.err_code == _WRONG_LAST_SEQUENCE:
                    raise AlreadyPublished(f"{subject} holds a message already") from error
                raise
            return int(ack.seq)

        return await self.with_retries(attempt, f"publish to {subject}", deadline_s)

    async def announce(self, subject: str, payload: bytes) -> None:
        """A hint to whoever listens; not durable. Nobody may rely on it alone."""
        await self.client.publish(subject, payload)

    async def read_payload(self, data: bytes) -> Message:
        return decode(await self.payload(data))

    async def payload(self, data: bytes) -> bytes:
        """The bytes of a message, fetched from BLOBS where they were left there."""
        return await self.with_retries(lambda: check_out(self.jetstream, data), "fetch a claim-checked payload")

    async def get(self, stream: str, sequence: int) -> LoggedMessage:
        """The message at `sequence`. Raises BusError where the log no longer holds it."""

        async def attempt() -> LoggedMessage:
            try:
                raw = await self.jetstream.get_msg(stream, seq=sequence)
            except NotFoundError as error:
                raise BusError(f"{stream} no longer holds sequence {sequence}") from error
            return await self._logged(raw, sequence)

        return await self.with_retries(attempt, f"read {stream} {sequence}")

    async def last(self, stream: str, subject: str) -> LoggedMessage | None:
        """The newest message on `subject`, or None."""

        async def attempt() -> LoggedMessage | None:
            try:
                raw = await self.jetstream.get_last_msg(stream, subject)
            except NotFoundError:
                return None
            return await self._logged(raw, raw.seq or 0)

        return await self.with_retries(attempt, f"read the last of {subject}")

    async def last_sequence(self, stream: str) -> int:
        info = await self.with_retries(lambda: self.jetstream.stream_info(stream), f"look at {stream}")
        return int(info.state.last_seq)

    async def subjects_of(self, stream: str, subject_filter: str) -> dict[str, int]:
        """Subjects under `subject_filter` that hold messages, with their number."""
        info = await self.with_retries(
            lambda: self.jetstream.stream_info(stream, subjects_filter=subject_filter), f"look at {stream}"
        )
        return dict(info.state.subjects or {})

    async def _logged(self, raw: RawStreamMsg, sequence: int) -> LoggedMessage:
        data = await check_out(self.jetstream, raw.data or b"")
        return LoggedMessage(sequence=sequence, subject=raw.subject or "", message=decode(data))

    async def replay(
        self, stream: str, *, start: int = 1, subject_filter: str | None = None, follow: bool = False
    ) -> AsyncIterator[LoggedMessage | InvalidMessage | None]:
        """Messages of this run from sequence `start`, in order. Ends at the end of the stream, or, with `follow`, yields
        None every FETCH_S seconds there and goes on. Survives a restart of the server without gap or repetition.
        What does not decode is yielded as InvalidMessage, for the reader to dead-letter or to pass over."""
        subject = subject_filter or self.subjects.all(stream)
        position, end = start, await self.last_sequence(stream)
        while follow or position <= end:
            subscription = await self.with_retries(
                partial(self._reader, stream, subject, position), f"read {stream} from {position}"
            )
            try:
                pending = (await subscription.consumer_info()).num_pending or 0
                while follow or (pending and position <= end):
                    # a fetch of n waits for all n: ask for what is there, or for one
                    batch = await fetch(subscription, min(max(pending, 1), READ_BATCH))
                    if not batch:
                        yield None
                        pending = (await subscription.consumer_info()).num_pending or 0  # raises where it is lost
                    for raw in batch:
                        position, pending = raw.metadata.sequence.stream + 1, raw.metadata.num_pending or 0
                        yield await self._decoded(raw)
                if not follow:
                    return
            except (TimeoutError, NatsError) as error:
                logger.info("reader of %s lost at %d: %r", stream, position, error)
                await asyncio.sleep(0.1)
            finally:
                await self._close_reader(subscription)

    async def _decoded(self, raw: Msg) -> LoggedMessage | InvalidMessage:
        sequence = raw.metadata.sequence.stream
        try:
            return LoggedMessage(sequence, raw.subject, await self.read_payload(raw.data))
        except (SchemaError, ClaimLost) as error:
            return InvalidMessage(sequence, raw.subject, raw.data, str(error))

    async def _reader(self, stream: str, subject: str, position: int) -> JetStreamContext.PullSubscription:
        config = ConsumerConfig(
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=max(position, 1),
            ack_policy=AckPolicy.NONE, inactive_threshold=60.0, mem_storage=True, max_deliver=1,
        )  # fmt: skip
        return await self.jetstream.pull_subscribe(subject, stream=stream, config=config)

    async def _close_reader(self, subscription: JetStreamContext.PullSubscription) -> None:
        try:
            info = await subscription.consumer_info()
            await subscription.unsubscribe()
            await self.jetstream.delete_consumer(info.stream_name, info.name)
        except (TimeoutError, NatsError, ConnectionClosedError) as error:
            logger.debug("reader not closed: %s", error)  # it expires by itself

    async def with_retries(
        self, attempt: Callable[[], Awaitable[_Result]], what: str, deadline_s: float = PUBLISH_DEADLINE_S
    ) -> _Result:
        """Run `attempt` until it succeeds, fails for good, or `deadline_s` has passed."""
        started, pause_s = time.monotonic(), 0.05
        while True:
            try:
                return await attempt()
            except _TRANSIENT as error:
                if self.client.is_closed:
                    raise BusError(f"could not {what}: the connection is closed") from error
                if time.monotonic() - started > deadline_s:
                    raise BusError(f"could not {what} within {deadline_s:.0f} s: {error!r}") from error
                self.retries += 1
                logger.info("retry to %s: %r", what, error)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, 1.0)
