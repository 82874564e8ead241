"""What the worst input costs: every public entry, measured in processes that can be killed, and a search for worse."""
