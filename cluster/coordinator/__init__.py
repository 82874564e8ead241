"""The coordinator: finds workers, plans, loads slices, and sends one model's frames around the ring."""
