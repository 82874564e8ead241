"""Who may talk to whom. Hands out the credentials of every channel and server; nobody else makes any."""
