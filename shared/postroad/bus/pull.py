"""Standing pull requests: the server sends messages as they come, and never more than there is room for.

nats-py's fetch asks, waits for the answer and asks again: a round trip per batch, behind a server that is busy syncing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Sized
from dataclasses import dataclass

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

logger = logging.getLogger(__name__)

EXPIRES_S = 5.0
SILENCE_S = EXPIRES_S + 2.0
WATCH_S = 0.25
CLOSE_S = 2.0
_EXPIRED = ("404", "408")


class ConsumerLost(NatsError):
    """The server does not answer for the consumer, or the connection was made anew: subscribe again."""


@dataclass(frozen=True)
class Room:
    """At most `limit` messages are in hand; `taken` are those that are."""

    limit: int
    taken: Sized

    def free(self) -> int:
        return self.limit - len(self.taken)


class Puller:
    """Gives the messages of a durable consumer to `take` (which puts them into `room`), while there is room.

    There is a request at the server whenever there is room. Requests are as large as the room and are sent when a
    quarter of it is free or none is at the server, so that asking costs little per message.
    """

    def __init__(self, client: Client, stream: str, consumer: str, take: Callable[[Msg], None], room: Room) -> None:
        self._client, self._take, self._room = client, take, room
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._inbox = client.new_inbox()
        self._enough = max(1, room.limit // 4)
        self._asked = 0
        self._heard = time.monotonic()
        self._lost: str | None = None
        self._closed = False

    async def run(self, stop: asyncio.Event) -> None:
        """Pull until `stop` is set. Raises ConsumerLost. What arrives too late goes back to the stream at once."""
        reconnects = self._client.stats["reconnects"]
        subscription = await self._client.subscribe(self._inbox, cb=self._receive, pending_bytes_limit=0)
        try:
            await self.ask()
            while not stop.is_set():
                if self._client.stats["reconnects"] != reconnects:
                    raise ConsumerLost("the connection was made anew")
                if self._lost is not None:
                    raise ConsumerLost(self._lost)
                if self._client.is_connected and self._asked and time.monotonic() - self._heard > SILENCE_S:
                    raise ConsumerLost(f"nothing was heard for {SILENCE_S:.0f} s")
                try:
                    await asyncio.wait_for(stop.wait(), WATCH_S)
                except TimeoutError:
                    continue
        finally:
            self._closed = True
            try:
                await asyncio.wait_for(subscription.drain(), CLOSE_S)  # type: ignore[no-untyped-call]
            except (TimeoutError, NatsError) as error:
                logger.debug("puller not drained: %r", error)  # its requests expire by themselves

    async def ask(self) -> None:
        """Ask for what there is room for. To be called whenever room was made."""
        wanted = self._room.free() - self._asked
        if self._closed or wanted <= 0 or (self._asked and wanted < self._enough):
            return
        if not self._asked:
            self._heard = time.monotonic()
        self._asked += wanted
        request = {"batch": wanted, "expires": int(EXPIRES_S * 1e9)}
        await self._client.publish(self._subject, json.dumps(request).encode(), reply=self._inbox)

    async def _receive(self, raw: Msg) -> None:
        self._heard = time.monotonic()
        status = raw.headers.get("Status") if raw.headers else None
        if status is None:
            self._asked -= 1
            if self._closed:
                await raw.nak()
            else:
                self._take(raw)
        elif status in _EXPIRED:
            self._asked -= int((raw.headers or {}).get("Nats-Pending-Messages", self._asked))
            await self.ask()
        else:
            self._lost = f"{status} {(raw.headers or {}).get('Description', '')}".strip()
