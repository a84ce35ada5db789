"""The node pack's rooms: one file per node, and four leaf rooms that never import one another."""
