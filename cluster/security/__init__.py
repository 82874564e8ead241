"""Security: certificates, roles, tokens and API keys. Every channel and server gets its credentials from here."""
