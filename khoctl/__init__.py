"""khoctl, khod's command line: thin and stateless, it asks khod and shows the answer."""
