"""State trees for people: shown, exported, compared and held against schemas. Nothing here asks khod or a kernel."""
