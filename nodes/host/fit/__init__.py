"""Plans with the host's memory and keeps a model within its budget."""
