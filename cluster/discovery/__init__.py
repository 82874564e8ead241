"""Discovery: where workers may be. A sighting is a hint for an address; who answers there is for others to prove."""
