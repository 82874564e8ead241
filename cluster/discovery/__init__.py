"""Discovery: addresses at which workers may be. A sighting is a hint; who answers there must be authenticated."""
