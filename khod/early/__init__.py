# SPDX-License-Identifier: LGPL-2.1-or-later
"""The early restore: producers have back what they left while khod still imports the rest of itself.

Clients wait for their producer, and the producer for khod. So khod answers with a thread that needs little, and takes
over its connections once it has started. Nothing is decided here: where the record or a call is not plainly what it is
for nearly every handover, it is left to khod.

Everything below imports as little as it can: no asyncio, no dataclasses, no typing.
"""
