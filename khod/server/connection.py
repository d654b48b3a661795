# SPDX-License-Identifier: LGPL-2.1-or-later
"""One client and its calls, one after the other, by the kernel's credentials and the rules."""

import contextvars
import json
import logging
import socket
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from asyncvarlink import FileDescriptor, VarlinkErrorReply, VarlinkMethodCall
from asyncvarlink.conversion import ConversionError, FileDescriptorVarlinkType
from asyncvarlink.serviceerrors import InvalidParameter, MethodNotFound

from khod.concurrency.bounded import ANYTHING, raise_if_cancelling
from khod.errors import KhoError, Refused, UsageError
from khod.producers.peer import Peer
from khod.server import messages
from khod.server.access import ANSWERED, CALLER, Caller, Standing
from khod.server.events import Stream
from khod.server.files import PassedFiles
from khod.server.limits import MAX_MESSAGE_BYTES, MAX_OTHERS_MESSAGE_BYTES
from khod.server.places import Place
from khod.server.rules import OPERATORS, RULES, CallKind
from khod.server.shared import Shared
from khod.server.transport import Transport
from khod.wire import PRODUCER

CONNECTION: "contextvars.ContextVar[ClientConnection]" = contextvars.ContextVar("CONNECTION")
"""The connection whose call is being served."""

Serve = Callable[[], Any]
Message = dict[str, Any]
_LOG = logging.getLogger("khod.server")


