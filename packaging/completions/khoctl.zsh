#compdef khoctl
# SPDX-License-Identifier: LGPL-2.1-or-later
# Asks khoctl itself, which knows its commands, and asks khod for the values: khoctl/completion.py.
local line
local -a found given
given=("${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}")
for line in "${(@f)$(_KHOCTL_COMPLETE=words $words[1] "${given[@]}" 2>/dev/null)}"; do
    case $line in
    :files) compset -P '--*='; _files; return ;;
    :directories) compset -P '--*='; _files -/; return ;;
    ?*) found+=("${${line%%$'\t'*}//:/\\:}${${(M)line%%$'\t'*}:+:${line#*$'\t'}}") ;;
    esac
done
(( $#found )) && _describe -V -t values khoctl found
