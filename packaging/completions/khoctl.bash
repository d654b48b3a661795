# SPDX-License-Identifier: LGPL-2.1-or-later
# Asks khoctl itself (what `khoctl --show-completion bash` prints); a file where it has nothing to say.
_khoctl_completion() {
    local IFS=$'\n'
    COMPREPLY=( $( env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD="$COMP_CWORD" _KHOCTL_COMPLETE=complete_bash "$1" ) )
    return 0
}

complete -o default -F _khoctl_completion khoctl
