"""What this machine can do, measured for the cluster file: compute, memory, and the links between its ranks."""
