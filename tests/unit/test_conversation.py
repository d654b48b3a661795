# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands and answers of one producer that the early restore has told `restore`."""

import asyncio
from unittest import mock

from khod.producers.barrier import ProducerCall, Verb
from khod.producers.claim import Claim
from khod.producers.conversation import Answer, AnswerWord, Conversation, PeerCommand
from khod.wire import FIRST_SERIAL

READY = Answer(FIRST_SERIAL, AnswerWord.ready)


def told_early() -> Conversation:
    conversation = Conversation(mock.create_autospec(Claim, instance=True, kept=()), lambda: None)
    conversation.open_connection(30.0)
    conversation.note_told_early()
    return conversation


async def ask(conversation: Conversation, answer: Answer | None = None) -> "asyncio.Future[PeerCommand]":
    asking = asyncio.ensure_future(conversation.exchange_answer(answer))
    await asyncio.sleep(0)
    return asking


def test_its_answer_is_to_the_restore_that_khod_gives_later() -> None:
    async def scenario() -> None:
        conversation = told_early()
        asking = await ask(conversation, READY)
        await conversation.give_command(ProducerCall(Verb.restore, "run"))
        finishing = asyncio.ensure_future(conversation.give_command(ProducerCall(Verb.finish, "run")))
        command = await asking
        assert (command.serial, command.verb) == (FIRST_SERIAL + 1, Verb.finish)
        await ask(conversation, Answer(command.serial, AnswerWord.ready))
        await finishing

    asyncio.run(asyncio.wait_for(scenario(), 5))


def test_its_answer_is_not_to_another_verb() -> None:
    """Where khod gives no restore, the producer would seem to have prepared, and be told to freeze."""

    async def scenario() -> None:
        conversation = told_early()
        asking = await ask(conversation, READY)
        preparing = asyncio.ensure_future(conversation.give_command(ProducerCall(Verb.prepare, "next")))
        command = await asking
        assert (command.serial, command.verb) == (FIRST_SERIAL + 1, Verb.prepare)
        assert not preparing.done()
        await ask(conversation, Answer(command.serial, AnswerWord.ready))
        await preparing

    asyncio.run(asyncio.wait_for(scenario(), 5))
