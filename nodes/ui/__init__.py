"""User interface of the nodes: schemas, shared inputs, progress messages, drawings."""
