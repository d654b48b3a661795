"""Which kernel this host's boot loader, or its kernel packages, would boot."""
