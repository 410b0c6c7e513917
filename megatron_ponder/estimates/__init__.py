"""What a run will need and how long it will take, from its configuration and a description of a cluster."""
