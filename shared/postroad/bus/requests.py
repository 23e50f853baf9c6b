"""Request and reply between services, for what is worth nothing once its asker is gone: no stream keeps it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError

from postroad.bus.bus import Bus, BusError
from postroad.cancellation import in_own_task
from postroad.messages import Message, SchemaError, decode, encode
from postroad.telemetry.tracing import inject_context, span_from_headers

logger = logging.getLogger(__name__)

PENDING = 4096


class NobodyListens(BusError):
    """No process serves this subject now: the request did not reach anybody."""


class NoReply(BusError):
    """The request may have reached somebody, but no reply came in time."""


async def ask(bus: Bus, subject: str, message: Message, deadline_s: float) -> Message:
    """The reply to `message`. Raises NobodyListens and NoReply."""
    headers = inject_context({})
    try:
        asking = bus.client.request(subject, encode(message), timeout=deadline_s, headers=headers or None)
        return decode((await in_own_task(asking)).data)
    except NoRespondersError as error:
        raise NobodyListens(f"nobody serves {subject}") from error
    except (TimeoutError, NatsError, SchemaError) as error:
        raise NoReply(f"no reply from {subject} within {deadline_s:.0f} s: {error!r}") from error


@contextlib.asynccontextmanager
async def replies(
    bus: Bus, subjects: Mapping[str, str], handler: Callable[[Message], Awaitable[Message | None]], concurrency: int
) -> AsyncIterator[None]:
    """Inside, requests on `subjects` are replied to with what `handler` returns (None: nothing), `concurrency` at a time;
    the others wait in line. A subject's value is its queue group: one of its processes gets each request; "" is none.
    At the end what is in hand is cancelled, and its askers get no reply."""
    room, running = asyncio.Semaphore(concurrency), set[asyncio.Task[None]]()

    async def reply(raw: Msg) -> None:
        with span_from_headers(subject_kind(raw.subject), raw.headers):
            try:
                answer = await handler(decode(raw.data))
                if answer is not None and raw.reply:
                    await raw.respond(encode(answer))
            except (SchemaError, NatsError) as error:
                logger.warning("a request on %s goes without a reply: %r", raw.subject, error)

    async def take(raw: Msg) -> None:
        await room.acquire()
        task = asyncio.create_task(reply(raw))
        running.add(task)
        task.add_done_callback(ended)

    def ended(task: asyncio.Task[None]) -> None:
        room.release()
        running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a request's handler failed", exc_info=error)

    subscriptions = [
        await bus.client.subscribe(subject, queue, cb=take, pending_msgs_limit=PENDING)
        for subject, queue in subjects.items()
    ]
    try:
        yield
    finally:
        with contextlib.suppress(NatsError):
            await asyncio.gather(*(subscription.unsubscribe() for subscription in subscriptions))
        for task in list(running):
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def subject_kind(subject: str) -> str:
    return subject.partition(".")[0]
