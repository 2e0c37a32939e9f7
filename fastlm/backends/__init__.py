"""What serves the ops: what this machine can run, and a module per kind of backend."""
