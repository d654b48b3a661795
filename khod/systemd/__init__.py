"""What the service manager is asked and told."""
