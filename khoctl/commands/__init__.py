"""The commands of khoctl, a module for each group of them."""