class ClientConnection:
    """One client, from accept(2) to its end. A call that was begun is finished, whether or not the client stays.

    One class of this size: a call, its descriptors, its answer and its turn end together, whichever ends first.
    """

    def __init__(
        self,
        shared: Shared,
        sock: socket.socket,
        caller: Caller,
        standing: Standing,
        place: Place,
        gone: Callable[["ClientConnection"], None],
    ) -> None:
        """Begin to serve the client; `gone` is called when the connection has ended."""
        self._shared = shared
        self.caller = caller
        self._standing = standing
        self._known_at = shared.groups.count_changes
        self._place = place
        self._gone = gone
        self.producer: Peer | None = None
        self.is_told_early = False
        """Whether the early restore has told it `restore`, under the registration that is still to be made here."""
        self.is_open = True
        self.on_end: list[Callable[[], None]] = []
        """Called when the client has sent its last message; otherwise a monitor would wait for the next event."""
        self._stream: Stream | None = None
        self._answered = False
        self._ends_after_reply = False
        self._oneway = False
        self._urgent = False
        self.transport = Transport(
            sock,
            caller.uid,
            self,
            shared.lane_for(rights=self.has_rights),
            buffered=shared.buffer_quota(caller.uid),
            room=shared.room_of(caller.uid),
        )
        self.transport.let_send_files(allowed=self.may_send_files)

    def repeat_registration(self, call: bytes, *, is_told: bool) -> None:
        """Register the producer whose call the early restore has answered; `is_told` as in `is_told_early`.

        If it cannot be registered its connection ends: it would take an error for the answer to another call, and begin
        without what it left.
        """
        self.is_told_early = is_told
        self.end_after_reply()
        self.transport.pass_message(json.dumps(messages.parse_message(call) | {"oneway": True}).encode())

    # The client's rights, which change with a reload or the end of a lookup

    @property
    def caller_standing(self) -> Standing:
        """The current standing of the client."""
        groups = self._shared.groups
        if self._known_at != groups.count_changes:
            self._known_at = groups.count_changes
            before, self._standing = self._standing, groups.standing_of(self.caller)
            if before is not self._standing:
                self._serve_as_due()
        return self._standing

    @property
    def has_rights(self) -> bool:
        """Whether the client has more rights than to ask."""
        return self.producer is not None or self.caller_standing is not Standing.other

    @property
    def max_bytes(self) -> int:
        return MAX_MESSAGE_BYTES if self.has_rights else MAX_OTHERS_MESSAGE_BYTES

    @property
    def may_send_files(self) -> bool:
        return self.producer is not None or self.caller_standing in OPERATORS

    def _serve_as_due(self) -> None:
        """Move to the lane, and accept descriptors, as the client's current rights require."""
        if self.is_open:
            self.transport.move_to_lane(self._shared.lane_for(rights=self.has_rights))
            self.transport.let_send_files(allowed=self.may_send_files)

    def reserve_producers_place(self) -> bool:
        """Reserve a place for this connection as a producer's; call `bind_producer` afterwards."""
        return self._place.reserve_producers()

    def bind_producer(self, producer: Peer | None) -> None:
        """Become the connection of this producer; None if the registration failed."""
        registered = producer is not None and self.is_open
        self._place.settle_place(registered=registered)
        if registered:
            self.producer = producer
            self._ends_after_reply = False
            self._serve_as_due()

    # Calls from the transport

    def refuse_input(self, what: str) -> None:
        self._end_with(UsageError(what, remedy="Send one JSON object, ended by a NUL byte."))

    def refuse_files(self) -> None:
        self._end_with(self._shared.groups.refusal_error(self.caller, "hand files over"))

    def _end_with(self, error: KhoError) -> None:
        self.transport.send_data(messages.encode_error(error))
        self.hang_up()

    def on_drained(self) -> None:
        if self._stream is not None:
            self._stream.go_on()
        elif self._answered:
            self._answered = False
            self.transport.resume_reading()

    def hung_up(self) -> None:
        while self.on_end:
            self.on_end.pop()()

    def on_lost(self, sock: socket.socket) -> None:
        self.is_open = False
        self.hung_up()
        self._gone(self)
        self._shared.dispose_socket(sock, self.caller.uid, self._place.give_back)

    def hang_up(self) -> None:
        """End the connection after what was sent; for its producer it ends at once."""
        self.hung_up()
        self.transport.close()

    def end_after_reply(self) -> None:
        """Hang up after the answer to the current call."""
        self._ends_after_reply = True

    # Calls

    def on_message(self, text: bytes, fds: list[int]) -> None:
        files = PassedFiles(fds, partial(self._shared.room_of(self.caller.uid).close_fds, self.caller.uid))
        try:
            message = messages.parse_message(text)
        except messages.NotJson as error:
            files.close_all()
            self.refuse_input(f"The message is not a Varlink call: {error}")
            return
        self._oneway = message.get("oneway") is True
        self._try_message(message, files, may_wait=True)

    def _try_message(self, message: Message, files: PassedFiles, *, may_wait: bool) -> None:
        try:
            self._serve_call(messages.call_of(message), files, message if may_wait else None)
        except (VarlinkErrorReply, KhoError) as error:
            files.close_all()
            self._drop_after_bad_answer(error)
            self._send_reply(messages.encode_error(error))

    def _serve_call(self, call: VarlinkMethodCall, files: PassedFiles, again: Message | None) -> None:
        """Begin to serve a call; `again` is its message if it may be tried again when the groups are known."""
        try:
            method, signature = self._shared.interfaces.lookup_method(call)
        except MethodNotFound:  # the library names it without its interface
            raise MethodNotFound(method=call.method) from None
        if (rule := RULES.get(call.method)) is None:
            raise MethodNotFound(method=call.method)
        takes_image = rule.image and call.parameters.get("kernel") is not None
        callers = OPERATORS if takes_image else rule.callers
        if self.caller_standing not in callers:
            if again is None or not self._shared.groups.is_pending:
                raise self._shared.groups.refusal_error(self.caller, rule.what, producers=Standing.producer in callers)
            self._spawn_call(self._try_again(again, files))
            return
        if rule.registered and self.producer is None:
            raise Refused("This connection is not a producer", remedy=f"Call {PRODUCER}.Register first.")
        try:
            parameters = signature.parameter_type.fromjson(call.parameters, {FileDescriptorVarlinkType: files})
        except ConversionError as error:
            raise InvalidParameter(parameter=error.location[0]) from error
        files.close_unnamed()
        serve = partial(method, **parameters)
        self._urgent = self.caller_standing in OPERATORS and rule.kind in (CallKind.question, CallKind.operation)
        if self._urgent:
            self._shared.load.begin_call()
        if takes_image or rule.kind in (CallKind.operation, CallKind.conversation):
            self._spawn_call(self._run_call(serve, files))
            return
        files.close_all()
        match rule.kind:
            case CallKind.fixed:
                self._send_reply(self._shared.fixed_answer((call.method, *parameters.values()), serve))
            case CallKind.stream:
                self._begin_stream()
            case _:
                question = (call.method, *sorted(parameters.items()))
                compute = _compute_listing if rule.kind is CallKind.listing else _compute_answer
                self._shared.answers_for(self.caller_standing).queue_question(
                    question, partial(compute, serve, self.caller_standing), self._deliver_answer
                )

    async def _try_again(self, message: Message, files: PassedFiles) -> None:
        await self._shared.groups.wait_lookup()
        if self.is_open:
            self._try_message(message, files, may_wait=False)
        else:
            files.close_all()

    def _spawn_call(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a call in a task of its own, which is never cancelled: that would leave half of an operation."""
        context = contextvars.copy_context()
        context.run(CONNECTION.set, self)
        context.run(CALLER.set, self.caller)
        context.run(self._shared.spawn_task, work)

    async def _run_call(self, serve: Serve, files: PassedFiles) -> None:
        """Serve a call whose answer is only for this client."""
        passed: Sequence[FileDescriptor] = ()
        try:
            result = await serve()
            data, passed = messages.encode_with_files(result.parameters)
        except (VarlinkErrorReply, KhoError) as error:
            data = messages.encode_error(error)
        except ANYTHING as error:  # the client must be told that it failed, and a producer's connection ends
            raise_if_cancelling(error)
            _LOG.exception("a call failed")
            data = messages.encode_error(messages.INTERNAL)
            self._drop_after_bad_answer(messages.INTERNAL)
        finally:
            files.close_all()
        self._send_reply(data, passed)

    def _deliver_answer(self, answer: bytes) -> None:
        self.transport.submit_work(partial(self._send_reply, answer))

    def _send_reply(self, data: bytes, passed: Sequence[FileDescriptor] = ()) -> None:
        """Answer the call; the next one is read when the client has read the answer."""
        if self._urgent:
            self._urgent = False
            self._shared.load.end_call()
        fds = () if self._oneway else tuple(file.fileno() for file in passed)

        def on_sent() -> None:
            for file in passed:
                file.close()

        self.transport.send_data(b"" if self._oneway else data, fds, on_sent)
        if self._ends_after_reply:
            self.hang_up()
        self._end_call()

    def _end_call(self) -> None:
        self._answered = not self.transport.is_drained
        if not self._answered:
            self.transport.resume_reading()

    def _drop_after_bad_answer(self, error: Exception) -> None:
        """Hang up on a producer that sent an invalid answer: it has not agreed to what it was asked."""
        if self.producer is not None and isinstance(error, VarlinkErrorReply):
            self.end_after_reply()

    # A monitor

    def _begin_stream(self) -> None:
        monitors = self._shared.monitors
        self._stream = Stream(monitors.events, self.transport, self._end_stream)
        self.on_end.append(self._stop_stream)
        self._shared.answers_for(self.caller_standing).queue_question(
            "Monitor", monitors.first_event, self._open_stream
        )

    def _open_stream(self, first: bytes) -> None:
        self.transport.submit_work(lambda: self._stream.begin_stream(first) if self._stream is not None else None)

    def _stop_stream(self) -> None:
        """End the stream, because the client has gone or will send nothing more."""
        if self._stream is not None:
            self._stream.stop_stream()
            self._stream = None
            self._end_call()

    def _end_stream(self) -> None:
        self.on_end.remove(self._stop_stream)
        self._stream = None
        self._end_call()


async def _compute_answer(serve: Serve, standing: Standing) -> bytes:
    """Compute the answer for all clients with the same question; either all of them are operators, or none is."""

    async def encode_answer() -> bytes:
        return messages.encode_reply((await serve()).parameters)

    return await _encode_outcome(encode_answer, standing)


async def _compute_listing(serve: Serve, standing: Standing) -> bytes:
    """Compute several replies as one answer; all but the last say that another one follows."""

    async def encode_replies() -> bytes:
        replies = [messages.encode_reply(reply.parameters, continues=reply.continues) async for reply in serve()]
        return b"".join(replies)

    return await _encode_outcome(encode_replies, standing)


async def _encode_outcome(encode: Callable[[], Coroutine[Any, Any, bytes]], standing: Standing) -> bytes:
    ANSWERED.set(standing)  # of this task, which computes nothing else
    try:
        return await encode()
    except (VarlinkErrorReply, KhoError) as error:
        return messages.encode_error(error)
    except Exception:  # noqa: BLE001  # the clients must be told that it failed
        _LOG.exception("a question failed")
        return messages.encode_error(messages.INTERNAL)
