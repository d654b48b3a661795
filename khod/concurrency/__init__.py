"""How khod waits: within a bound, or in a thread of its own."""
