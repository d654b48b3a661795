# Copyright: the khod authors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""kho_await runs on the controller: it waits for a host that may be in the middle of its jump."""

from __future__ import annotations

import time

from ansible.errors import AnsibleConnectionFailure
from ansible.module_utils.common.text.converters import to_native
from ansible.plugins.action import ActionBase

from ansible_collections.khod.kho.plugins.plugin_utils.connection import REFUSED, prepare_connection, reset_connection

ARGUMENTS = {"timeout": {"type": "float", "default": 120.0}}
PAUSE_SECONDS = 2.0


class ActionModule(ActionBase):
    """Wait until the host answers; it counts as unreachable where it does not."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _requires_connection = True

    def run(self, tmp=None, task_vars=None):
        super().run(tmp, task_vars)
        del tmp
        dummy, given = self.validate_argument_spec(argument_spec=ARGUMENTS)
        prepare_connection(self._connection)
        ends = time.monotonic() + given["timeout"]
        while True:
            try:
                self._low_level_execute_command("true", sudoable=False)
                return {"changed": False}
            except AnsibleConnectionFailure as error:
                message = to_native(error).strip()
            if any(text in message for text in REFUSED) or time.monotonic() >= ends:
                return {"unreachable": True, "msg": message}
            reset_connection(self._connection)
            time.sleep(PAUSE_SECONDS)
