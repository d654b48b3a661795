# SPDX-License-Identifier: LGPL-2.1-or-later
# Asks khoctl itself, which knows its commands, and asks khod for the values: khoctl/completion.py.
function __khoctl_complete
    set -l words (commandline -opc)
    set -l last (string unescape -- (commandline -ct); or commandline -ct)
    set -l found (env _KHOCTL_COMPLETE=words $words[1] $words[2..-1] "$last" 2>/dev/null)
    switch "$found[1]"
        case :files
            __fish_complete_path "$last"
        case :directories
            __fish_complete_directories "$last"
        case '*'
            printf '%s\n' $found
    end
end

complete --command khoctl --no-files --keep-order --arguments "(__khoctl_complete)"
