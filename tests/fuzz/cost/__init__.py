"""The cost of the worst input of every public entry, measured in processes that can be killed, and a search for it."""
