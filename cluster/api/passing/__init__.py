"""What a standby does with the calls and requests of clients: the coordinator that leads answers them."""
