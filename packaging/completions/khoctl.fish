# SPDX-License-Identifier: LGPL-2.1-or-later
# Asks khoctl itself (what `khoctl --show-completion fish` prints).
complete --command khoctl --arguments "(env _KHOCTL_COMPLETE=complete_fish _TYPER_COMPLETE_FISH_ACTION=get-args _TYPER_COMPLETE_ARGS=(commandline -cp) khoctl)" --condition "env _KHOCTL_COMPLETE=complete_fish _TYPER_COMPLETE_FISH_ACTION=is-args _TYPER_COMPLETE_ARGS=(commandline -cp) khoctl"
