"""One engine for several processes: its owner's side, its callers' side, and what lies between."""
