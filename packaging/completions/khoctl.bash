# SPDX-License-Identifier: LGPL-2.1-or-later
# Asks khoctl itself, which knows its commands, and asks khod for the values: khoctl/completion.py.
_khoctl_completion() {
    local line candidates=()
    COMPREPLY=()
    while IFS= read -r line; do
        candidates+=("${line%%$'\t'*}")
    done < <(_KHOCTL_COMPLETE=line "$1" "${COMP_LINE:0:COMP_POINT}" "${COMP_WORDS[COMP_CWORD]:-}" 2>/dev/null)
    case ${candidates[0]:-} in
    :files) compopt -o default ;;
    :directories) compopt -o dirnames ;;
    *)
        for line in "${candidates[@]}"; do
            [[ ${COMP_WORDS[COMP_CWORD]:-} == [\"\']* ]] || printf -v line %q "$line"
            COMPREPLY+=("$line")
        done
        ;;
    esac
}

complete -o nosort -F _khoctl_completion khoctl
