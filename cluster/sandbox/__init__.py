"""Work whose cost depends on foreign input, done in processes that can be killed."""
