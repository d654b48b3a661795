#compdef khoctl
# SPDX-License-Identifier: LGPL-2.1-or-later
# Asks khoctl itself (what `khoctl --show-completion zsh` prints, as an autoloaded function).
eval "$(env _TYPER_COMPLETE_ARGS="${words[1,$CURRENT]}" _KHOCTL_COMPLETE=complete_zsh khoctl)"
