"""A real small model and real data that lie in packages of the registry: no hub is needed."""
