"""The coordinator: finds workers, plans, loads, and drives one model's frames round the ring."""
