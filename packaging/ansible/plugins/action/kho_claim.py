# Copyright: the khod authors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The half of kho_claim on the controller: it asks again where the host is in the middle of its jump."""

from __future__ import annotations

from ansible.plugins.action import ActionBase

from ansible_collections.khod.kho.plugins.plugin_utils.connection import (
    execute_module,
    keep_asking,
    prepare_connection,
)


class ActionModule(ActionBase):
    """Run the module on the host, as soon as it is reached."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _requires_connection = True

    def run(self, tmp=None, task_vars=None):
        super().run(tmp, task_vars)
        del tmp
        arguments = dict(self._task.args)
        seconds = float(arguments.pop("connect_timeout", 0))
        prepare_connection(self._connection)
        return keep_asking(
            lambda: execute_module(self, "kho_claim", arguments, task_vars), self._connection, seconds
        )
