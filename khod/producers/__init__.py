"""The holders of state outside the kernel, and the barrier they pass together."""
