"""How fast conversions are, and in how much memory, against the disk and against the peers' way: see performance.md."""
