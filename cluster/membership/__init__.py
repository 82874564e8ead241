"""Who counts as there. Pure: what was heard and when goes in, up, suspect or gone comes out; no I/O, no clock."""
